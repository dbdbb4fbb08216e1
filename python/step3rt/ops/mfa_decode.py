"""MFA decode attention: one query token per sequence against the paged KV cache of one layer.

Launches the BF16 and FP8 kernels of kernels/attention, on the CPU their references; never appends
to the cache. The output is bf16, or quantised for a projection in FP8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape, unpack_fp8_blocks
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS, HEAD_DIM, PADDED_HEADS, MfaSchedule
from step3rt.ops.quantize import quantize_groups, to_e4m3, widen
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from step3rt.ops.tensor_map import TileView, encode_tensor_map

LOG2_E = 1.4426950408889634
FP8_WEIGHT_SCALE = 2.0**8
"""The FP8 kernel rounds softmax's weights, which are up to 1, to e4m3 after this factor."""


def _builds(source: str) -> tuple[launch.Kernel, launch.Kernel]:
    bf16, quantized = (
        launch.Kernel(
            source,
            num_threads=384,
            shared_bytes=231_424,
            is_dependent=True,
            options=(f"-DSTEP3RT_MFA_QUANTIZED={is_quantized}",),
        )
        for is_quantized in (0, 1)
    )
    return bf16, quantized


BF16_KERNELS = _builds("attention/sm90_bf16_mfa_decode.cu")
"""Builds for a BF16 cache: with bf16 output, and with quantised output."""
FP8_KERNELS = _builds("attention/sm90_fp8_mfa_decode.cu")
"""The same for an FP8 cache."""

