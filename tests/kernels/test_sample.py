import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step3rt.ops.sample import (  # noqa: E402
    DeviceSamplingRow,
    Samples,
    pack_rows,
    sample_on_device,
)
from step3rt.ops.sampling import token_logprobs  # noqa: E402
from tests.kernels.mfa_inputs import DEVICE  # noqa: E402
from tests.kernels.sample_inputs import (  # noqa: E402
    fp32,
    make_logits,
    reference_tokens,
    repadded,
    run,
    vary,
)

STEP3_VOCAB = 128_815
DTYPES = (torch.bfloat16, torch.float32)
GREEDY = DeviceSamplingRow()
SAMPLED = DeviceSamplingRow(temperature=1.0)
FILTERS = (
    DeviceSamplingRow(temperature=1.0),
    DeviceSamplingRow(temperature=fp32(0.7), top_p=fp32(0.9)),
    DeviceSamplingRow(temperature=fp32(1.7), top_k=40),
    DeviceSamplingRow(temperature=1.0, top_k=5000),
    DeviceSamplingRow(temperature=1.0, top_k=1),
    DeviceSamplingRow(temperature=fp32(0.6), top_k=64, top_p=fp32(0.95), min_p=fp32(0.01)),
    DeviceSamplingRow(temperature=1.0, min_p=fp32(0.05)),
    DeviceSamplingRow(temperature=1.0, top_p=fp32(1e-6)),
    DeviceSamplingRow(temperature=100.0, top_p=fp32(0.999)),
    DeviceSamplingRow(temperature=fp32(1e-30)),
    DeviceSamplingRow(temperature=fp32(1e-6), top_p=fp32(0.5)),
)


def same_tokens(logits: torch.Tensor, rows: list[DeviceSamplingRow]) -> None:
    out = run(logits, rows)
    assert not bool(out.is_corrupt.any())
    assert out.token_ids.tolist() == reference_tokens(logits, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 64, 1000, 4096, STEP3_VOCAB])
def test_greedy_takes_the_largest_and_of_equals_the_lower_id(
    vocab_size: int, dtype: torch.dtype
) -> None:
    logits = make_logits(33, vocab_size, dtype)
    logits[1::2] = logits[1::2].round()  # many equal ones
    logits[2::4] -= 1000
    out = run(logits, [GREEDY] * 33)  # a kernel of its own
    mixed = run(logits, [GREEDY] * 32 + [SAMPLED])
    assert torch.equal(out.token_ids[:32], mixed.token_ids[:32])
    assert out.token_ids.tolist() == logits.float().cpu().argmax(dim=1).tolist()
    assert not bool(out.is_corrupt.any())
    assert bool(out.logprobs.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5, 600, 8192])
