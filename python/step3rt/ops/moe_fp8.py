"""FP8 MoE of one layer on Hopper: sorts tokens by expert, SwiGLU experts, weighted sum.

Launches the kernels of kernels/moe on preallocated memory, on the CPU those of
`ops.moe_fp8_reference`; never learns how many tokens an expert got: counts stay on the device, so
that a captured graph stays valid.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops import launch, moe_fp8_reference
from step3rt.ops.moe_fp8_reference import reference_dispatch
from step3rt.ops.moe_layout import BLOCK_K, GATE_UP_TILE, ROW_ALIGNMENT, padded_rows
from step3rt.ops.quantize import dequantize_groups, quantize_groups

MAX_GROUPS = 64
MAX_COLUMNS = 8
MAX_TOKENS = 2048
PREFETCH_BYTES = 64 * 1024
"""Of each tile of gate and up that dispatch brings to L2: two stages."""
_CLUSTER_CTAS = 2
_DISPATCH_CTAS_PER_SM = 4  # of 512 threads

_DISPATCH = launch.Kernel("moe/sm90_fp8_moe_dispatch.cu", num_threads=512, is_dependent=True)
_GATE_UP = launch.Kernel(
    "moe/sm90_fp8_moe_gate_up.cu", num_threads=384, shared_bytes=215_040, is_dependent=True
)
_DOWN = launch.Kernel(
    "moe/sm90_fp8_moe_down.cu", num_threads=512, shared_bytes=208_896, is_dependent=True
)
_COMBINE = launch.Kernel("moe/sm90_bf16_moe_combine.cu", num_threads=448, is_dependent=True)

# struct MoeDispatchParams of kernels/moe/sm90_fp8_moe_dispatch.cu.
_DISPATCH_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("topk_ids", "hidden", "scales", "groups", "token_rows")),
        *((name, np.uint64) for name in ("rows", "row_scales")),
        *((name, np.int32) for name in ("num_tokens", "num_columns", "first_expert")),
        *((name, np.int32) for name in ("num_experts", "has_shared", "num_k_blocks")),
        *((name, np.int32) for name in ("row_capacity", "num_weight_tiles", "weight_tile_bytes")),
        ("prefetch_bytes", np.int32),
        ("weights", np.uint64),
    ],
    align=True,
)
# struct MoeGemmParams of kernels/moe/moe_layout.cuh.
_GEMM_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("groups", "weights", "weight_scales", "rows")),
        *((name, np.uint64) for name in ("row_scales", "out", "out_scales")),
        *((name, np.int32) for name in ("num_groups", "row_capacity", "num_weight_rows")),
        *((name, np.int32) for name in ("num_k_blocks", "num_slices")),
    ],
    align=True,
)
# struct MoeCombineParams of kernels/moe/sm90_bf16_moe_combine.cu.
_COMBINE_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("expert_out", "token_rows", "topk_weights", "out")),
        *((name, np.int32) for name in ("num_columns", "num_slices", "row_capacity", "width")),
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """Experts of one layer at hand: routed ones with consecutive ids, then the shared one, if any.

    `gate_up` e4m3[G, 2 * I * H] from `pack_gate_up`, `gate_up_scale` f32[G, 2I / 128, H / 128];
    `down` e4m3[G, H * I] from `pack_down`, `down_scale` f32[G, H / 128, I / 128]. `first_expert`:
    id of group 0. `num_routed`: groups that tokens are routed to; G, or G - 1 with a shared expert.
    A dense FFN is a shared expert alone.
    """

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor
    first_expert: int
    num_routed: int

    @property
    def num_groups(self) -> int:
        """Experts, the shared one included."""
        return self.gate_up_scale.shape[0]

    @property
    def has_shared(self) -> bool:
        """Whether the last group takes every token."""
        return self.num_groups > self.num_routed

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate_up_scale.shape[2] * BLOCK_K

    @property
    def intermediate_size(self) -> int:
        """I, of each expert."""
        return self.down_scale.shape[2] * BLOCK_K


@dataclass(frozen=True, slots=True)
class MoeTokens:
    """What the router sends: hidden states, quantised in groups of 128, and where they go.

    `hidden` e4m3[T, H], `scales` f32[T, H / 128], `topk_ids` i32[T, C], `topk_weights` f32[T, C].
    Ids of experts that are not at hand add nothing. T <= 2048, C <= 8.
    """

    hidden: torch.Tensor
    scales: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class MoeWorkspace:
    """Scratch of one layer's launches, reusable by the next layer on the same stream.

    `groups` i32[G, 2]: first row and number of rows. `token_rows` i32[max tokens * (C + 1)].
    `rows` e4m3[H / 128, R, 128] and `row_scales` f32[H / 128, R]: sorted copies of the tokens.
    `inner` e4m3[I / 128, R, 128] and `inner_scales` f32[I / 128, R]: SwiGLU's result.
    `expert_out` bf16[slices, R, H]. `num_ctas` of the GEMMs: SMs they may use, even.
    """

    groups: torch.Tensor
    token_rows: torch.Tensor
    rows: torch.Tensor
    row_scales: torch.Tensor
    inner: torch.Tensor
    inner_scales: torch.Tensor
    expert_out: torch.Tensor
    max_tokens: int
    num_columns: int
    num_ctas: int


def allocate_moe_workspace(
    experts: Fp8Experts,
    max_tokens: int,
    num_columns: int,
    num_ctas: int | None = None,
    num_slices: int | None = None,
) -> MoeWorkspace:
    """Allocates for up to `max_tokens` tokens of `num_columns` ids, all of them local at worst.

    `num_ctas`: SMs that the GEMMs may use, by default all. `num_slices`: parts of I that the down
    projection sums apart, so that few tiles still keep all SMs busy; by default as many as that
    takes.

    Raises:
        ValueError: a count is out of range.
    """
    device = experts.gate_up.device
    if num_ctas is None:
        num_ctas = launch.num_sms(device) // _CLUSTER_CTAS * _CLUSTER_CTAS
    if num_ctas < _CLUSTER_CTAS or num_ctas % _CLUSTER_CTAS != 0:
        raise ValueError(
            f"num_ctas is {num_ctas}. CTAs work in clusters of {_CLUSTER_CTAS}. Pass an even "
            "number of SMs."
        )
    if not 1 <= max_tokens <= MAX_TOKENS or not 0 <= num_columns <= MAX_COLUMNS:
        raise ValueError(
            f"max_tokens is {max_tokens} and num_columns {num_columns}. The kernels take 1 to "
            f"{MAX_TOKENS} tokens of at most {MAX_COLUMNS} experts. Split the batch."
        )
    if num_slices is None:
        num_slices = _default_slices(experts)
    num_ids = max_tokens * num_columns if experts.num_routed > 0 else 0
    capacity = padded_rows(num_ids + (ROW_ALIGNMENT - 1) * min(experts.num_routed, num_ids))
    capacity += padded_rows(max_tokens) if experts.has_shared else 0
    hidden, inner = experts.hidden_size, experts.intermediate_size

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return MoeWorkspace(
        groups=empty((experts.num_groups, 2), torch.int32),
        token_rows=empty((max_tokens * (num_columns + 1),), torch.int32),
        rows=empty((hidden // BLOCK_K, capacity, BLOCK_K), torch.float8_e4m3fn),
        row_scales=empty((hidden // BLOCK_K, capacity), torch.float32),
        inner=empty((inner // BLOCK_K, capacity, BLOCK_K), torch.float8_e4m3fn),
        inner_scales=empty((inner // BLOCK_K, capacity), torch.float32),
        expert_out=empty((num_slices, capacity, hidden), torch.bfloat16),
        max_tokens=max_tokens,
        num_columns=num_columns,
        num_ctas=num_ctas,
    )


def moe_fp8(
    tokens: MoeTokens, experts: Fp8Experts, workspace: MoeWorkspace, out: torch.Tensor
) -> None:
    """Writes the weighted sum of each token's local experts, and of the shared one, to `out`.

    Args:
        tokens: On the device, contiguous.
        experts: On the same device.
        workspace: From `allocate_moe_workspace` for these experts.
        out: bf16[T, H], contiguous. A token without any local expert gets 0.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    check_layer(tokens, experts, workspace)
    out_shape = (tokens.hidden.shape[0], experts.hidden_size)
    launch.check_tensor("out", out, out_shape, torch.bfloat16, workspace.rows.device)
    if tokens.hidden.shape[0] == 0:
        return
    moe_dispatch(tokens, experts, workspace)
    moe_gate_up(experts, workspace)
    moe_down(experts, workspace)
    moe_combine(tokens, workspace, out)


