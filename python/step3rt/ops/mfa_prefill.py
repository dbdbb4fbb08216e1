"""MFA prefill attention: chunks of prompts against the paged KV cache of one layer, causal.

Launches the BF16 and FP8 kernels of kernels/attention; never appends to the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.kv_cache import bf16_cache_shape, fp8_cache_shape
from step3rt.ops.mfa_decode import (
    LOG2_E,
    MfaBatch,
    bf16_kv_map,
    check_scales,
    mfa_decode_bf16,
    mfa_decode_fp8,
    query_map,
    reference_mfa_decode,
)
from step3rt.ops.mfa_schedule import HEAD_DIM, PADDED_HEADS, allocate_schedule

ITEM_TOKENS = 2
"""Tokens of a chunk that a CTA attends with at a time: one per consumer warpgroup."""

_SHARED_BYTES = 230_400
_BF16_KERNEL = launch.Kernel(
    "attention/sm90_bf16_mfa_prefill.cu",
    num_threads=384,
    shared_bytes=_SHARED_BYTES,
    is_dependent=True,
)
_FP8_KERNEL = launch.Kernel(
    "attention/sm90_fp8_mfa_prefill.cu",
    num_threads=384,
    shared_bytes=_SHARED_BYTES,
    is_dependent=True,
)

# struct PrefillParams of kernels/attention/mfa_prefill.cuh.
_PARAMS_DTYPE = np.dtype(
    [
        ("items", np.uint64),
        ("num_items", np.uint64),
        ("block_table", np.uint64),
        ("block_table_stride", np.int32),
        ("num_heads", np.int32),
        ("softmax_scale_log2", np.float32),
        ("output_scale", np.float32),
        ("out", np.uint64),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence in a step.

    Attributes:
        row: of q and out, of its first token.
        num_tokens: 1 or more.
        first_position: of its first token in the sequence; all before it is in the cache.
        sequence: row of the block table.
    """

    row: int
    num_tokens: int
    first_position: int
    sequence: int


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """The chunks of one launch, on the device.

    `items` i32[W, 4], `num_items` i32[1]: the first rows of `items` that count, from
    `prefill_items`. `block_table` i32[S, max blocks], contiguous. `num_ctas`: one for each SM that
    the kernels may use; None: all.
    """

    items: torch.Tensor
    num_items: torch.Tensor
    block_table: torch.Tensor
    num_ctas: int | None = None


def prefill_items(chunks: Sequence[PrefillChunk]) -> torch.Tensor:
    """Cuts chunks into pairs of tokens, those that see most first.

    Returns:
        i32[W, 4] on the host: row, tokens, tokens that the first one sees, sequence.
    """
    parts = []
    for chunk in chunks:
        offsets = np.arange(0, chunk.num_tokens, ITEM_TOKENS)
        part = np.empty((len(offsets), 4), dtype=np.int32)
        part[:, 0] = chunk.row + offsets
        part[:, 1] = np.minimum(ITEM_TOKENS, chunk.num_tokens - offsets)
        part[:, 2] = chunk.first_position + offsets + 1
        part[:, 3] = chunk.sequence
        parts.append(part)
    items = np.concatenate(parts) if parts else np.empty((0, 4), dtype=np.int32)
    return torch.from_numpy(items[np.argsort(-items[:, 2], kind="stable")])