@pytest.mark.parametrize("row", FILTERS, ids=str)
def test_tokens_are_the_references(
    row: DeviceSamplingRow, vocab_size: int, dtype: torch.dtype
) -> None:
    logits = make_logits(64, vocab_size, dtype)
    logits[::3] = (logits[::3] * 2).round() / 2  # ties at the cuts
    same_tokens(logits, vary(row, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_step3s_vocabulary_are_the_references(dtype: torch.dtype) -> None:
    rows = [row for base in FILTERS for row in vary(base, 4)]
    for spread in (1.0, 5.0):
        same_tokens(make_logits(len(rows), STEP3_VOCAB, dtype, spread), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions_with_outliers_and_plateaus(dtype: torch.dtype) -> None:
    rows = [row for base in FILTERS for row in vary(base, 2)]
    logits = make_logits(len(rows), 20_000, dtype)
    for shape in range(4):
        logits.normal_()
        if shape == 0:
            logits[:, 777] = 3e38  # everything else in one bin
        elif shape == 1:
            logits.fill_(-5.0)  # one value
        elif shape == 2:
            logits.mul_(1e-6)
            logits[:, :9] = torch.arange(9, device=DEVICE).to(dtype)
        else:
            logits.copy_(-logits.abs() * 1e4)
            logits[:, 19_999] = -0.0
            logits[:, 100] = 0.0
        same_tokens(logits, rows)


def test_edits_are_applied_before_everything_else() -> None:
    logits = make_logits(6, 3000, torch.float32)
    best = logits.argsort(dim=1, descending=True)[:, :5].tolist()
    penalised = DeviceSamplingRow(
        presence=0.5,
        frequency=0.25,
        repetition=fp32(1.3),
        generated={best[0][0]: 3, best[0][1]: 1, 17: 2},
        prompt_token_ids=(best[0][2], 17, 2999),
        bias={best[0][3]: -2.0, 0: 1.5, 2999: 0.25},
    )
    rows = [
        penalised,
        DeviceSamplingRow(masked_token_ids=(*best[1][:3], 5000)),
        DeviceSamplingRow(bias={best[2][4]: 100.0}),
        DeviceSamplingRow(masked_token_ids=range(3000)),
        DeviceSamplingRow(repetition=fp32(1e-30), generated={1: 1}, bias={1: 1.0}),
        GREEDY,
    ]
    same_tokens(logits, rows)
    assert run(logits, rows).token_ids.tolist()[3] == 0
    sampled = [
        DeviceSamplingRow(
            temperature=1.0,
            top_p=fp32(0.9),
            seed=seed,
            position=seed,
            presence=penalised.presence,
            frequency=penalised.frequency,
            repetition=penalised.repetition,
            generated=penalised.generated,
            prompt_token_ids=penalised.prompt_token_ids,
            bias=penalised.bias,
            masked_token_ids=(best[0][0],),
        )
        for seed in range(6)
    ]
    same_tokens(logits[:1].expand(6, -1).contiguous().view(6, 3000), sampled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [3, 5000, STEP3_VOCAB])
def test_logprobs_are_of_the_raw_logits(vocab_size: int, dtype: torch.dtype) -> None:
    logits = make_logits(8, vocab_size, dtype)
    logits[4:] = logits[4:].round()
    wanted = [0, 1, 2, 3, 20, 32, None, 5]
    rows = [
        DeviceSamplingRow(temperature=index % 2, seed=index, num_top=num_top, bias={1: 3.0})
        for index, num_top in enumerate(wanted)
    ]
    out = run(logits, rows)
    tokens = out.token_ids.tolist()
    scores = token_logprobs(logits.float().cpu(), tokens, 32)
    exact = torch.log_softmax(logits.double(), dim=1).cpu()
    for index, (_, top) in enumerate(scores):
        num_top = wanted[index]
        if num_top is None:
            assert bool(out.logprobs[index].isnan())
            num_top = 0
        else:
            assert float(out.logprobs[index]) == pytest.approx(
                exact[index, tokens[index]].item(), abs=1e-5
            )
        listed = min(num_top, vocab_size)
        assert out.top_ids[index, :listed].tolist() == [token for token, _ in top[:listed]]
        got = out.top_logprobs[index, :listed].tolist()
        want = [exact[index, token].item() for token, _ in top[:listed]]
        assert got == pytest.approx(want, abs=1e-5)
        assert not bool((out.top_ids[index, listed:] >= 0).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_corrupt_and_no_others(
    value: float, dtype: torch.dtype
) -> None:
    logits = make_logits(12, STEP3_VOCAB, dtype)
    for row, place in ((1, 0), (4, 70_001), (11, STEP3_VOCAB - 1)):
        logits[row, place] = value
    rows = [GREEDY, SAMPLED, DeviceSamplingRow(num_top=2)] * 4
    assert torch.equal(run(logits, [GREEDY] * 12).is_corrupt, run(logits, rows).is_corrupt)
    out = run(logits, rows)
    assert out.is_corrupt.tolist() == [int(row in (1, 4, 11)) for row in range(12)]
    assert all(0 <= token < STEP3_VOCAB for token in out.token_ids.tolist())
    good = [0, 2, 3, 5, 6, 7, 8, 9, 10]
    assert out.token_ids[good].tolist() == reference_tokens(logits[good], [rows[i] for i in good])


@pytest.mark.parametrize("row", [GREEDY, SAMPLED, DeviceSamplingRow(temperature=1.0, top_k=3)])
def test_a_single_token_above_minus_infinity_is_chosen_and_flagged(row: DeviceSamplingRow) -> None:
    logits = make_logits(3, 5000, torch.bfloat16)
    logits.fill_(-float("inf"))
    for index, place in enumerate((0, 2501, 4999)):
        logits[index, place] = -3.0
    for rows in ([row] * 3, [row, row, DeviceSamplingRow(num_top=1)]):
        out = run(logits, rows)
        assert out.token_ids.tolist() == [0, 2501, 4999]
        assert out.is_corrupt.tolist() == [1, 1, 1]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = [row for base in (*FILTERS, GREEDY) for row in vary(base, 3)]
    logits = make_logits(len(rows), STEP3_VOCAB, torch.bfloat16)
    together = run(logits, rows).token_ids.tolist()
    order = torch.randperm(len(rows)).tolist()
    shuffled = run(repadded(logits[order]), [rows[index] for index in order]).token_ids.tolist()
    assert shuffled == [together[index] for index in order]
    for index in (0, 5, len(rows) - 1):
        alone = run(logits[index : index + 1], rows[index : index + 1])
        assert alone.token_ids.tolist() == [together[index]]


def test_draws_follow_the_softmax() -> None:
    """Chi-square of 20,000 draws over 12 tokens; seeds are fixed."""
    num_draws = 20_000
    probabilities = torch.softmax(torch.linspace(0, 3, 12, dtype=torch.float64), dim=0)
    logits = make_logits(num_draws, 12, torch.float32)
    logits[:] = probabilities.log().float().to(DEVICE)
    rows = [DeviceSamplingRow(temperature=1.0, seed=99, position=i) for i in range(num_draws)]
    counts = torch.bincount(run(logits, rows).token_ids.long(), minlength=12).double().cpu()
    expected = probabilities * num_draws
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 31.3  # 99.9 % of draws are below, with 11 degrees of freedom


def test_arguments_that_do_not_fit_are_refused() -> None:
    batch = pack_rows([GREEDY] * 2, 1001, DEVICE)
    out = Samples.empty(2, 1, DEVICE)
    with pytest.raises(ValueError, match="16 bytes at a time"):
        sample_on_device(torch.zeros(2, 1001, device=DEVICE), batch, out)
    with pytest.raises(ValueError, match="up to"):
        sample_on_device(torch.zeros(2, 132_000, device=DEVICE), batch, out)
    with pytest.raises(ValueError, match="bf16 or f32"):
        sample_on_device(torch.zeros(2, 1000, device=DEVICE).half(), batch, out)
    with pytest.raises(ValueError, match="lists 33 tokens"):
        pack_rows([DeviceSamplingRow(num_top=33)], 1000, DEVICE)
    with pytest.raises(ValueError, match="touches tokens"):
        pack_rows([DeviceSamplingRow(bias={1000: 1.0})], 1000, DEVICE)
