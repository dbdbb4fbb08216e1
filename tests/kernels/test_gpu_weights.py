"""Layouts of the GPU's weights, checked on the CPU."""

import pytest
import torch

from step3rt.model.gpu_weights import (
    Fp8Matrix,
    dequantize,
    quantize_blocks,
    spread_columns,
    spread_rows,
)

HEADS, NARROW = 3, 128


def spread_places(num_heads: int) -> torch.Tensor:
    """Where each dim of a narrow head lies among the wide ones."""
    dim = torch.arange(NARROW)
    place = dim % 64 + dim // 64 * 128
    return (torch.arange(num_heads)[:, None] * 256 + place).flatten()


def test_blocks_of_a_weight_are_quantised_to_within_half_a_step() -> None:
    weight = torch.randn(256, 384) * torch.logspace(-6, 3, 384)
    weight[:128, :128] = 0
    matrix = quantize_blocks(weight)
    blocks = weight.view(2, 128, 3, 128).abs().amax(dim=(1, 3))
    step = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1) / 448
    error = (matrix.values.float() * (step + (step == 0)) - weight).abs()
    assert bool((error <= weight.abs() / 16 + step / 2**9).all())
    assert torch.equal(matrix.values[:128, :128].float(), torch.zeros(128, 128))
    assert bool((matrix.scales > 0).all())


@pytest.mark.parametrize("is_row", [True, False])
def test_narrow_heads_spread_out_keep_their_values_and_pair_distance(is_row: bool) -> None:
    weight = torch.randn(HEADS * NARROW, 256)
    matrix = quantize_blocks(weight if is_row else weight.T.contiguous())
    wide = spread_rows(matrix, NARROW) if is_row else spread_columns(matrix, NARROW)
    got, want = dequantize(wide), dequantize(matrix)
    if not is_row:
        got, want = got.T, want.T
    assert got.shape == (HEADS * 256, 256)
    places = spread_places(HEADS)
    assert torch.equal(got[places], want)
    unused = torch.ones(HEADS * 256, dtype=torch.bool)
    unused[places] = False
    assert bool((got[unused] == 0).all())
    assert int(places[64] - places[0]) == 128


def test_wide_heads_stay_as_they_are() -> None:
    matrix = Fp8Matrix(torch.zeros(256, 128).to(torch.float8_e4m3fn), torch.ones(2, 1))
    assert spread_rows(matrix, 256) is matrix
    assert spread_columns(matrix, 256) is matrix