# struct MfaParams of kernels/attention/mfa_decode.cuh.
_PARAMS_DTYPE = np.dtype(
    [
        ("schedule", np.uint64),
        ("seq_lens", np.uint64),
        ("block_table", np.uint64),
        ("block_table_stride", np.int32),
        ("num_heads", np.int32),
        ("softmax_scale_log2", np.float32),
        ("output_scale", np.float32),
        ("out", np.uint64),
        ("quantized", np.uint64),
        ("scales", np.uint64),
        ("partial_out", np.uint64),
        ("partial_stats", np.uint64),
        ("arrivals", np.uint64),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class MfaBatch:
    """The sequences of one decode launch, on the device.

    `block_table` i32[S, max blocks], contiguous: KV block ids, of which a row's first
    ceil(seq_len / 64) are read. `seq_lens` i32[S]: tokens in the cache, the new one included; 0
    marks an unused row. `schedule`: filled by `mfa_schedule` from the same `seq_lens`.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    schedule: MfaSchedule


def mfa_decode_bf16(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: MfaBatch,
    out: torch.Tensor | QuantizedRows,
    softmax_scale: float,
) -> None:
    """Writes softmax(q k^T * softmax_scale) v of every sequence to `out`.

    Args:
        q: bf16[S, N, 256], contiguous, rotary embedding applied; N <= 64.
        kv_cache: bf16[B, 2, 64, 256], contiguous: K, with rotary embedding, then V of each block.
        batch: The sequences.
        out: bf16[S, N, 256], contiguous, or rows [S, N * 256]: what `quantize_groups_fp8` makes of
            the same in bf16. Rows of empty sequences become 0.
        softmax_scale: Usually 1 / 16.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    _check(q, torch.bfloat16, batch, out, softmax_scale)
    launch.check_tensor("kv_cache", kv_cache, bf16_cache_shape(-1), torch.bfloat16, q.device)
    if q.device.type == "cpu":

        def read(blocks: torch.Tensor) -> torch.Tensor:
            return kv_cache[blocks].double()

        _decode_on_cpu(q.double() * softmax_scale, read, batch, out, _round_to_bf16)
        return
    params = _params(q, batch, out, softmax_scale, 1.0)
    kernel = BF16_KERNELS[isinstance(out, QuantizedRows)]
    kernel.launch(q.device, batch.schedule.num_ctas, (query_map(q), bf16_kv_map(kv_cache), params))


def mfa_decode_fp8(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: MfaBatch,
    out: torch.Tensor | QuantizedRows,
    softmax_scale: float,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Writes softmax(q k^T * softmax_scale) v of every sequence to `out`, from an FP8 cache.

    Args:
        q: e4m3[S, N, 256], contiguous, rotary embedding applied; N <= 64.
        q_scale: f32[S, N], positive: the query is q * q_scale.
        kv_cache: u8[B, 32768], the layout of `pack_fp8_blocks`.
        batch: The sequences.
        out: bf16[S, N, 256], contiguous, or rows [S, N * 256]: what `quantize_groups_fp8` makes of
            the same in bf16. Rows of empty sequences become 0.
        softmax_scale: Usually 1 / 16.
        kv_scale: What one unit of the cached K and V is worth, constants of the layer.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or a scale is not positive.
    """
    _check(q, torch.float8_e4m3fn, batch, out, softmax_scale)
    launch.check_tensor("q_scale", q_scale, q.shape[:2], torch.float32, q.device)
    launch.check_tensor("kv_cache", kv_cache, fp8_cache_shape(-1), torch.uint8, q.device)
    k_scale, v_scale = check_scales(kv_scale)
    if q.device.type == "cpu":
        scales = torch.tensor(kv_scale, dtype=torch.float64)[:, None, None]

        def read(blocks: torch.Tensor) -> torch.Tensor:
            return widen(unpack_fp8_blocks(kv_cache[blocks]), torch.float64) * scales

        scaled = widen(q, torch.float64) * q_scale[..., None].double() * softmax_scale
        _decode_on_cpu(scaled, read, batch, out, _round_to_e4m3)
        return
    params = _params(q, batch, out, softmax_scale * k_scale, v_scale)
    arguments = (query_map(q), launch.pointer(kv_cache), launch.pointer(q_scale), params)
    kernel = FP8_KERNELS[isinstance(out, QuantizedRows)]
    kernel.launch(q.device, batch.schedule.num_ctas, arguments)


def reference_mfa_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """Returns f64[S, N, 256], computed in float64 on the tensors' device.

    Args:
        q: float[S, N, 256], dequantised.
        kv: float[B, 2, 64, 256], dequantised.
        block_table: i32[S, max blocks].
        seq_lens: i32[S]; the row of an empty sequence is 0.
        softmax_scale: As in the kernels.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for sequence, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        blocks = block_table[sequence, : -(-length // BLOCK_SIZE_TOKENS)].long()
        keys, values = kv[blocks].double().transpose(0, 1).flatten(1, 2)[:, :length]
        scores = q[sequence].double() @ keys.T * softmax_scale
        out[sequence] = scores.softmax(dim=-1) @ values
    return out


def _decode_on_cpu(
    q: torch.Tensor,
    read: Callable[[torch.Tensor], torch.Tensor],
    batch: MfaBatch,
    out: torch.Tensor | QuantizedRows,
    round_weights: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Computes what a kernel does, in float64, with its rounding of the weights before P V.

    Args:
        q: f64[S, N, 256], times the softmax scale.
        read: Gives blocks of the cache, f64[n, 2, 64, 256], for i64[n] ids.
        batch: The sequences.
        out: bf16[S, N, 256], or rows [S, N * 256].
        round_weights: To what the kernel multiplies V with; the weights are in [0, 1].
    """
    attended = out if isinstance(out, torch.Tensor) else torch.empty_like(q, dtype=torch.bfloat16)
    for sequence, length in enumerate(batch.seq_lens.tolist()):
        if length == 0:
            attended[sequence] = 0
            continue
        blocks = batch.block_table[sequence, : -(-length // BLOCK_SIZE_TOKENS)].long()
        keys, values = read(blocks).transpose(0, 1).flatten(1, 2)[:, :length]
        scores = q[sequence] @ keys.T
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        # The kernels sum the weights before they round them.
        total = weights.sum(dim=-1, keepdim=True)
        attended[sequence] = round_weights(weights) @ values / total
    if isinstance(out, QuantizedRows):
        out.copy_(*quantize_groups(attended.flatten(1)))


def _round_to_bf16(weights: torch.Tensor) -> torch.Tensor:
    return weights.bfloat16().double()


def _round_to_e4m3(weights: torch.Tensor) -> torch.Tensor:
    return to_e4m3(weights * FP8_WEIGHT_SCALE).double() / FP8_WEIGHT_SCALE


def _check(
    q: torch.Tensor,
    q_dtype: torch.dtype,
    batch: MfaBatch,
    out: torch.Tensor | QuantizedRows,
    softmax_scale: float,
) -> None:
    device = batch.schedule.device
    launch.check_tensor("q", q, (-1, -1, HEAD_DIM), q_dtype, device)
    num_sequences, num_heads = q.shape[:2]
    if not 1 <= num_heads <= PADDED_HEADS:
        raise ValueError(
            f"`q` has {num_heads} heads, the kernel takes 1 to {PADDED_HEADS}. Launch once per "
            f"group of {PADDED_HEADS} heads."
        )
    if isinstance(out, QuantizedRows):
        out.check(num_sequences, num_heads * HEAD_DIM, device)
    else:
        launch.check_tensor("out", out, q.shape, torch.bfloat16, device)
    launch.check_tensor("seq_lens", batch.seq_lens, (num_sequences,), torch.int32, device)
    launch.check_tensor("block_table", batch.block_table, (num_sequences, -1), torch.int32, device)
    if not softmax_scale > 0:
        raise ValueError(
            f"softmax_scale is {softmax_scale}. The running maximum is taken before scaling, which "
            "needs a positive scale. Pass 1 / sqrt(head_dim)."
        )


def check_scales(kv_scale: tuple[float, float]) -> tuple[float, float]:
    """Returns the scales of K and V.

    Raises:
        ValueError: one is not positive.
    """
    if not min(kv_scale) > 0:
        raise ValueError(f"kv_scale is {kv_scale}. A scale is positive. Recalibrate the layer.")
    return kv_scale


def bf16_kv_map(kv_cache: torch.Tensor) -> Any:
    """A box is K or V of one block of bf16[B, 2, 64, 256], in 128-byte column slices."""
    row_bytes = 2 * HEAD_DIM
    view = TileView(
        sizes=(64, BLOCK_SIZE_TOKENS, HEAD_DIM // 64, 2 * kv_cache.shape[0]),
        strides_bytes=(row_bytes, 128, BLOCK_SIZE_TOKENS * row_bytes),
        box=(64, BLOCK_SIZE_TOKENS, HEAD_DIM // 64, 1),
        swizzle_bytes=128,
    )
    return encode_tensor_map(kv_cache, view)


def query_map(q: torch.Tensor) -> Any:
    """A box is all heads of one of [T, N, 256], in 128-byte column slices; heads past N are 0."""
    num_sequences, num_heads, _ = q.shape
    item_bytes = q.element_size()
    slice_elements = 128 // item_bytes
    row_bytes = HEAD_DIM * item_bytes
    view = TileView(
        sizes=(slice_elements, num_heads, row_bytes // 128, num_sequences),
        strides_bytes=(row_bytes, 128, num_heads * row_bytes),
        box=(slice_elements, PADDED_HEADS, row_bytes // 128, 1),
        swizzle_bytes=128,
    )
    return encode_tensor_map(q, view)


def _params(
    q: torch.Tensor,
    batch: MfaBatch,
    out: torch.Tensor | QuantizedRows,
    score_scale: float,
    output_scale: float,
) -> Any:
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    params["schedule"] = batch.schedule.rows.data_ptr()
    params["seq_lens"] = batch.seq_lens.data_ptr()
    params["block_table"] = batch.block_table.data_ptr()
    params["block_table_stride"] = batch.block_table.shape[1]
    params["num_heads"] = q.shape[1]
    params["softmax_scale_log2"] = score_scale * LOG2_E
    params["output_scale"] = output_scale
    if isinstance(out, QuantizedRows):
        params["quantized"] = out.values.data_ptr()
        params["scales"] = out.scales.data_ptr()
    else:
        params["out"] = out.data_ptr()
    params["partial_out"] = batch.schedule.partial_out.data_ptr()
    params["partial_stats"] = batch.schedule.partial_stats.data_ptr()
    params["arrivals"] = batch.schedule.arrivals.data_ptr()
    return params
