"""FP8 linear layer at decode sizes: e4m3 rows times an e4m3 weight, both block-scaled.

Launches kernels/gemm/sm90_fp8_linear, on the CPU its reference; quantises nothing and keeps no
state between launches.
"""

import functools
from typing import Any

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.linear_fp8_choice import choose_variant
from step3rt.ops.linear_fp8_variant import LinearVariant
from step3rt.ops.quantize import GROUP_SIZE, dequantize_blocks, dequantize_groups, num_groups
from step3rt.ops.tensor_map import TileView, encode_tensor_map

BLOCK_SIZE = (128, 128)
"""Outputs and inputs that share one weight scale."""

# struct LinearParams of the kernel.
_PARAMS_DTYPE = np.dtype(
    [
        ("x_scale", np.uint64),
        ("w_scale", np.uint64),
        ("out", np.uint64),
        ("num_tokens", np.int32),
        ("num_outputs", np.int32),
        ("num_blocks", np.int32),
        ("num_tiles_m", np.int32),
    ],
    align=True,
)


def linear_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out: torch.Tensor,
    variant: LinearVariant | None = None,
) -> None:
    """Writes x weight^T to `out`.

    The previous kernel of the stream may write x, x_scale and read `out`; the weight and its scales
    have to be older.

    Args:
        x: e4m3[T, K], contiguous; T >= 1, K a multiple of 128.
        x_scale: f32[T, K/128], contiguous: one scale per 128 values of a row.
        weight: e4m3[N, K], contiguous; N a multiple of 128.
        weight_scale: f32[N/128, K/128], contiguous: one scale per block of 128 x 128.
        out: bf16[T, N], contiguous.
        variant: For measurements; chosen by shape if None.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    device = x.device
    launch.check_tensor("x", x, (-1, -1), torch.float8_e4m3fn, device)
    num_tokens, num_inputs = x.shape
    launch.check_tensor("weight", weight, (-1, num_inputs), torch.float8_e4m3fn, device)
    num_outputs = weight.shape[0]
    if num_tokens == 0 or num_outputs % BLOCK_SIZE[0] or num_inputs % BLOCK_SIZE[1]:
        raise ValueError(
            f"A product of {num_tokens} tokens with a weight of {num_outputs}x{num_inputs} does "
            "not fit. The kernel takes one token or more and whole 128x128 blocks. Pad the weight."
        )
    num_blocks = num_groups(num_inputs)
    scale_shape = (num_outputs // BLOCK_SIZE[0], num_blocks)
    launch.check_tensor("x_scale", x_scale, (num_tokens, num_blocks), torch.float32, device)
    launch.check_tensor("weight_scale", weight_scale, scale_shape, torch.float32, device)
    launch.check_tensor("out", out, (num_tokens, num_outputs), torch.bfloat16, device)
    if variant is None:
        variant = choose_variant(num_tokens, num_outputs, num_inputs)
    if not variant.fits(num_outputs, num_inputs):
        raise ValueError(
            f"{variant} does not cover a weight of {num_outputs}x{num_inputs} with whole clusters. "
            "Pass None to have one chosen."
        )
    if device.type == "cpu":
        out.copy_(reference_linear_fp8(x, x_scale, weight, weight_scale))
        return
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    params["x_scale"] = x_scale.data_ptr()
    params["w_scale"] = weight_scale.data_ptr()
    params["out"] = out.data_ptr()
    params["num_tokens"] = num_tokens
    params["num_outputs"] = num_outputs
    params["num_blocks"] = num_blocks
    params["num_tiles_m"] = variant.num_tiles_m(num_tokens)
    arguments = (
        _row_map(x, variant.tile_m // variant.cast),
        _row_map(weight, variant.tile_n // variant.share),
        params,
    )
    _kernel(variant).launch(device, variant.num_ctas(num_tokens, num_outputs), arguments)


@functools.cache
def _kernel(variant: LinearVariant) -> launch.Kernel:
    return launch.Kernel(
        "gemm/sm90_fp8_linear.cu",
        num_threads=variant.num_threads,
        shared_bytes=variant.shared_bytes,
        is_dependent=True,
        options=variant.options,
    )


def _row_map(matrix: torch.Tensor, box_rows: int) -> Any:
    """Boxes of rows x 128 bytes in the 128-byte swizzle; rows past the end arrive as zero."""
    num_rows, row_bytes = matrix.shape
    view = TileView(
        sizes=(row_bytes, num_rows),
        strides_bytes=(row_bytes,),
        box=(GROUP_SIZE, box_rows),
        swizzle_bytes=128,
    )
    return encode_tensor_map(matrix, view)


def reference_linear_fp8(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Returns f64[T, N], the product of the dequantised operands in float64."""
    rows = dequantize_groups(x, x_scale, torch.float64)
    matrix = dequantize_blocks(weight, weight_scale, BLOCK_SIZE, torch.float64)
    return rows @ matrix.T
