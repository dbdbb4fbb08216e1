from pathlib import Path

import pytest
import torch

from step3rt.ops.compile import CompileError, compile_kernel, kernels_dir
from step3rt.ops.linear_fp8 import linear_fp8, reference_linear_fp8
from step3rt.ops.linear_fp8_choice import CHOICES, FALLBACK, choose_variant
from step3rt.ops.linear_fp8_variant import LinearVariant
from step3rt.ops.quantize import quantize_groups

DEVICE = torch.device("cuda", 0)
SHAPES = {"qkv": (2560, 7168), "wq": (16384, 2048), "o_proj": (7168, 16384)}
TOKENS = [1, 63, 64, 65, 127, 128, 129, 256, 1000, 2048]
VARIANTS = sorted(
    {variant for rows in CHOICES.values() for _, variant in rows} | {FALLBACK}, key=str
)
SHARED_BYTES_OF_SM = 228 * 1024
SHARED_BYTES_OF_SYSTEM = 1024  # of every CTA

# Rounding to BF16 alone is 2^-9 / sqrt(3) = 1.1e-3 of the norm at most, for values spread evenly.
RELATIVE_BOUND = 2e-3

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.options).replace("-D", ""))
def test_every_chosen_variant_compiles_without_spills(
    variant: LinearVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEP3RT_CACHE_DIR", str(tmp_path))
    source = kernels_dir() / "gemm" / "sm90_fp8_linear.cu"
    report = compile_kernel(source, variant.options).report
    assert (report.stack_bytes, report.spill_store_bytes, report.spill_load_bytes) == (0, 0, 0)
    assert not report.is_wgmma_serialized
    room = variant.ctas_per_sm * (variant.shared_bytes + SHARED_BYTES_OF_SYSTEM)
    assert room <= SHARED_BYTES_OF_SM


def test_a_ring_in_which_a_scale_warp_could_be_a_phase_ahead_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEP3RT_CACHE_DIR", str(tmp_path))
    variant = LinearVariant(128, 128, split=1, cast=1, stages=2)
    with pytest.raises(CompileError, match="a scale warp may be a phase ahead"):
        compile_kernel(kernels_dir() / "gemm" / "sm90_fp8_linear.cu", variant.options)


def test_the_choice_covers_its_shapes_and_rises_with_the_tokens() -> None:
    assert set(CHOICES) == set(SHAPES.values())
    for (num_outputs, num_inputs), rows in CHOICES.items():
        limits = [max_tokens for max_tokens, _ in rows]
        assert limits == sorted(set(limits))
        for max_tokens, variant in rows:
            assert variant.fits(num_outputs, num_inputs)
            assert choose_variant(max_tokens, num_outputs, num_inputs) == variant
        assert choose_variant(10**6, num_outputs, num_inputs) == rows[-1][1]
    assert choose_variant(7, 128, 128) == FALLBACK


def test_the_reference_is_the_product_of_the_dequantised_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_scale = quantize_groups(torch.randn(3, 256, generator=generator))
    weight = torch.randn(128, 256, generator=generator).to(torch.float8_e4m3fn)
    weight_scale = torch.tensor([[0.5, 3.0]])
    want = torch.zeros(3, 128, dtype=torch.float64)
    for block in range(2):
        columns = slice(128 * block, 128 * block + 128)
        rows = x[:, columns].double() * x_scale[:, block : block + 1].double()
        want += rows @ weight[:, columns].double().T * float(weight_scale[0, block])
    got = reference_linear_fp8(x, x_scale, weight, weight_scale)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def make_operands(num_tokens: int, num_outputs: int, num_inputs: int, seed: int = 0) -> Operands:
    """Scales of activations and weights vary by an order of magnitude from block to block."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    x = torch.randn(num_tokens, num_inputs, device=DEVICE, generator=generator)
    groups = torch.rand(num_tokens, num_inputs // 128, device=DEVICE, generator=generator) + 0.1
    values, x_scale = quantize_groups(x * groups.repeat_interleave(128, dim=1))
    weight = torch.randn(num_outputs, num_inputs, device=DEVICE, generator=generator) * 100
    shape = (num_outputs // 128, num_inputs // 128)
    weight_scale = torch.rand(shape, device=DEVICE, generator=generator) * 1e-3 + 1e-4
    return values, x_scale, weight.clamp(-448, 448).to(torch.float8_e4m3fn), weight_scale


def run(operands: Operands, variant: LinearVariant | None = None) -> torch.Tensor:
    """The product; fails if a row behind the output was written."""
    num_tokens, num_outputs = operands[0].shape[0], operands[2].shape[0]
    rows = torch.full(
        (num_tokens + 1, num_outputs), float("nan"), dtype=torch.bfloat16, device=DEVICE
    )
    linear_fp8(*operands, rows[:num_tokens], variant)
    assert bool(rows[num_tokens].isnan().all())
    return rows[:num_tokens]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error over the norm; NaN, as of an element that was not written, never passes a bound."""
    return float((got.double() - want).norm() / want.norm())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_product_agrees_with_float64(shape: tuple[int, int], num_tokens: int) -> None:
    operands = make_operands(num_tokens, *shape)
    assert relative_error(run(operands), reference_linear_fp8(*operands)) < RELATIVE_BOUND


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.options).replace("-D", ""))
def test_every_variant_is_exact_on_small_integers(variant: LinearVariant) -> None:
    """Sums of integers below 2^8 survive every rounding, so each misplaced element shows."""
    for num_outputs, num_inputs in SHAPES.values():
        if not variant.fits(num_outputs, num_inputs):
            continue
        for num_tokens in (1, 65, 300):
            generator = torch.Generator(device=DEVICE).manual_seed(num_tokens)
            x = torch.zeros(num_tokens, num_inputs, device=DEVICE)
            # Three values in each row: products stay exact in the output's eight bits.
            places = torch.randint(
                0, num_inputs, (num_tokens, 3), device=DEVICE, generator=generator
            )
            x.scatter_(1, places, 1.0)
            weight = torch.randint(
                -8, 9, (num_outputs, num_inputs), device=DEVICE, generator=generator
            )
            blocks = (num_outputs // 128, num_inputs // 128)
            scale = 2.0 ** torch.randint(0, 2, blocks, device=DEVICE, generator=generator)
            row_scale = 2.0 ** torch.randint(
                -3, 4, (num_tokens, 1), device=DEVICE, generator=generator
            )
            operands = (
                x.to(torch.float8_e4m3fn),
                row_scale.expand(num_tokens, num_inputs // 128).contiguous(),
                weight.float().to(torch.float8_e4m3fn),
                scale,
            )
            want = reference_linear_fp8(*operands)
            assert torch.equal(run(operands, variant).double(), want)


@needs_gpu
@pytest.mark.gpu
def test_nan_in_one_row_stays_in_that_row() -> None:
    operands = make_operands(130, *SHAPES["qkv"])
    operands[1][77, 3] = float("nan")
    out = run(operands)
    assert bool(out[77].isnan().all())
    out[77] = 0
    assert not bool(out.isnan().any())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_launch_repeats_itself_bit_for_bit(shape: tuple[int, int]) -> None:
    for num_tokens in (1, 128, 256, 700):
        operands = make_operands(num_tokens, *shape)
        first = run(operands)
        for _ in range(10):
            assert torch.equal(run(operands), first)


@needs_gpu
@pytest.mark.gpu
def test_dependent_launches_in_a_graph_see_each_others_rows() -> None:
    """Each launch reads what the one before wrote, while its weights are already on their way."""
    shape = SHAPES["o_proj"]
    x, x_scale, weight, weight_scale = make_operands(128, *shape)
    names = torch.empty(8, 128, shape[0], dtype=torch.bfloat16, device=DEVICE)
    scales = torch.empty(8, *x_scale.shape, device=DEVICE)
    for index in range(8):
        scales[index] = x_scale * 2.0**index
    live = torch.empty_like(x_scale)
    linear_fp8(x, x_scale, weight, weight_scale, names[0])  # loads the kernel: not capturable
    want = names[0].double()
    names.fill_(float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(8):
            live.copy_(scales[index])
            linear_fp8(x, live, weight, weight_scale, names[index])
    for _ in range(5):
        names.fill_(float("nan"))
        graph.replay()
        for index in range(8):
            assert torch.equal(names[index].double(), want * 2.0**index)


@needs_gpu
@pytest.mark.gpu
def test_arguments_that_do_not_fit_are_refused() -> None:
    x, x_scale, weight, weight_scale = make_operands(4, 256, 256)
    out = torch.empty(4, 256, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match=r"`x_scale` has shape \[4, 1\]"):
        linear_fp8(x, x_scale[:, :1].contiguous(), weight, weight_scale, out)
    with pytest.raises(ValueError, match=r"`weight` is torch.uint8"):
        linear_fp8(x, x_scale, weight.view(torch.uint8), weight_scale, out)
    with pytest.raises(ValueError, match="takes a contiguous tensor"):
        linear_fp8(x, x_scale.T.contiguous().T, weight, weight_scale, out)
    with pytest.raises(ValueError, match=r"`out` is on cpu"):
        linear_fp8(x, x_scale, weight, weight_scale, out.cpu())
    with pytest.raises(ValueError, match="0 tokens with a weight of 256x256"):
        linear_fp8(x[:0], x_scale[:0], weight, weight_scale, out[:0])
    variant = LinearVariant(128, 112, split=2, cast=2, stages=6)
    with pytest.raises(ValueError, match="does not cover a weight of 256x256"):
        linear_fp8(x, x_scale, weight, weight_scale, out, variant)
