"""What norms, quantisation, linear layers and the router compute on the CPU, against float64."""

import pytest
import torch

from step3rt.ops.linear import linear_bf16
from step3rt.ops.linear_fp8 import linear_fp8
from step3rt.ops.quantize import dequantize_blocks, quantize_groups, widen
from step3rt.ops.quantize_groups import quantize_groups_fp8
from step3rt.ops.rmsnorm_quantize import (
    HIDDEN_SIZE,
    QUERY_RANK,
    NormOutputs,
    QuantizedRows,
    add_rmsnorm_quantize,
    rmsnorm_quantize,
)
from step3rt.ops.router_topk import MAX_EXPERTS, TOP_K, route_topk

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
EPS = 1e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(13)


def poisoned_rows(num_tokens: int, width: int) -> QuantizedRows:
    rows = QuantizedRows.empty(num_tokens, width, CPU)
    rows.values.view(torch.uint8).fill_(0x7F)
    rows.scales.fill_(float("nan"))
    return rows


def random_rows(*shape: int) -> torch.Tensor:
    """Rows of different magnitude, with a few large values, as activations have."""
    rows = torch.randn(shape) * torch.logspace(-3, 2, shape[-2])[:, None]
    rows.view(-1)[:: 7 * 128 + 5] *= 50
    return rows.bfloat16()


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_quantised(rows: QuantizedRows, x: torch.Tensor) -> None:
    """Scales are amax / 448; each value is within half a step of e4m3 of its own."""
    groups = x.double().view(x.shape[0], -1, 128)
    amax = groups.abs().amax(-1)
    want = torch.where(amax == 0, 1.0, amax / 448)
    torch.testing.assert_close(rows.scales.double(), want, rtol=2**-22, atol=0)
    got = rows.values.double().view(groups.shape) * rows.scales[..., None].double()
    bound = torch.maximum(groups.abs() * 2**-4, want[..., None] * 2**-10) * (1 + 1e-5)
    assert bool(((got - groups).abs() <= bound).all())


