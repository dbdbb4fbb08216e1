"""Bias and penalties against their formulas in float64, written without the code under test."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.ops.logit_adjust import LogitAdjuster
from step3rt.ops.sampling import SamplingRow, sample, token_logprobs
from tests.oracle.logit_adjust import adjusted_logits

VOCAB = 200

penalty = st.sampled_from([0.0, 0.0, 0.5, -0.5]) | st.floats(-2, 2, width=32)
repetition_penalty = st.sampled_from([1.0, 1.0, 1.2, 0.5]) | st.floats(
    0, 100, exclude_min=True, width=32
)
biases = st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=20)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=150)


def adjuster(
    prompt: list[int],
    generated: list[int],
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    bias: dict[int, float] | None = None,
) -> LogitAdjuster:
    bias = bias or {}
    return LogitAdjuster(
        presence=presence,
        frequency=frequency,
        repetition=repetition,
        bias=(list(bias), list(bias.values())),
        token_ids=[*prompt, *generated],
        num_prompt_tokens=len(prompt),
    )


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 5


@given(
    seed=st.integers(0, 2**32 - 1),
    prompt=tokens,
    generated=tokens,
    presence=penalty,
    frequency=penalty,
    repetition=repetition_penalty,
    bias=biases,
)
def test_adjusted_logits_are_those_of_the_formulas(
    seed: int,
    prompt: list[int],
    generated: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    parameters = {
        "presence": presence, "frequency": frequency, "repetition": repetition, "bias": bias,
    }  # fmt: skip
    logits = random_logits(seed)
    before = logits.clone()
    found = adjuster(prompt, generated, **parameters).apply(logits)  # type: ignore[arg-type]
    right = adjusted_logits(logits.numpy(), prompt, generated, **parameters)  # type: ignore[arg-type]
    # Bias and result are rounded to float32, at the size that the logit has between the two.
    scale = max(repetition, 1 / repetition)
    sizes = np.abs(logits.double().numpy())
    error = 2.0**-22 * (sizes + 100) * scale + 2.0**-22 * np.abs(right)
    most = float(np.finfo(np.float32).max)
    assert (np.abs(found.double().numpy() - right.clip(-most, most)) <= error).all()
    assert torch.isfinite(found).all()
    assert torch.equal(logits, before), "the model's logits are reported, so they stay"


@given(
    prompt=tokens,
    generated=tokens,
    cut=st.integers(0, 150),
    repetition=repetition_penalty,
    frequency=penalty,
)
def test_counting_token_by_token_is_joining_with_them(
    prompt: list[int], generated: list[int], cut: int, repetition: float, frequency: float
) -> None:
    """A sequence that moves joins with all its tokens, and must go on as if it had stayed."""
    options = {"presence": 0.3, "frequency": frequency, "repetition": repetition}
    stayed = adjuster(prompt, generated[:cut], **options)
    for token_id in generated[cut:]:
        stayed.count(token_id)
    logits = random_logits(len(prompt))
    moved = adjuster(prompt, generated, **options)
    assert torch.equal(stayed.apply(logits), moved.apply(logits))


def test_prompt_tokens_count_for_repetition_alone() -> None:
    logits = torch.tensor([2.0, -2.0, 4.0, -4.0])
    found = adjuster([0, 1, 1], [2, 3, 3], presence=0.25, frequency=0.5, repetition=2.0)
    assert found.apply(logits).tolist() == [1.0, -4.0, 2.0 - 0.75, -8.0 - 1.25]


def test_bias_comes_before_penalties() -> None:
    # 1 - 3 = -2 is negative, so that the repetition penalty multiplies it.
    found = adjuster([], [0], repetition=2.0, presence=1.0, bias={0: -3.0})
    assert found.apply(torch.tensor([1.0, 0.0])).tolist() == [-5.0, 0.0]


@pytest.mark.parametrize("repetition", [1e-30, 100.0])
@pytest.mark.parametrize("size", [1e-3, 1e30, 3e38])
def test_logits_stay_finite_and_in_order(repetition: float, size: float) -> None:
    logits = torch.tensor([size, -size, size / 2, -size / 2])
    found = adjuster([0, 1], [2, 3], repetition=repetition, bias={0: 100.0, 1: -100.0})
    adjusted = found.apply(logits)
    assert torch.isfinite(adjusted).all()
    assert adjusted[0] >= adjusted[2] >= adjusted[3] >= adjusted[1]


def test_a_bias_of_a_hundred_forces_and_bans() -> None:
    logits = random_logits(0)
    best = int(logits.argmax())
    banned, forced = adjuster([], [], bias={best: -100.0}), adjuster([], [], bias={17: 100.0})
    for temperature in (0.0, 1.0):
        rows = [
            SamplingRow(temperature=temperature, seed=3, position=position, adjuster=each)
            for position in range(100)
            for each in (banned, forced)
        ]
        found = sample(logits.expand(len(rows), -1), rows)
        assert best not in found[::2]
        assert set(found[1::2]) == {17}


def test_a_mask_is_stronger_than_any_bias() -> None:
    forced = adjuster([], [5] * 3, bias={5: 100.0}, frequency=-2.0, repetition=0.01)
    row = SamplingRow(adjuster=forced, masked_token_ids=(5,))
    logits = torch.zeros(1, 8)
    assert sample(logits, [row]) == [0]
    assert sample(logits, [SamplingRow(adjuster=forced)]) == [5]
    assert torch.equal(logits, torch.zeros(1, 8))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_of_which_all_is_masked_gives_token_0(temperature: float) -> None:
    row = SamplingRow(temperature=temperature, masked_token_ids=tuple(range(8)))
    assert sample(torch.ones(1, 8), [row]) == [0]


@given(seed=st.integers(0, 2**31), mates=st.integers(1, 5), place=st.integers(0, 5))
def test_a_row_with_penalties_and_its_neighbours_do_not_influence_each_other(
    seed: int, mates: int, place: int
) -> None:
    place = min(place, mates)
    logits = torch.randn(mates + 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    plain = [SamplingRow(temperature=seed % 2, seed=index) for index in range(mates)]
    row = SamplingRow(
        temperature=0.8, seed=seed, adjuster=adjuster([1, 2], [3, 3], frequency=1.0, repetition=1.5)
    )
    together = sample(logits, [*plain[:place], row, *plain[place:]])
    assert together.pop(place) == sample(logits[place : place + 1], [row])[0]
    others = [index for index in range(mates + 1) if index != place]
    assert together == sample(logits[others], plain)


def test_logprobs_are_of_the_logits_before_bias_and_penalties() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    row = SamplingRow(adjuster=adjuster([], [2], frequency=2.0, bias={0: 50.0}))
    assert sample(logits, [row]) == [0]
    ((logprob, top),) = token_logprobs(logits, [0], 1)
    assert logprob == pytest.approx(1 - float(torch.logsumexp(logits, dim=1)), abs=1e-6)
    assert top[0][0] == 2


def test_more_different_tokens_than_any_first_guess_are_counted() -> None:
    many = adjuster(list(range(150)), [], frequency=1.0, repetition=2.0)
    for token_id in [*range(100, 200), *range(100, 200)]:
        many.count(token_id)
    adjusted = many.apply(torch.ones(VOCAB))
    assert adjusted[:100].tolist() == [0.5] * 100
    assert adjusted[100:].tolist() == [0.5 - 2.0] * 100
