import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step3rt.ops.quantize import quantize_groups  # noqa: E402
from step3rt.ops.quantize_groups import quantize_groups_fp8  # noqa: E402
from step3rt.ops.rmsnorm_quantize import (  # noqa: E402
    HIDDEN_SIZE,
    QUERY_RANK,
    NormOutputs,
    QuantizedRows,
    add_rmsnorm_quantize,
    reference_add_rmsnorm_quantize,
    rmsnorm_quantize,
)
from tests.kernels.mfa_inputs import DEVICE  # noqa: E402

EPS = 1e-5
NUM_TOKENS = (1, 3, 255, 256, 257, 2048)


def poisoned_rows(num_tokens: int, width: int) -> QuantizedRows:
    rows = QuantizedRows.empty(num_tokens, width, DEVICE)
    rows.values.view(torch.uint8).fill_(0x7F)
    rows.scales.fill_(float("nan"))
    return rows


def poisoned_outputs(num_tokens: int) -> NormOutputs:
    shape = (num_tokens, HIDDEN_SIZE)
    nan = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
    return NormOutputs(nan, nan.clone(), poisoned_rows(num_tokens, HIDDEN_SIZE))


def random_rows(*shape: int) -> torch.Tensor:
    """Rows of different magnitude, with a few large values, as activations have."""
    rows = torch.randn(shape, device=DEVICE)
    rows *= torch.logspace(-3, 2, shape[-2], device=DEVICE)[:, None]
    rows.view(-1)[:: 7 * 128 + 5] *= 50
    return rows.bfloat16()


def assert_quantised_exactly(rows: QuantizedRows, x: torch.Tensor) -> None:
    """Exactly what the reference gives for the same bf16 values; -0 may come out as 0."""
    values, scales = quantize_groups(x.cpu())
    assert torch.equal(rows.scales.cpu(), scales)
    assert torch.equal(rows.values.cpu().float(), values.float())


