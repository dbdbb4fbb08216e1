"""Rotary embedding of queries and keys, fused with the append of K and V to the paged cache.

Launches the kernels of kernels/fused, on the CPU their references; decides no slots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_block_offsets, fp8_cache_shape
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, HEAD_DIM
from step3rt.ops.quantize import E4M3_MAX, to_e4m3
from step3rt.ops.rotary import rotate

_BF16_KERNEL = launch.Kernel("fused/sm90_bf16_rope_append.cu", num_threads=256, is_dependent=True)
_FP8_KERNEL = launch.Kernel("fused/sm90_fp8_rope_append.cu", num_threads=256, is_dependent=True)
_HEADS_PER_CTA = 32
_SMALLEST_AMAX = 1e-12  # of the FP8 kernel: a head of zeros still gets a positive scale

# struct RopeParams of kernels/fused/rope.cuh.
_PARAMS_DTYPE = np.dtype(
    [
        ("q", np.uint64),
        ("kv", np.uint64),
        ("positions", np.uint64),
        ("slots", np.uint64),
        ("cos_sin", np.uint64),
        ("num_heads", np.int32),
        ("kv_stride", np.int32),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class RopeTokens:
    """T tokens on the device, of any sequences.

    `q` bf16[T, N, 256], contiguous. `kv` bf16[T, 512], K then V; rows may be further apart, as in
    a slice of the fused projection. `positions` i32[T]: rows of the rotation table. `slots` i32[T]:
    KV block * 64 + offset in the block, or -1 for a token that is not appended. The last two must
    be older than the previous kernel of the stream: they are read before it ends.
    """

    q: torch.Tensor
    kv: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


def rotation_table(num_positions: int, theta: float, device: torch.device) -> torch.Tensor:
    """Returns f32[num_positions, 256]: cosines, then sines, of the 128 angles of a position."""
    exponents = torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=device) / (HEAD_DIM // 2)
    positions = torch.arange(num_positions, dtype=torch.float64, device=device)
    angles = positions[:, None] * theta**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rope_append_bf16(
    tokens: RopeTokens, table: torch.Tensor, q_out: torch.Tensor, kv_cache: torch.Tensor
) -> None:
    """Rotates q and K; writes q to `q_out`, K and V to their slots.

    Args:
        tokens: The tokens.
        table: f32[P, 256], from `rotation_table`; P above every position.
        q_out: bf16[T, N, 256], contiguous; may be `tokens.q`.
        kv_cache: bf16[B, 2, 64, 256], contiguous.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    params = _checked_params(tokens, table)
    device = tokens.q.device
    launch.check_tensor("q_out", q_out, tokens.q.shape, torch.bfloat16, device)
    launch.check_tensor("kv_cache", kv_cache, bf16_cache_shape(-1), torch.bfloat16, device)
    if device.type == "cpu":
        q, k, v = _rotate_on_cpu(tokens, table)
        q_out.copy_(q)
        appended, blocks, offsets = _slots_on_cpu(tokens)
        kv_cache[blocks, 0, offsets] = k[appended].bfloat16()
        kv_cache[blocks, 1, offsets] = v[appended].bfloat16()
        return
    arguments = (params, launch.pointer(q_out), launch.pointer(kv_cache))
    _BF16_KERNEL.launch(device, _num_ctas(tokens), arguments)


