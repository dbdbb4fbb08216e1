"""Grouped SwiGLU experts: routed experts, the shared expert and dense layers alike."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts of one shape, with consecutive ids.

    first_id: id of expert 0 of the stack.
    gate_up: float[E, 2 * I, H]; the gate projection's rows lie before the up projection's.
    down: float[E, H, I].
    Their dtype is `ops.linear.weight_dtype` of the computation's.
    """

    first_id: int
    gate_up: torch.Tensor
    down: torch.Tensor


def grouped_experts(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    stacks: tuple[ExpertStack, ...],
) -> torch.Tensor:
    """Computes the weighted sum of each token's experts.

    A token's sum is taken in the order of its columns, whoever else is in the batch.

    Args:
        hidden: float[T, H].
        expert_ids: i32[T, C]; an id that no stack holds (-1 by convention) adds nothing.
        expert_weights: f32[T, C].
        stacks: experts at hand; their id ranges do not overlap.

    Returns:
        f32[T, H] (f64 for f64 inputs).
    """
    num_tokens, num_columns = expert_ids.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    flat_ids = expert_ids.flatten()
    flat_weights = expert_weights.flatten()
    # Row t * C + c is what column c of token t contributes.
    contributions = torch.zeros(num_tokens * num_columns, hidden.shape[1], dtype=wide)
    order = torch.argsort(flat_ids, stable=True)
    ids, counts = torch.unique_consecutive(flat_ids[order], return_counts=True)
    groups = torch.split(order, counts.tolist())
    for expert_id, places in zip(ids.tolist(), groups, strict=True):
        for stack in stacks:
            index = expert_id - stack.first_id
            if 0 <= index < stack.down.shape[0]:
                rows = hidden[places // num_columns]
                output = swiglu(rows, stack.gate_up[index], stack.down[index])
                contributions[places] = (output * flat_weights[places, None]).to(wide)
    return contributions.view(num_tokens, num_columns, hidden.shape[1]).sum(dim=1)


def swiglu(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Computes down(silu(gate h) * up h) for float[T, H], in the weights' dtype.

    gate_up and down are one expert's of an `ExpertStack`. Returns [T, H] in the weights' dtype.
    """
    gate, up = linear(hidden.to(gate_up.dtype), gate_up).chunk(2, dim=-1)
    return linear(silu(gate) * up, down)