@pytest.mark.parametrize("num_partial_sums", [0, 1, 3])
def test_partial_sums_are_added_normed_and_quantised(num_partial_sums: int) -> None:
    residual = random_rows(5, HIDDEN_SIZE)
    partial_sums = random_rows(num_partial_sums, 5, HIDDEN_SIZE)
    weight = torch.randn(HIDDEN_SIZE).bfloat16()
    normed, rows = torch.full_like(residual, float("nan")), poisoned_rows(5, HIDDEN_SIZE)
    total = partial_sums.double().sum(dim=0).bfloat16()
    added = (residual.double() + total.double()).bfloat16()
    sums = residual.clone()
    # The sum may take the residual's place.
    add_rmsnorm_quantize(sums, partial_sums, weight, NormOutputs(sums, normed, rows), EPS)
    steps = (sums.view(torch.int16).int() - added.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1  # fp32 sums of three: seldom another rounding
    assert float((steps > 0).float().mean()) < 1e-3
    want = exact_norm(sums, weight)
    assert bool(((normed.double() - want).abs() <= want.abs() * (2**-7 + 1e-4) + 1e-30).all())
    assert_quantised(rows, normed)


def test_outputs_that_are_not_wanted_are_left_out() -> None:
    residual, weight = random_rows(3, HIDDEN_SIZE), torch.ones(HIDDEN_SIZE).bfloat16()
    before, normed = residual.clone(), torch.empty_like(residual)
    nothing = torch.empty(0, 3, HIDDEN_SIZE, dtype=torch.bfloat16)
    add_rmsnorm_quantize(residual, nothing, weight, NormOutputs(normed=normed), EPS)
    assert torch.equal(residual, before)
    with pytest.raises(ValueError, match="0 tokens"):
        add_rmsnorm_quantize(residual[:0], nothing[:, :0], weight, NormOutputs(), EPS)


def test_the_latent_query_is_normed_from_a_slice() -> None:
    fused = random_rows(5, QUERY_RANK + 512)
    weight = torch.randn(QUERY_RANK).bfloat16()
    rows = poisoned_rows(5, QUERY_RANK)
    rmsnorm_quantize(fused[:, :QUERY_RANK], weight, rows, EPS)
    want = exact_norm(fused[:, :QUERY_RANK], weight).view(5, -1, 128)
    got = rows.values.double().view(want.shape) * rows.scales[..., None].double()
    # Two roundings to bf16, one to e4m3.
    bound = torch.maximum(want.abs() * (2**-4 + 2**-6), rows.scales[..., None].double() * 2**-9)
    assert bool(((got - want).abs() <= bound).all())
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        rmsnorm_quantize(fused[:, 3 : 3 + QUERY_RANK], weight, rows, EPS)


@pytest.mark.parametrize("width", [128, 1024])
def test_groups_are_quantised(width: int) -> None:
    x = random_rows(17, width)
    x[8] = 0
    rows = poisoned_rows(17, width)
    quantize_groups_fp8(x, rows)
    assert_quantised(rows, x)
    with pytest.raises(ValueError, match="whole groups"):
        quantize_groups_fp8(x[:, :100].contiguous(), rows)


def test_every_e4m3_code_is_widened_to_its_number() -> None:
    """Sign, four bits of exponent with bias 7, three of mantissa; 0x7f and 0xff are no numbers."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    for dtype in (torch.float32, torch.float64):
        numbers = widen(codes.view(torch.float8_e4m3fn), dtype)
        assert numbers.dtype == dtype
        for code, number in enumerate(numbers.flatten().tolist()):
            exponent, mantissa = code >> 3 & 15, code & 7
            size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
            if code & 0x7F == 0x7F:
                assert number != number
            else:
                assert number == (-size if code & 0x80 else size)


def test_whole_and_ragged_scale_blocks_are_dequantised_alike() -> None:
    values = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    whole = torch.zeros(256, 384).to(torch.float8_e4m3fn)
    whole.view(torch.uint8)[:200, :300] = values.view(torch.uint8)
    ragged = dequantize_blocks(values, scales, (128, 128), torch.float32)
    want = dequantize_blocks(whole, scales, (128, 128), torch.float32)
    assert torch.equal(ragged, want[:200, :300])
    assert float(ragged[150, 290]) == float(values[150, 290].float() * scales[1, 2])


def test_fp8_products_are_those_of_the_dequantised_operands() -> None:
    x, x_scale = quantize_groups(torch.randn(7, 384))
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(2, 3) + 0.5
    out = torch.full((7, 256), float("nan"), dtype=torch.bfloat16)
    linear_fp8(x, x_scale, weight, weight_scale, out)
    want = torch.zeros(7, 256, dtype=torch.float64)
    for n in range(2):
        for k in range(3):
            rows, columns = slice(128 * n, 128 * n + 128), slice(128 * k, 128 * k + 128)
            product = x[:, columns].double() @ weight[rows, columns].double().T
            want[:, rows] += product * x_scale[:, k, None].double() * weight_scale[n, k].double()
    assert float((out.double() - want).norm() / want.norm()) < 2e-3
    alone = torch.empty(1, 256, dtype=torch.bfloat16)
    linear_fp8(x[3:4], x_scale[3:4], weight, weight_scale, alone)
    assert torch.equal(alone[0], out[3])
    with pytest.raises(ValueError, match="0 tokens with a weight of 256x384"):
        linear_fp8(x[:0], x_scale[:0], weight, weight_scale, out[:0])


def test_bf16_products_are_rounded_once_and_do_not_depend_on_batch_mates() -> None:
    x, weight = torch.randn(64, 384).bfloat16(), torch.randn(256, 384).bfloat16()
    out = linear_bf16(x, weight)
    want = x.double() @ weight.double().T
    assert torch.equal(out, want.bfloat16())
    given = torch.empty_like(out)
    assert linear_bf16(x, weight, given) is given
    assert torch.equal(given, out)
    for row in range(0, 64, 9):
        assert torch.equal(linear_bf16(x[row : row + 1], weight)[0], out[row])


@pytest.mark.parametrize("is_normalised", [False, True])
def test_the_router_takes_the_best_experts_of_its_rounded_logits(is_normalised: bool) -> None:
    hidden = torch.randn(9, HIDDEN_SIZE).bfloat16()
    gate = (torch.randn(MAX_EXPERTS, HIDDEN_SIZE) * 3 / HIDDEN_SIZE**0.5).bfloat16()
    gate[20] = gate[45]  # of equals the lower id
    ids = torch.full((9, TOP_K), -7, dtype=torch.int32)
    weights = torch.full((9, TOP_K), float("nan"))
    logits = torch.full((9, MAX_EXPERTS), float("nan"), dtype=torch.bfloat16)
    route_topk(hidden, gate, (ids, weights), is_normalised=is_normalised, logits=logits)
    assert torch.equal(logits, (hidden.double() @ gate.double().T).bfloat16())
    for row in range(9):
        exact = logits[row].double().exp()
        exact /= exact.sum()
        order = sorted(range(MAX_EXPERTS), key=lambda e: (-float(exact[e]), e))[:TOP_K]
        assert ids[row].tolist() == order
        want = exact[order] / exact[order].sum() if is_normalised else exact[order]
        torch.testing.assert_close(weights[row].double(), want, rtol=1e-5, atol=0)


def test_a_corrupt_row_gets_nan_weights_and_spoils_no_other() -> None:
    hidden = torch.randn(4, HIDDEN_SIZE).bfloat16()
    gate = torch.randn(MAX_EXPERTS, HIDDEN_SIZE).bfloat16()
    hidden[2, 5000] = float("nan")
    ids, weights = torch.empty(4, TOP_K, dtype=torch.int32), torch.empty(4, TOP_K)
    route_topk(hidden, gate, (ids, weights), is_normalised=False)
    assert bool(weights[2].isnan().all())
    assert bool(((ids >= 0) & (ids < MAX_EXPERTS)).all())
    assert bool(weights[[0, 1, 3]].isfinite().all())
    with pytest.raises(ValueError, match="gate"):
        route_topk(hidden, gate[:2], (ids, weights), is_normalised=False)
