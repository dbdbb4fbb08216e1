"""FP8 weights in blocks: each 128 x 128 block of a matrix is e4m3 with one float32 scale.

Never decides which tensors are quantised. The stored factor multiplies: weight = fp8 * scale_inv.
"""

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises [..., R, C] to (float8_e4m3fn[..., R, C], float32[..., R/128, C/128]).

    Raises ValueError if R or C is no multiple of 128.
    """
    *_, rows, columns = weight.shape
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(
            f"Matrix of {rows} x {columns} has ragged blocks. FP8 blocks are {BLOCK} x {BLOCK}. "
            f"Choose sizes that are multiples of {BLOCK}"
        )
    blocks = weight.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale_inv = (
        blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        / E4M3_MAX
    )
    quantised = (blocks / scale_inv).to(torch.float8_e4m3fn)
    return quantised.reshape(weight.shape), scale_inv.squeeze((-3, -1))


def dequantise(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """Returns float32 of the shape of `weight`; the inverse of `quantise` up to rounding."""
    scale = scale_inv.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
    return weight.float() * scale