def moe_dispatch(tokens: MoeTokens, experts: Fp8Experts, workspace: MoeWorkspace) -> None:
    """Fills `groups`, `token_rows`, `rows` and `row_scales`. Arguments are `moe_fp8`'s, checked."""
    num_tokens, num_columns = tokens.topk_ids.shape
    if workspace.rows.device.type == "cpu":
        groups, token_rows = reference_dispatch(
            tokens.topk_ids,
            experts.first_expert,
            experts.num_routed,
            has_shared=experts.has_shared,
        )
        workspace.groups.copy_(torch.tensor(groups, dtype=torch.int32))
        workspace.token_rows[: token_rows.numel()] = token_rows.flatten()
        moe_fp8_reference.copy_rows(
            tokens.hidden, tokens.scales, token_rows, workspace.rows, workspace.row_scales
        )
        return
    params = np.zeros(1, dtype=_DISPATCH_DTYPE)
    params["topk_ids"] = tokens.topk_ids.data_ptr()
    params["hidden"] = tokens.hidden.data_ptr()
    params["scales"] = tokens.scales.data_ptr()
    params["groups"] = workspace.groups.data_ptr()
    params["token_rows"] = workspace.token_rows.data_ptr()
    params["rows"] = workspace.rows.data_ptr()
    params["row_scales"] = workspace.row_scales.data_ptr()
    params["num_tokens"] = num_tokens
    params["num_columns"] = num_columns
    params["first_expert"] = experts.first_expert
    params["num_experts"] = experts.num_routed
    params["has_shared"] = experts.has_shared
    params["num_k_blocks"] = workspace.rows.shape[0]
    params["row_capacity"] = workspace.rows.shape[1]
    num_tiles = experts.num_groups * experts.intermediate_size * 2 // GATE_UP_TILE
    params["num_weight_tiles"] = min(num_tiles, workspace.num_ctas)
    params["weight_tile_bytes"] = GATE_UP_TILE * experts.hidden_size
    params["prefetch_bytes"] = min(PREFETCH_BYTES, GATE_UP_TILE * experts.hidden_size)
    params["weights"] = experts.gate_up.data_ptr()
    num_ctas = min(num_tokens, _DISPATCH_CTAS_PER_SM * workspace.num_ctas)
    _DISPATCH.launch(workspace.rows.device, num_ctas, (params,))


