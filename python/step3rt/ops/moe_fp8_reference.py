"""What the FP8 MoE kernels compute, in torch: each from and into the same memory formats.

Owns the arithmetic and its roundings; never allocates what a launch writes. Sums are in float64, so
that a token's result does not depend on its batch mates. The launchers of `ops.moe_fp8` run these
on the CPU; the formats are described at `MoeWorkspace` and in `ops.moe_layout`.
"""

import torch

from step3rt.ops.moe_layout import (
    BLOCK_K,
    pack_rows,
    padded_rows,
    unpack_down,
    unpack_gate_up,
    unpack_rows,
)
from step3rt.ops.quantize import dequantize_blocks, dequantize_groups, quantize_groups

_BLOCK_SIZE = (BLOCK_K, BLOCK_K)


def reference_dispatch(
    topk_ids: torch.Tensor, first_expert: int, num_routed: int, *, has_shared: bool
) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Returns what `moe_dispatch` decides: (first row, rows) of each group, and i32[T, C + 1]."""
    num_tokens, num_columns = topk_ids.shape
    local = topk_ids.cpu() - first_expert
    token_rows = torch.full((num_tokens, num_columns + 1), -1, dtype=torch.int32)
    groups = []
    start = 0
    for expert in range(num_routed):
        places = (local == expert).nonzero()  # in the order of (token, column)
        rows = torch.arange(start, start + len(places), dtype=torch.int32)
        token_rows[places[:, 0], places[:, 1]] = rows
        groups.append((start, len(places)))
        start += padded_rows(len(places))
    if has_shared:
        token_rows[:, num_columns] = torch.arange(start, start + num_tokens, dtype=torch.int32)
        groups.append((start, num_tokens))
    return groups, token_rows


def copy_rows(
    hidden: torch.Tensor,
    scales: torch.Tensor,
    token_rows: torch.Tensor,
    rows: torch.Tensor,
    row_scales: torch.Tensor,
) -> None:
    """Copies each token to its rows: the data movement of dispatch.

    Args:
        hidden: e4m3[T, H].
        scales: f32[T, H / 128].
        token_rows: i32[T, C + 1], -1: no row.
        rows: e4m3[H / 128, R, 128], written.
        row_scales: f32[H / 128, R], written.
    """
    tokens, columns = (token_rows >= 0).nonzero(as_tuple=True)
    places = token_rows[tokens, columns].long()
    # Indexed writes know no FP8; the bytes are the same.
    packed = pack_rows(hidden[tokens], places)
    rows.view(torch.uint8)[:, places] = packed.view(torch.uint8)
    row_scales[:, places] = scales[tokens].T


def gate_up(
    groups: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    rows: tuple[torch.Tensor, torch.Tensor],
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Computes silu(gate) * up of each group's rows and quantises it.

    Args:
        groups: i32[G, 2], first row and number of rows.
        weights: e4m3[G, 2 * I * H] packed, and f32[G, 2I / 128, H / 128].
        rows: e4m3[H / 128, R, 128] and f32[H / 128, R].
        out: e4m3[I / 128, R, 128] and f32[I / 128, R], written.
    """
    packed, scales = weights
    width = scales.shape[2] * BLOCK_K
    for group, (first, count) in enumerate(groups.tolist()):
        if count == 0:
            continue
        plain = unpack_gate_up(packed[group : group + 1], width)[0]
        matrix = dequantize_blocks(plain, scales[group], _BLOCK_SIZE, torch.float64)
        gate, up = (_read(rows, first, count) @ matrix.T).chunk(2, dim=-1)
        values, value_scales = quantize_groups(torch.nn.functional.silu(gate) * up)
        places = torch.arange(first, first + count)
        out[0].view(torch.uint8)[:, places] = pack_rows(values, places).view(torch.uint8)
        out[1][:, places] = value_scales.T


def down(
    groups: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    rows: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Computes the down projection of each group's rows, in slices of the inner dimension.

    Args:
        groups: i32[G, 2], first row and number of rows.
        weights: e4m3[G, H * I] packed, and f32[G, H / 128, I / 128].
        rows: e4m3[I / 128, R, 128] and f32[I / 128, R].
        out: bf16[S, R, H], written: slice s is the sum over the s-th part of I.
    """
    packed, scales = weights
    num_blocks, num_slices = scales.shape[2], out.shape[0]
    for group, (first, count) in enumerate(groups.tolist()):
        if count == 0:
            continue
        plain = unpack_down(packed[group : group + 1], num_blocks * BLOCK_K)[0]
        matrix = dequantize_blocks(plain, scales[group], _BLOCK_SIZE, torch.float64)
        inner = _read(rows, first, count)
        for index in range(num_slices):
            begin = num_blocks * index // num_slices * BLOCK_K
            end = num_blocks * (index + 1) // num_slices * BLOCK_K
            product = inner[:, begin:end] @ matrix[:, begin:end].T
            out[index, first : first + count] = product


def combine(
    expert_out: torch.Tensor,
    token_rows: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Sums each token's rows with their weights, in fp32, in the order of columns and slices.

    Args:
        expert_out: bf16[S, R, H].
        token_rows: i32[T, C + 1], -1: no row; the last column has weight 1.
        topk_weights: f32[T, C].
        out: bf16[T, H], written; 0 for a token without any row.
    """
    total = torch.zeros(out.shape)
    ones = torch.ones(topk_weights.shape[0], 1)
    weights = torch.cat([topk_weights, ones], dim=1)
    for column in range(token_rows.shape[1]):
        tokens = (token_rows[:, column] >= 0).nonzero().flatten()
        places = token_rows[tokens, column].long()
        for part in expert_out:
            total[tokens] += weights[tokens, column, None] * part[places].float()
    out.copy_(total)


def _read(rows: tuple[torch.Tensor, torch.Tensor], first: int, count: int) -> torch.Tensor:
    """f64[count, K]: rows of a sorted copy, dequantised."""
    values, scales = rows
    places = slice(first, first + count)
    # A group starts at a multiple of 64 rows: the swizzle's phase is that of row 0.
    plain = unpack_rows(values[:, places])
    return dequantize_groups(plain, scales[:, places].T, torch.float64)
