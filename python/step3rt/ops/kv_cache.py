"""Byte formats of the paged KV cache, one layer: shapes, and packing of dense K and V for tests.

Never allocates a pool or decides who owns a block; appending tokens is a kernel's work.
"""

import functools

import torch

from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, HEAD_DIM

FP8_BLOCK_BYTES = 2 * BLOCK_SIZE_TOKENS * HEAD_DIM
"""One FP8 block: K and V of 64 tokens. The layout is kernels/attention/fp8_kv_block.cuh."""


def bf16_cache_shape(num_blocks: int) -> tuple[int, ...]:
    """Shape of a BF16 cache, bf16[B, 2, 64, 256]: K then V of each block."""
    return num_blocks, 2, BLOCK_SIZE_TOKENS, HEAD_DIM


def fp8_cache_shape(num_blocks: int) -> tuple[int, ...]:
    """Shape of an FP8 cache, u8[B, 32768]: opaque bytes."""
    return num_blocks, FP8_BLOCK_BYTES


@functools.cache
def fp8_block_offsets(device: torch.device) -> torch.Tensor:
    """Returns i64[2, 64, 256]: where the byte of (K or V, token, dim) lies in a block."""
    token = torch.arange(BLOCK_SIZE_TOKENS, device=device)[:, None]
    dim = torch.arange(HEAD_DIM, device=device)[None, :]

    key_chunk = (dim % 128 // 16) ^ (token % 8)
    keys = dim // 128 * (BLOCK_SIZE_TOKENS * 128) + token * 128 + key_chunk * 16 + dim % 16

    in_group = token % 32
    column_group = in_group // 8
    position = (
        token // 32 * 32
        + column_group // 2 * 16
        + in_group % 8 // 2 * 4
        + column_group % 2 * 2
        + in_group % 2
    )
    value_chunk = (position // 16) ^ (dim // 2 % 4)
    values = dim * BLOCK_SIZE_TOKENS + value_chunk * 16 + position % 16
    return torch.stack([keys, values + FP8_BLOCK_BYTES // 2])


def pack_fp8_blocks(dense: torch.Tensor) -> torch.Tensor:
    """Packs e4m3[B, 2, 64, 256] (K then V, token-major) into u8[B, 32768]."""
    offsets = fp8_block_offsets(dense.device).flatten()
    packed = torch.empty(fp8_cache_shape(dense.shape[0]), dtype=torch.uint8, device=dense.device)
    packed[:, offsets] = dense.view(torch.uint8).reshape(dense.shape[0], -1)
    return packed


def unpack_fp8_blocks(packed: torch.Tensor) -> torch.Tensor:
    """Unpacks u8[B, 32768] into e4m3[B, 2, 64, 256]; the inverse of `pack_fp8_blocks`."""
    offsets = fp8_block_offsets(packed.device).flatten()
    dense = packed[:, offsets].reshape(-1, 2, BLOCK_SIZE_TOKENS, HEAD_DIM)
    return dense.contiguous().view(torch.float8_e4m3fn)