def assert_normed(got: torch.Tensor, added: torch.Tensor, weight: torch.Tensor) -> None:
    """Within two roundings to bf16 of the norm in float64."""
    exact = added.double()
    exact = exact / (exact.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()
    bound = exact.abs() * (2 * 2**-8 + 1e-4) + 1e-30
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("num_partial_sums", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_sum_is_that_of_the_model_and_norm_and_scales_follow_it(
    num_tokens: int, num_partial_sums: int
) -> None:
    residual = random_rows(num_tokens, HIDDEN_SIZE)
    partial_sums = random_rows(num_partial_sums, num_tokens, HIDDEN_SIZE)
    weight = torch.randn(HIDDEN_SIZE, device=DEVICE).bfloat16()
    out = poisoned_outputs(num_tokens)
    add_rmsnorm_quantize(residual, partial_sums, weight, out, EPS)
    assert out.residual is not None
    assert out.normed is not None
    assert out.quantized is not None
    added, normed, _ = reference_add_rmsnorm_quantize(residual, partial_sums, weight, EPS)
    assert torch.equal(out.residual, added)
    assert_normed(out.normed, added, weight)
    # The order of the sum of squares and the root differ: one bf16 step, seldom.
    steps = (out.normed.view(torch.int16).int() - normed.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 2
    assert float((steps > 0).float().mean()) < 1e-3
    assert_quantised_exactly(out.quantized, out.normed)


def test_outputs_that_are_not_wanted_change_nothing_of_the_others() -> None:
    residual = random_rows(9, HIDDEN_SIZE)
    partial_sums = random_rows(1, 9, HIDDEN_SIZE)
    weight = torch.randn(HIDDEN_SIZE, device=DEVICE).bfloat16()
    everything = poisoned_outputs(9)
    add_rmsnorm_quantize(residual, partial_sums, weight, everything, EPS)
    normed = torch.full_like(residual, float("nan"))
    add_rmsnorm_quantize(residual, partial_sums, weight, NormOutputs(normed=normed), EPS)
    assert everything.normed is not None
    assert everything.quantized is not None
    assert torch.equal(normed, everything.normed)
    rows = poisoned_rows(9, HIDDEN_SIZE)
    in_place = residual.clone()
    outputs = NormOutputs(in_place, quantized=rows)
    add_rmsnorm_quantize(in_place, partial_sums, weight, outputs, EPS)
    assert torch.equal(in_place, everything.residual)
    assert torch.equal(rows.values.view(torch.uint8), everything.quantized.values.view(torch.uint8))
    assert torch.equal(rows.scales, everything.quantized.scales)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    residual = random_rows(64, HIDDEN_SIZE)
    partial_sums = random_rows(3, 64, HIDDEN_SIZE)
    weight = torch.randn(HIDDEN_SIZE, device=DEVICE).bfloat16()
    together, alone = poisoned_outputs(64), poisoned_outputs(1)
    add_rmsnorm_quantize(residual, partial_sums, weight, together, EPS)
    one = partial_sums[:, 17:18].contiguous()
    add_rmsnorm_quantize(residual[17:18], one, weight, alone, EPS)
    assert together.normed is not None
    assert alone.normed is not None
    assert torch.equal(together.normed[17:18], alone.normed)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_the_latent_query_is_normed_from_a_slice(num_tokens: int) -> None:
    fused = random_rows(num_tokens, QUERY_RANK + 512)
    weight = torch.randn(QUERY_RANK, device=DEVICE).bfloat16()
    rows = poisoned_rows(num_tokens, QUERY_RANK)
    latent = fused[:, :QUERY_RANK]
    rmsnorm_quantize(latent, weight, rows, EPS)
    nothing = torch.empty(0, num_tokens, QUERY_RANK)
    # On the CPU: torch divides by a number on the GPU as if multiplying with its reciprocal.
    _, _, want = reference_add_rmsnorm_quantize(latent.cpu(), nothing, weight.cpu(), EPS)
    # One bf16 step of the largest value moves a scale by 2^-7 of it at most.
    # A quotient one bf16 step off, 2^-7 of it at most, and then the product's half step.
    torch.testing.assert_close(rows.scales.cpu(), want.scales, rtol=2**-7 + 2**-8, atol=0)
    assert float((rows.scales.cpu() != want.scales).float().mean()) < 1e-2
    got = rows.values.float().view(num_tokens, -1, 128) * rows.scales[..., None]
    exact = latent.double()
    exact = exact / (exact.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()
    exact = exact.view(num_tokens, -1, 128)
    # Two roundings to bf16, one to e4m3 (2^-4 of the value, 2^-10 units when subnormal).
    bound = torch.maximum(exact.abs() * (2**-4 + 2**-6), rows.scales[..., None] * 2**-9)
    assert bool(((got - exact).abs() <= bound).all())


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("width", [128, 16384])
def test_groups_are_quantised_exactly_as_the_reference_does(num_tokens: int, width: int) -> None:
    x = random_rows(num_tokens, width)
    x[:, :128] *= 2.0**-30
    x[num_tokens // 2] = 0
    rows = poisoned_rows(num_tokens, width)
    quantize_groups_fp8(x, rows)
    assert_quantised_exactly(rows, x)


def test_every_mantissa_divides_exactly() -> None:
    """All pairs of bf16 mantissas of a value and its group's largest, over 20 binades."""
    largest = torch.arange(128, 256, device=DEVICE) / 128
    values = torch.arange(128, 256, device=DEVICE) / 128
    x = torch.zeros(128, 20, 256, device=DEVICE)
    for binade in range(20):
        x[:, binade, :128] = values * 2.0 ** -(binade + 1)
        x[:, binade, 128:] = -values * 2.0 ** -(binade + 1)
        x[:, binade, [0, 128]] = largest[:, None]
    x = x.view(128, -1).bfloat16()
    rows = poisoned_rows(128, x.shape[1])
    quantize_groups_fp8(x, rows)
    assert_quantised_exactly(rows, x)


def test_extreme_groups() -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.zeros(5, 256, dtype=torch.bfloat16, device=DEVICE)
    x[0, :128] = largest
    x[1, 3] = float("inf")
    x[2, 3] = float("nan")
    x[3, :128] = 2.0**-120
    x[4, 128:] = -largest
    rows = poisoned_rows(5, 256)
    quantize_groups_fp8(x, rows)
    got = rows.values.float().view(5, 2, 128) * rows.scales[..., None]
    torch.testing.assert_close(got[0, 0], x[0, :128].float(), rtol=1e-6, atol=0)
    assert bool(got[1, 0, 3].isnan())
    assert bool(got[2, 0, 3].isnan())
    assert not bool(got[1:3, 0].isfinite().all())
    # Below 2^-100 the scale is that of 2^-100: too small to matter, and finite.
    assert bool((got[3, 0].abs() <= 2.0**-100).all())
    torch.testing.assert_close(got[4, 1], x[4, 128:].float(), rtol=1e-6, atol=0)
    assert bool((rows.scales[[0, 3, 4], [1, 1, 0]] == 1).all())


def test_huge_and_zero_rows_are_normed() -> None:
    residual = torch.zeros(3, HIDDEN_SIZE, dtype=torch.bfloat16, device=DEVICE)
    residual[1] = 1e16
    residual[2] = 1e-20
    weight = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16, device=DEVICE)
    out = poisoned_outputs(3)
    add_rmsnorm_quantize(residual, residual.new_empty(0, 3, HIDDEN_SIZE), weight, out, EPS)
    assert out.normed is not None
    assert out.quantized is not None
    assert bool((out.normed[0] == 0).all())
    assert bool((out.normed[1] == 1).all())
    assert bool((out.quantized.scales[0] == 1).all())
    torch.testing.assert_close(
        out.normed[2].float(),
        torch.full((HIDDEN_SIZE,), 1e-20 / EPS**0.5, device=DEVICE),
        rtol=1e-2,
        atol=0,
    )


def test_arguments_that_do_not_fit_are_refused() -> None:
    residual = random_rows(4, HIDDEN_SIZE)
    weight = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16, device=DEVICE)
    partial_sums = random_rows(1, 3, HIDDEN_SIZE)
    with pytest.raises(ValueError, match="partial_sums"):
        add_rmsnorm_quantize(residual, partial_sums, weight, NormOutputs(), EPS)
    shifted = torch.zeros(4, 2560, dtype=torch.bfloat16, device=DEVICE)[:, 3 : 3 + QUERY_RANK]
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        rmsnorm_quantize(shifted, weight[:QUERY_RANK], poisoned_rows(4, QUERY_RANK), EPS)
    with pytest.raises(ValueError, match="whole groups"):
        quantize_groups_fp8(residual[:, :100].contiguous(), poisoned_rows(4, 128))
    with pytest.raises(ValueError, match="0 tokens"):
        add_rmsnorm_quantize(residual[:0], residual[None, :0], weight, NormOutputs(), EPS)
