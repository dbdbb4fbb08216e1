"""Random FP8 MoE layers for the kernel tests, on one CUDA device or the CPU."""

from dataclasses import dataclass

import torch

from step3rt.ops.moe_fp8 import (
    Fp8Experts,
    MoeTokens,
    MoeWorkspace,
    allocate_moe_workspace,
    moe_fp8,
    reference_expert,
)
from step3rt.ops.moe_layout import pack_down, pack_gate_up
from step3rt.ops.quantize import dequantize_blocks, dequantize_groups, quantize_groups

DEVICE = torch.device("cuda", 0)
BLOCK = (128, 128)


@dataclass
class MoeCase:
    """Tokens and experts, their plain weights and a workspace full of NaN."""

    tokens: MoeTokens
    experts: Fp8Experts
    gate_up: torch.Tensor
    down: torch.Tensor
    workspace: MoeWorkspace

    def run(self) -> torch.Tensor:
        shape = (self.tokens.hidden.shape[0], self.experts.hidden_size)
        out = torch.full(
            shape, float("nan"), dtype=torch.bfloat16, device=self.tokens.hidden.device
        )
        moe_fp8(self.tokens, self.experts, self.workspace, out)
        return out

    def reference(self) -> torch.Tensor:
        """f64[T, H] on the dequantised operands."""
        tokens, experts = self.tokens, self.experts
        hidden = dequantize_groups(tokens.hidden, tokens.scales, torch.float64)
        out = torch.zeros_like(hidden)
        for group in range(experts.num_groups):
            if group < experts.num_routed:
                hit = tokens.topk_ids == experts.first_expert + group
                weights = (tokens.topk_weights.double() * hit).sum(dim=1)
            else:
                weights = torch.ones_like(hidden[:, 0])
            used = weights.nonzero().flatten()
            if len(used) > 0:
                gate_up_scale, down_scale = experts.gate_up_scale[group], experts.down_scale[group]
                result = reference_expert(
                    hidden[used],
                    dequantize_blocks(self.gate_up[group], gate_up_scale, BLOCK, torch.float64),
                    dequantize_blocks(self.down[group], down_scale, BLOCK, torch.float64),
                )
                out[used] += result * weights[used, None]
        return out


def make_tokens(
    topk_ids: torch.Tensor, hidden_size: int, device: torch.device = DEVICE
) -> MoeTokens:
    """Tokens with hidden states of varied magnitude, for i32[T, C] ids."""
    num_tokens = topk_ids.shape[0]
    hidden = torch.randn(num_tokens, hidden_size, device=device)
    hidden *= torch.rand(num_tokens, 1, device=device) + 0.5
    values, scales = quantize_groups(hidden)
    weights = torch.rand(topk_ids.shape, device=device) + 0.05
    return MoeTokens(values, scales, topk_ids.int().to(device).contiguous(), weights)


def make_experts(
    num_groups: int,
    num_routed: int,
    sizes: tuple[int, int],
    first_expert: int = 0,
    device: torch.device = DEVICE,
) -> tuple[Fp8Experts, torch.Tensor, torch.Tensor]:
    """Returns packed experts and their plain gate_up and down."""
    hidden_size, inner_size = sizes

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.empty(num_groups, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        for group in range(num_groups):
            values[group] = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
        scales = torch.rand(num_groups, rows // 128, columns // 128, device=device) + 0.5
        return values, scales / columns**0.5

    gate_up, gate_up_scale = weight(2 * inner_size, hidden_size)
    down, down_scale = weight(hidden_size, inner_size)
    experts = Fp8Experts(
        pack_gate_up(gate_up),
        gate_up_scale,
        pack_down(down),
        down_scale,
        first_expert,
        num_routed,
    )
    return experts, gate_up, down


def make_case(
    topk_ids: torch.Tensor,
    num_groups: int,
    num_routed: int,
    sizes: tuple[int, int] = (512, 256),
    first_expert: int = 0,
    num_ctas: int | None = None,
    num_slices: int | None = None,
    device: torch.device = DEVICE,
) -> MoeCase:
    """`sizes`: hidden and intermediate. Everything that the kernels should write holds NaN."""
    experts, gate_up, down = make_experts(num_groups, num_routed, sizes, first_expert, device)
    tokens = make_tokens(topk_ids, sizes[0], device)
    max_tokens = max(topk_ids.shape[0], 1)
    workspace = allocate_moe_workspace(
        experts, max_tokens, topk_ids.shape[1], num_ctas=num_ctas, num_slices=num_slices
    )
    poison(workspace)
    return MoeCase(tokens, experts, gate_up, down, workspace)


def poison(workspace: MoeWorkspace) -> None:
    """Fills every buffer with NaN, or with a row that does not exist."""
    workspace.groups.fill_(2**30)
    workspace.token_rows.fill_(2**30)
    for fp8 in (workspace.rows, workspace.inner):
        fp8.view(torch.uint8).fill_(0x7F)
    for values in (workspace.row_scales, workspace.inner_scales, workspace.expert_out):
        values.fill_(float("nan"))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns |out - reference| / |reference| over all elements; NaN if any element is."""
    difference = (out.double() - reference).norm()
    return float(difference / reference.norm().clamp(min=1e-30))