def rope_append_fp8(
    tokens: RopeTokens,
    table: torch.Tensor,
    q_out: tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Rotates and quantises q and K; writes q and its scales to `q_out`, K and V to their slots.

    Args:
        tokens: The tokens.
        table: f32[P, 256], from `rotation_table`; P above every position.
        q_out: e4m3[T, N, 256] and f32[T, N]: the query is their product.
        kv_cache: u8[B, 32768].
        kv_scale: What one unit of the cached K and V is worth; values beyond 448 units saturate.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or a scale is not positive.
    """
    params = _checked_params(tokens, table)
    device = tokens.q.device
    values, scales = q_out
    launch.check_tensor("q_out[0]", values, tokens.q.shape, torch.float8_e4m3fn, device)
    launch.check_tensor("q_out[1]", scales, tokens.q.shape[:2], torch.float32, device)
    launch.check_tensor("kv_cache", kv_cache, fp8_cache_shape(-1), torch.uint8, device)
    k_scale, v_scale = kv_scale
    if not (k_scale > 0 and v_scale > 0):
        raise ValueError(f"kv_scale is {kv_scale}. A scale is positive. Recalibrate the layer.")
    if device.type == "cpu":
        q, k, v = _rotate_on_cpu(tokens, table)
        amax = q.abs().amax(dim=-1).clamp(min=_SMALLEST_AMAX)
        values.copy_(to_e4m3(q * (E4M3_MAX / amax)[..., None]))
        scales.copy_(amax * (1 / E4M3_MAX))
        appended, blocks, offsets = _slots_on_cpu(tokens)
        places = fp8_block_offsets(device)[:, offsets]  # [2, appended, 256]
        for half, (row, scale) in enumerate(((k, k_scale), (v, v_scale))):
            quantized = to_e4m3(row[appended] * (1 / scale))
            kv_cache[blocks[:, None], places[half]] = quantized.view(torch.uint8)
        return
    arguments = (
        params,
        launch.pointer(values),
        launch.pointer(scales),
        launch.pointer(kv_cache),
        np.float32(1 / k_scale),
        np.float32(1 / v_scale),
    )
    _FP8_KERNEL.launch(device, _num_ctas(tokens), arguments)


def reference_rope(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Returns f64[T, ..., 256]: x float[T, ..., 256] rotated; dim j turns with dim j + 128."""
    half = HEAD_DIM // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angles = positions.double()[:, None] * theta**-exponents
    angles = angles.reshape(len(positions), *[1] * (x.dim() - 2), half)
    low, high = x[..., :half].double(), x[..., half:].double()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _rotate_on_cpu(
    tokens: RopeTokens, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q f32[T, N, 256] and K f32[T, 256], both rotated in fp32, and V f32[T, 256]."""
    cos, sin = table[tokens.positions.long()].chunk(2, dim=1)
    k, v = tokens.kv.float().chunk(2, dim=1)
    return rotate(tokens.q.float(), cos, sin), rotate(k[:, None], cos, sin)[:, 0], v


def _slots_on_cpu(tokens: RopeTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the tokens that are appended, and the block and the offset of each, all i64."""
    appended = (tokens.slots >= 0).nonzero().flatten()
    slots = tokens.slots[appended].long()
    return appended, slots // BLOCK_SIZE_TOKENS, slots % BLOCK_SIZE_TOKENS


def _num_ctas(tokens: RopeTokens) -> int:
    num_tokens, num_heads, _ = tokens.q.shape
    return num_tokens * -(-num_heads // _HEADS_PER_CTA)


def _checked_params(tokens: RopeTokens, table: torch.Tensor) -> Any:
    device = tokens.q.device
    launch.check_tensor("q", tokens.q, (-1, -1, HEAD_DIM), torch.bfloat16, device)
    num_tokens, num_heads, _ = tokens.q.shape
    if num_tokens == 0 or num_heads == 0:
        raise ValueError(
            f"`q` has {num_tokens} tokens of {num_heads} heads. A launch needs one of each. Skip "
            "it for an empty batch."
        )
    launch.check_tensor("positions", tokens.positions, (num_tokens,), torch.int32, device)
    launch.check_tensor("slots", tokens.slots, (num_tokens,), torch.int32, device)
    launch.check_tensor("table", table, (-1, HEAD_DIM), torch.float32, device)
    kv = tokens.kv
    # One row checks dtype and device; the distance of the rows is free.
    launch.check_tensor("kv[:1]", kv[:1], (1, 2 * HEAD_DIM), torch.bfloat16, device)
    if kv.shape[0] != num_tokens or kv.stride(0) % 8 or kv.data_ptr() % 16:
        raise ValueError(
            f"`kv` has {kv.shape[0]} rows {kv.stride(0)} elements apart at {kv.data_ptr():#x}, the "
            f"kernel takes {num_tokens} rows aligned to 16 bytes. Slice the projection's output at "
            "a multiple of 8 columns."
        )
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    params["q"] = tokens.q.data_ptr()
    params["kv"] = kv.data_ptr()
    params["positions"] = tokens.positions.data_ptr()
    params["slots"] = tokens.slots.data_ptr()
    params["cos_sin"] = table.data_ptr()
    params["num_heads"] = num_heads
    params["kv_stride"] = kv.stride(0)
    return params
