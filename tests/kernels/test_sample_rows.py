"""What the sampler's kernel is given, and the bounds that it relies on; no GPU needed."""

import numpy as np
import pytest
import torch

from step3rt.ops.logit_adjust import LogitAdjuster
from step3rt.ops.sample import MAX_TOP, DeviceSamplingRow, SamplingBatch, pack_rows
from step3rt.ops.sampling import gumbel_noise
from tests.kernels.sample_inputs import edited_logits

CPU = torch.device("cpu")
EDIT = np.dtype([("token", "i4"), ("count", "i4"), ("bias", "f4"), ("flags", "i4")])

# kernels/sampling/philox.cuh.
LEAST_NOISE, MOST_NOISE, NOISE_ERROR = -3.62, 36.75, 1e-4


def edits_of(batch: SamplingBatch, row: int) -> list[tuple[int, int, float, int]]:
    begin, end = batch.edit_offsets[row : row + 2].tolist()
    edits: list[tuple[int, int, float, int]] = (
        batch.edits.numpy().reshape(-1).view(EDIT)[begin:end].tolist()
    )
    return edits


def test_edits_are_sorted_and_carry_only_what_the_row_needs() -> None:
    rows = [
        DeviceSamplingRow(),
        DeviceSamplingRow(
            repetition=1.5,
            generated={9: 2, 4: 1},
            prompt_token_ids=[7, 4, 7],
            bias={8: -1.5},
            masked_token_ids=[9, 5000],
        ),
        DeviceSamplingRow(presence=1.0, generated={3: 1}, prompt_token_ids=[1, 2]),
        DeviceSamplingRow(generated={3: 1}, prompt_token_ids=[1, 2]),
    ]
    batch = pack_rows(rows, 1000, CPU)
    assert edits_of(batch, 0) == []
    assert edits_of(batch, 1) == [(4, 1, 0, 1), (7, 0, 0, 1), (8, 0, -1.5, 0), (9, 2, 0, 3)]
    assert edits_of(batch, 2) == [(3, 1, 0, 1)]
    assert edits_of(batch, 3) == []


def test_rows_without_edits_still_have_an_address_to_pass() -> None:
    batch = pack_rows([DeviceSamplingRow(seed=2**64 - 1, position=2**40)], 10, CPU)
    assert batch.edits.shape == (1, 16)
    assert batch.rows.shape == (1, 48)
    words = batch.rows.numpy().view(np.uint64)[0]
    assert words[4:].tolist() == [2**64 - 1, 2**40]


def test_rows_that_the_kernel_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="lists 33 tokens"):
        pack_rows([DeviceSamplingRow(num_top=MAX_TOP + 1)], 10, CPU)
    with pytest.raises(ValueError, match="touches tokens -1 to 4"):
        pack_rows([DeviceSamplingRow(bias={-1: 1.0, 4: 1.0})], 10, CPU)


def test_the_estimate_of_the_noise_stays_within_its_bound() -> None:
    """`noise_estimate` in numpy: only candidates within twice its error are computed exactly."""
    words = np.random.default_rng(3).integers(0, 2**64, 400_000, dtype=np.uint64)
    powers = [2**k - d for k in range(1, 65) for d in (0, 1) if 0 <= 2**k - d < 2**64]
    words = np.concatenate([words, np.array(powers + [2**64 - w for w in powers], dtype=np.uint64)])
    is_upper = words >= 2**63
    bits = np.where(is_upper, ~words, words)
    low = ((bits & np.uint64(0xFFFFFFFF)) >> np.uint64(12)).astype(np.float32) + np.float32(0.5)
    high = (bits >> np.uint64(32)).astype(np.float32) * np.float32(2.0**-32)
    x = (low * 2.0**-52 + high).astype(np.float32)
    series = x * (1 + x * (0.5 + x * (1 / 3 + x * (0.25 + x * 0.2))))
    logarithm = -np.log(np.where(is_upper, 1 - x, x))
    estimate = -np.log(np.where(is_upper & (x < 0.125), series, logarithm))
    exact = -np.log(-np.log(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52))
    # The rest of the bound is for the hardware's logarithm and for the logit's own rounding.
    assert np.abs(estimate - exact).max() < NOISE_ERROR / 5
    assert exact.min() > LEAST_NOISE
    assert exact.max() < MOST_NOISE
    noise = gumbel_noise(5, 6, 100_000)
    assert noise.min() > LEAST_NOISE
    assert noise.max() < MOST_NOISE


def test_the_edits_that_the_gpu_tests_expect_are_those_of_the_adjuster() -> None:
    logits = torch.linspace(-9, 9, 500)
    row = DeviceSamplingRow(
        presence=0.75,
        frequency=-0.5,
        repetition=1.25,
        generated={3: 2, 40: 1, 499: 7},
        prompt_token_ids=[40, 41, 250],
        bias={41: 2.5, 60: -1.0},
        masked_token_ids=[60, 61],
    )
    adjuster = LogitAdjuster(
        presence=row.presence,
        frequency=row.frequency,
        repetition=row.repetition,
        bias=(list(row.bias), list(row.bias.values())),
        token_ids=[40, 41, 250] + [3] * 2 + [40] + [499] * 7,
        num_prompt_tokens=3,
    )
    want = adjuster.apply(logits)
    want[[60, 61]] = -torch.inf
    assert torch.equal(edited_logits(logits, row), want)