def moe_gate_up(experts: Fp8Experts, workspace: MoeWorkspace) -> None:
    """Fills `inner` and `inner_scales` from the sorted rows."""
    if workspace.rows.device.type == "cpu":
        weights = (experts.gate_up, experts.gate_up_scale)
        rows = (workspace.rows, workspace.row_scales)
        out = (workspace.inner, workspace.inner_scales)
        moe_fp8_reference.gate_up(workspace.groups, weights, rows, out)
        return
    params = _gemm_params(workspace, experts.gate_up, experts.gate_up_scale, workspace.rows)
    params["row_scales"] = workspace.row_scales.data_ptr()
    params["out"] = workspace.inner.data_ptr()
    params["out_scales"] = workspace.inner_scales.data_ptr()
    _GATE_UP.launch(workspace.rows.device, workspace.num_ctas, (params,))


def moe_down(experts: Fp8Experts, workspace: MoeWorkspace) -> None:
    """Fills `expert_out` from `inner`."""
    if workspace.rows.device.type == "cpu":
        weights = (experts.down, experts.down_scale)
        rows = (workspace.inner, workspace.inner_scales)
        moe_fp8_reference.down(workspace.groups, weights, rows, workspace.expert_out)
        return
    params = _gemm_params(workspace, experts.down, experts.down_scale, workspace.inner)
    params["row_scales"] = workspace.inner_scales.data_ptr()
    params["out"] = workspace.expert_out.data_ptr()
    params["num_slices"] = workspace.expert_out.shape[0]
    _DOWN.launch(workspace.rows.device, workspace.num_ctas, (params,))


