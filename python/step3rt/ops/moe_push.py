"""FP8 MoE of one layer for an FFN rank: rows out of the slots, sums straight back to their sources.

As ops/moe_fp8.py, whose kernels it launches, but for the last: each row's sum is stored in the
memory of the attention instance that asked for it.
"""

import torch

from step3rt.ops.afd_ffn import FfnSlots
from step3rt.ops.moe_fp8 import (
    Fp8Experts,
    MoeWorkspace,
    check_layer,
    moe_dispatch,
    moe_down,
    moe_fp8,
    moe_gate_up,
)


def moe_fp8_push(experts: Fp8Experts, workspace: MoeWorkspace, slots: FfnSlots, lane: int) -> None:
    """Computes the rows that a lane has awaited and pushes their sums to the sources.

    On a GPU that shares its SMs with other lanes, a lane that waits holds a part of one SM:
    `workspace.num_ctas` should leave out two SMs for each other lane, or a GEMM whose CTAs fill an
    SM each starts its last ones late.

    Args:
        experts: Of the layer and this rank, all of them routed: group g takes the rows with id g.
            The shared expert is the last group; a dense FFN the only one.
        workspace: From `allocate_moe_workspace` for these experts, A * T tokens and C columns.
        slots: After `slots.wait(lane, …)` on the same stream.
        lane: Which one.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    if experts.has_shared or experts.first_expert != 0:
        raise ValueError(
            f"{experts.num_routed} of {experts.num_groups} experts are routed, from id "
            f"{experts.first_expert} on. Rows come with a rank's own group numbers, the shared "
            "expert's too. Pass `first_expert=0, num_routed=num_groups`."
        )
    tokens = slots.tokens(lane)
    check_layer(tokens, experts, workspace)
    if slots.device.type == "cpu":
        sums = torch.empty(tokens.hidden.shape, dtype=torch.bfloat16)
        moe_fp8(tokens, experts, workspace, sums)
        slots.push(lane, sums)
        return
    moe_dispatch(tokens, experts, workspace)
    moe_gate_up(experts, workspace)
    moe_down(experts, workspace)
    slots.push_experts(lane, workspace)
