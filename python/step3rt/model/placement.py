"""Owns which FFN instance computes what: routed experts by range, the shared expert by token.

Routed experts lie in contiguous ranges over the `ep_size` FFN instances. The shared expert and
dense FFNs are replicated; each row of a micro-batch has a home instance that computes them, so
that a row travels only to its home and to the instances that own one of its experts.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of a micro-batch that one FFN instance computes.

    rows: i64[R], ascending, of the micro-batch.
    expert_ids: i32[R, K + 1]; -1 where another instance computes that column. The last column is
        `num_experts` (the shared expert or dense FFN) in rows whose home this is.
    expert_weights: f32[R, K + 1]; 0 where the id is -1.
    """

    rows: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor


def expert_range(num_experts: int, ep_rank: int, ep_size: int) -> range:
    """Routed experts of FFN rank `ep_rank`: [E * r // F, E * (r + 1) // F), possibly none."""
    return range(num_experts * ep_rank // ep_size, num_experts * (ep_rank + 1) // ep_size)


def place(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    num_experts: int,
    top_k: int,
    ep_size: int,
) -> list[Placement]:
    """Splits a layer's expert distribution over the FFN instances, in rank order.

    Args:
        topk_ids: i32[T, K], or [T, 0] in a dense layer.
        topk_weights: float, same shape.
        num_experts: E, of the model.
        top_k: K of the model, which fixes the number of columns.
        ep_size: F.
    """
    num_tokens, num_chosen = topk_ids.shape
    ids = torch.full((num_tokens, top_k + 1), -1, dtype=torch.int32)
    ids[:, :num_chosen] = topk_ids
    ids[:, top_k] = num_experts
    weights = torch.zeros(num_tokens, top_k + 1, dtype=topk_weights.dtype)
    weights[:, :num_chosen] = topk_weights
    weights[:, top_k] = 1.0
    homes = torch.arange(num_tokens) % ep_size

    placements = []
    for rank in range(ep_size):
        experts = expert_range(num_experts, rank, ep_size)
        is_here = (ids >= experts.start) & (ids < experts.stop)
        is_here[:, top_k] = homes == rank
        rows = is_here.any(dim=1).nonzero()[:, 0]
        is_here = is_here[rows]
        placements.append(
            Placement(
                rows=rows,
                expert_ids=ids[rows].masked_fill(~is_here, -1),
                expert_weights=weights[rows].masked_fill(~is_here, 0.0),
            )
        )
    return placements


def combine(
    partial_sums: list[torch.Tensor], placements: list[Placement], num_tokens: int
) -> torch.Tensor:
    """Adds the FFN instances' partial sums in rank order, in float32 at least.

    Args:
        partial_sums: per rank float[R, H], the rows of its placement.
        placements: what `place` returned.
        num_tokens: T.

    Returns:
        f32[T, H] (f64 for f64 inputs).
    """
    wide = torch.promote_types(partial_sums[0].dtype, torch.float32)
    total = torch.zeros(num_tokens, partial_sums[0].shape[1], dtype=wide)
    for partial_sum, placement in zip(partial_sums, placements, strict=True):
        total.index_add_(0, placement.rows, partial_sum.to(wide))
    return total