def moe_combine(tokens: MoeTokens, workspace: MoeWorkspace, out: torch.Tensor) -> None:
    """Writes `out` from `expert_out`."""
    num_slices, capacity, width = workspace.expert_out.shape
    if out.device.type == "cpu":
        token_rows = workspace.token_rows[: out.shape[0] * (tokens.topk_ids.shape[1] + 1)]
        moe_fp8_reference.combine(
            workspace.expert_out, token_rows.view(out.shape[0], -1), tokens.topk_weights, out
        )
        return
    params = np.zeros(1, dtype=_COMBINE_DTYPE)
    params["expert_out"] = workspace.expert_out.data_ptr()
    params["token_rows"] = workspace.token_rows.data_ptr()
    params["topk_weights"] = tokens.topk_weights.data_ptr()
    params["out"] = out.data_ptr()
    params["num_columns"] = tokens.topk_ids.shape[1]
    params["num_slices"] = num_slices
    params["row_capacity"] = capacity
    params["width"] = width
    _COMBINE.launch(out.device, out.shape[0], (params,))


def reference_expert(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Returns one expert's output, SwiGLU re-quantised as the kernels do it.

    Args:
        hidden: f32 or f64 [T, H], dequantised.
        gate_up: [2 * I, H] of the same dtype, dequantised, gate before up.
        down: [H, I], dequantised.
    """
    gate, up = (hidden @ gate_up.T).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    return dequantize_groups(*quantize_groups(inner), hidden.dtype) @ down.T


def _gemm_params(
    workspace: MoeWorkspace, weights: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor
) -> Any:
    params = np.zeros(1, dtype=_GEMM_DTYPE)
    params["groups"] = workspace.groups.data_ptr()
    params["weights"] = weights.data_ptr()
    params["weight_scales"] = scales.data_ptr()
    params["rows"] = rows.data_ptr()
    params["num_groups"] = workspace.groups.shape[0]
    params["row_capacity"] = rows.shape[1]
    params["num_weight_rows"] = scales.shape[1] * BLOCK_K
    params["num_k_blocks"] = rows.shape[0]
    params["num_slices"] = 1
    return params


def _default_slices(experts: Fp8Experts) -> int:
    return 3 if experts.num_groups == 1 else 1


def check_layer(tokens: MoeTokens, experts: Fp8Experts, workspace: MoeWorkspace) -> None:
    """Checks what a layer's launches take.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    device = workspace.rows.device
    hidden, inner, groups = experts.hidden_size, experts.intermediate_size, experts.num_groups
    fp8, f32 = torch.float8_e4m3fn, torch.float32
    scale_blocks = (hidden // BLOCK_K, inner // BLOCK_K)
    launch.check_tensor("gate_up", experts.gate_up, (groups, 2 * inner * hidden), fp8, device)
    launch.check_tensor(
        "gate_up_scale",
        experts.gate_up_scale,
        (groups, 2 * scale_blocks[1], scale_blocks[0]),
        f32,
        device,
    )
    launch.check_tensor("down", experts.down, (groups, hidden * inner), fp8, device)
    launch.check_tensor("down_scale", experts.down_scale, (groups, *scale_blocks), f32, device)
    launch.check_tensor("hidden", tokens.hidden, (-1, hidden), fp8, device)
    num_tokens = tokens.hidden.shape[0]
    launch.check_tensor("scales", tokens.scales, (num_tokens, scale_blocks[0]), f32, device)
    launch.check_tensor("topk_ids", tokens.topk_ids, (num_tokens, -1), torch.int32, device)
    launch.check_tensor("topk_weights", tokens.topk_weights, tokens.topk_ids.shape, f32, device)
    num_columns = tokens.topk_ids.shape[1]
    if num_tokens > workspace.max_tokens or num_columns != workspace.num_columns:
        raise ValueError(
            f"{num_tokens} tokens of {num_columns} ids do not fit a workspace for "
            f"{workspace.max_tokens} tokens of {workspace.num_columns}. Allocate a larger one."
        )
    shapes = (workspace.rows.shape[0], workspace.inner.shape[0], workspace.groups.shape[0])
    if shapes != (*scale_blocks, groups):
        raise ValueError(
            f"The workspace was allocated for H / 128, I / 128, G = {shapes}, the experts have "
            f"{(*scale_blocks, groups)}. Allocate one for these experts."
        )
    if experts.num_routed not in (groups - 1, groups) or groups > MAX_GROUPS:
        raise ValueError(
            f"{experts.num_routed} of {groups} experts are routed. All or all but one are, of at "
            f"most {MAX_GROUPS}. Pass the shared expert as the last one."
        )
