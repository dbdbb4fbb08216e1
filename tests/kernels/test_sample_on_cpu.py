"""What the sampler's launcher chooses on the CPU, from packed rows, is what `ops.sampling` does."""

import pytest
import torch

from step3rt.ops.sample import DeviceSamplingRow, Samples, pack_rows, sample_on_device
from step3rt.ops.sampling import token_logprobs
from tests.kernels.sample_inputs import (
    POISON_TOKEN,
    edited_logits,
    fp32,
    make_logits,
    reference_tokens,
    run,
    vary,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)
GREEDY = DeviceSamplingRow()
SAMPLED = DeviceSamplingRow(temperature=1.0)
FILTERS = (
    SAMPLED,
    DeviceSamplingRow(temperature=fp32(0.7), top_p=fp32(0.9)),
    DeviceSamplingRow(temperature=fp32(1.7), top_k=40),
    DeviceSamplingRow(temperature=fp32(0.6), top_k=64, top_p=fp32(0.95), min_p=fp32(0.01)),
    DeviceSamplingRow(temperature=fp32(1e-30)),
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 9, 1000])
def test_greedy_takes_the_largest_and_of_equals_the_lower_id(
    vocab_size: int, dtype: torch.dtype
) -> None:
    logits = make_logits(9, vocab_size, dtype, device=CPU)
    logits[1::2] = logits[1::2].round()  # many equal ones
    out = run(logits, [GREEDY] * 9)
    for row, token in zip(logits.tolist(), out.token_ids.tolist(), strict=True):
        assert token == row.index(max(row))
    assert not bool(out.is_corrupt.any())
    assert bool(out.logprobs.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_the_plain_rows(dtype: torch.dtype) -> None:
    rows = [row for base in FILTERS for row in vary(base, 4)]
    logits = make_logits(len(rows), 3000, dtype, device=CPU)
    logits[::3] = (logits[::3] * 2).round() / 2
    assert run(logits, rows).token_ids.tolist() == reference_tokens(logits, rows)


def test_edits_are_applied_before_everything_else() -> None:
    logits = make_logits(6, 3000, torch.float32, device=CPU)
    best = logits.argsort(dim=1, descending=True)[:, :5].tolist()
    rows = [
        DeviceSamplingRow(
            presence=0.5,
            frequency=0.25,
            repetition=fp32(1.3),
            generated={best[0][0]: 3, best[0][1]: 1, 17: 2},
            prompt_token_ids=(best[0][2], 17, 2999),
            bias={best[0][3]: -2.0, 0: 1.5, 2999: 0.25},
        ),
        DeviceSamplingRow(masked_token_ids=(*best[1][:3], 5000)),
        DeviceSamplingRow(bias={best[2][4]: 100.0}),
        DeviceSamplingRow(masked_token_ids=range(3000), temperature=1.0),
        DeviceSamplingRow(repetition=fp32(1e-30), generated={1: 1}, bias={1: 1.0}),
        DeviceSamplingRow(temperature=1.0, presence=2.0, generated={best[5][0]: 1}, seed=7),
    ]
    tokens = run(logits, rows).token_ids.tolist()
    assert tokens == reference_tokens(logits, rows)
    assert tokens[1] == best[1][3]
    assert tokens[2] == best[2][4]
    assert tokens[3] == 0
    assert tokens[0] == int(edited_logits(logits[0], rows[0]).argmax())


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_are_of_the_raw_logits_and_no_more_are_written_than_asked_for(
    dtype: torch.dtype,
) -> None:
    logits = make_logits(4, 50, dtype, device=CPU)
    wanted = [0, 3, None, 32]
    rows = [
        DeviceSamplingRow(temperature=index % 2, seed=index, num_top=num_top, bias={1: 3.0})
        for index, num_top in enumerate(wanted)
    ]
    out = run(logits, rows)
    tokens = out.token_ids.tolist()
    scores = token_logprobs(logits.float(), tokens, 32)
    for index, (logprob, top) in enumerate(scores):
        listed = wanted[index] or 0
        if wanted[index] is None:
            assert bool(out.logprobs[index].isnan())
        else:
            assert float(out.logprobs[index]) == pytest.approx(logprob)
        assert out.top_ids[index, :listed].tolist() == [token for token, _ in top[:listed]]
        got = out.top_logprobs[index, :listed].tolist()
        assert got == pytest.approx([value for _, value in top[:listed]])
        assert bool((out.top_ids[index, listed:] == POISON_TOKEN).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_corrupt_and_no_others(value: float) -> None:
    logits = make_logits(6, 700, torch.bfloat16, device=CPU)
    logits[1, 0] = value
    logits[4, 699] = value
    rows = [GREEDY, SAMPLED, DeviceSamplingRow(num_top=2)] * 2
    out = run(logits, rows)
    assert out.is_corrupt.tolist() == [0, 1, 0, 0, 1, 0]
    good = [0, 2, 3, 5]
    assert out.token_ids[good].tolist() == reference_tokens(logits[good], [rows[i] for i in good])
    if value == float("inf"):
        assert out.token_ids[[1, 4]].tolist() == [0, 699]
    elif value != value:
        logits[[1, 4], [0, 699]] = -float("inf")
        assert out.token_ids[[1, 4]].tolist() == logits[[1, 4]].float().argmax(dim=1).tolist()


def test_arguments_that_do_not_fit_are_refused() -> None:
    batch = pack_rows([GREEDY] * 2, 1001, CPU)
    out = Samples.empty(2, 1, CPU)
    with pytest.raises(ValueError, match="16 bytes at a time"):
        sample_on_device(torch.zeros(2, 1001), batch, out)
    with pytest.raises(ValueError, match="bf16 or f32"):
        sample_on_device(torch.zeros(2, 1000).half(), batch, out)
    listing = pack_rows([DeviceSamplingRow(num_top=2)] * 2, 1000, CPU)
    with pytest.raises(ValueError, match="has room for 1 listed"):
        sample_on_device(torch.zeros(2, 1000), listing, out)