def mfa_prefill_bf16(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PrefillBatch,
    out: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Writes causal softmax(q k^T * softmax_scale) v of every chunk's tokens to `out`.

    Args:
        q: bf16[T, N, 256], contiguous, rotary embedding applied; N <= 64.
        kv_cache: bf16[B, 2, 64, 256], contiguous: K, with rotary embedding, then V of each block,
            the chunks' own tokens included.
        batch: The chunks.
        out: bf16[T, N, 256], contiguous. Rows of no chunk are not written.
        softmax_scale: Usually 1 / 16.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    _check(q, torch.bfloat16, batch, out, softmax_scale)
    launch.check_tensor("kv_cache", kv_cache, bf16_cache_shape(-1), torch.bfloat16, q.device)
    if q.device.type == "cpu":
        rows, decode = _as_decode(batch)
        part = torch.empty(out[rows].shape, dtype=out.dtype)
        mfa_decode_bf16(q[rows], kv_cache, decode, part, softmax_scale)
        out[rows] = part
        return
    params = _params(q, batch, out, softmax_scale, 1.0)
    arguments = (query_map(q), bf16_kv_map(kv_cache), params)
    _BF16_KERNEL.launch(q.device, batch.num_ctas or launch.num_sms(q.device), arguments)


def mfa_prefill_fp8(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: PrefillBatch,
    out: torch.Tensor,
    softmax_scale: float,
    kv_scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Writes causal softmax(q k^T * softmax_scale) v to `out`, from an FP8 cache.

    Args:
        q: e4m3[T, N, 256], contiguous, rotary embedding applied; N <= 64.
        q_scale: f32[T, N], positive: the query is q * q_scale.
        kv_cache: u8[B, 32768], the layout of `pack_fp8_blocks`, the chunks' own tokens included.
        batch: The chunks.
        out: bf16[T, N, 256], contiguous. Rows of no chunk are not written.
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
        rows, decode = _as_decode(batch)
        part = torch.empty(out[rows].shape, dtype=out.dtype)
        mfa_decode_fp8(q[rows], q_scale[rows], kv_cache, decode, part, softmax_scale, kv_scale)
        out[rows] = part
        return
    params = _params(q, batch, out, softmax_scale * k_scale, v_scale)
    arguments = (query_map(q), launch.pointer(kv_cache), launch.pointer(q_scale), params)
    _FP8_KERNEL.launch(q.device, batch.num_ctas or launch.num_sms(q.device), arguments)


def reference_mfa_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    chunks: Sequence[PrefillChunk],
    block_table: torch.Tensor,
    softmax_scale: float,
) -> torch.Tensor:
    """Returns f64[T, N, 256], computed in float64; rows of no chunk are 0.

    Args:
        q: float[T, N, 256], dequantised.
        kv: float[B, 2, 64, 256], dequantised.
        chunks: As given to `prefill_items`.
        block_table: i32[S, max blocks].
        softmax_scale: As in the kernels.
    """
    # Attention of a chunk's token is decode attention of a sequence that ends with it.
    num_rows = q.shape[0]
    table = torch.zeros(num_rows, block_table.shape[1], dtype=torch.int32, device=q.device)
    seq_lens = torch.zeros(num_rows, dtype=torch.int32, device=q.device)
    for chunk in chunks:
        rows = slice(chunk.row, chunk.row + chunk.num_tokens)
        table[rows] = block_table[chunk.sequence]
        first = chunk.first_position + 1
        seq_lens[rows] = torch.arange(
            first, first + chunk.num_tokens, dtype=torch.int32, device=q.device
        )
    return reference_mfa_decode(q, kv, table, seq_lens, softmax_scale)


def _as_decode(batch: PrefillBatch) -> tuple[torch.Tensor, MfaBatch]:
    """The rows of the items, and as many sequences that end with them: what the kernels compute."""
    items = batch.items[: int(batch.num_items)].long()
    firsts, seconds = items, items[items[:, 1] == ITEM_TOKENS]
    rows = torch.cat([firsts[:, 0], seconds[:, 0] + 1])
    seq_lens = torch.cat([firsts[:, 2], seconds[:, 2] + 1]).int()
    table = batch.block_table[torch.cat([firsts[:, 3], seconds[:, 3]])]
    return rows, MfaBatch(table, seq_lens, allocate_schedule(rows.device, 1))


def _check(
    q: torch.Tensor,
    q_dtype: torch.dtype,
    batch: PrefillBatch,
    out: torch.Tensor,
    softmax_scale: float,
) -> None:
    device = q.device
    launch.check_tensor("q", q, (-1, -1, HEAD_DIM), q_dtype, device)
    if not 1 <= q.shape[1] <= PADDED_HEADS:
        raise ValueError(
            f"`q` has {q.shape[1]} heads, the kernel takes 1 to {PADDED_HEADS}. Launch once per "
            f"group of {PADDED_HEADS} heads."
        )
    launch.check_tensor("out", out, q.shape, torch.bfloat16, device)
    launch.check_tensor("items", batch.items, (-1, 4), torch.int32, device)
    launch.check_tensor("num_items", batch.num_items, (1,), torch.int32, device)
    launch.check_tensor("block_table", batch.block_table, (-1, -1), torch.int32, device)
    if not softmax_scale > 0:
        raise ValueError(
            f"softmax_scale is {softmax_scale}. The running maximum is taken before scaling, which "
            "needs a positive scale. Pass 1 / sqrt(head_dim)."
        )


def _params(
    q: torch.Tensor, batch: PrefillBatch, out: torch.Tensor, score_scale: float, output_scale: float
) -> Any:
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    params["items"] = batch.items.data_ptr()
    params["num_items"] = batch.num_items.data_ptr()
    params["block_table"] = batch.block_table.data_ptr()
    params["block_table_stride"] = batch.block_table.shape[1]
    params["num_heads"] = q.shape[1]
    params["softmax_scale_log2"] = score_scale * LOG2_E
    params["output_scale"] = output_scale
    params["out"] = out.data_ptr()
    return params
