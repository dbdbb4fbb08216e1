"""Launches one decoder layer, on a Hopper GPU or (for tests) the CPU, between given buffers.

Owns which kernel computes which part; allocates nothing once its buffers exist, waits for nothing.
Step-3's own sizes run fused kernels throughout. Other sizes run the same matrix, attention and
expert kernels, with norms and the router from torch.
"""

from dataclasses import dataclass

import torch

from step3rt.model.config import Step3Config
from step3rt.model.gpu_weights import (
    Bf16Experts,
    Fp8Matrix,
    GpuLayerWeights,
    GpuWeights,
    Matrix,
)
from step3rt.ops import router_topk
from step3rt.ops.linear import linear_bf16
from step3rt.ops.linear_fp8 import linear_fp8
from step3rt.ops.mfa_decode import MfaBatch, mfa_decode_bf16, mfa_decode_fp8
from step3rt.ops.mfa_prefill import PrefillBatch, mfa_prefill_bf16, mfa_prefill_fp8
from step3rt.ops.mfa_schedule import HEAD_DIM
from step3rt.ops.moe_fp8 import Fp8Experts, MoeTokens, MoeWorkspace, allocate_moe_workspace, moe_fp8
from step3rt.ops.norm import rms_norm
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.quantize_groups import quantize_groups_fp8
from step3rt.ops.rmsnorm_quantize import (
    HIDDEN_SIZE,
    QUERY_RANK,
    NormOutputs,
    QuantizedRows,
    add_rmsnorm_quantize,
    rmsnorm_quantize,
)
from step3rt.ops.rope_append import RopeTokens, rope_append_bf16, rope_append_fp8
from step3rt.ops.router import route
from step3rt.ops.sums_rmsnorm_quantize import add_sums_rmsnorm_quantize

# Of the tokens of a step: positions i32[T], slots i32[T], and the rotation table f32[P, 256].
Places = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """What the rows of a step attend to; one of the two at least.

    `decode` has a sequence for every row, those of `prefill` with length 0, and goes first: it sets
    the rows of empty sequences to 0. Without it, only the rows of `prefill` attend to anything.
    """

    decode: MfaBatch | None
    prefill: PrefillBatch | None = None


@dataclass(frozen=True, slots=True)
class LayerBuffers:
    """Activations of T tokens, used by every layer in turn.

    bf16: `residual` [T, H], `normed` [T, H], `qkv` [T, R + 512], `q` [T, N, 256], `attended`
    [T, N, 256], `normed_latent` [T, R], `projected` [1, T, H], `partial_sums` [n, T, H]. FP8:
    `hidden` [T, H], `latent` [T, R], `rows_fp8` [T, N * 256], `q_fp8` [T, N, 256] with a scale per
    head. `topk`: ids i32[T, K] and weights f32[T, K]. `workspaces`: of each shape of experts.
    Of `attended` and `rows_fp8`, the same in two formats, a step may use only the latter.
    """

    residual: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    attended: torch.Tensor
    normed_latent: torch.Tensor
    projected: torch.Tensor
    partial_sums: torch.Tensor
    hidden: QuantizedRows
    latent: QuantizedRows
    rows_fp8: QuantizedRows
    q_fp8: tuple[torch.Tensor, torch.Tensor]
    topk: tuple[torch.Tensor, torch.Tensor]
    workspaces: dict[tuple[int, int, int], MoeWorkspace]

    @classmethod
    def allocate(cls, weights: GpuWeights, num_tokens: int) -> "LayerBuffers":
        """Allocates for up to `num_tokens` tokens of a model."""
        config = weights.config
        device = weights.embed_tokens.device
        hidden, heads = config.hidden_size, config.num_heads
        num_sums = max(len(layer.experts) for layer in weights.layers)

        def bf16(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device=device)

        workspaces: dict[tuple[int, int, int], MoeWorkspace] = {}
        for layer in weights.layers:
            for experts in layer.experts:
                if isinstance(experts, Fp8Experts) and _shape_of(experts) not in workspaces:
                    columns = config.top_k if experts.num_routed else 0
                    workspaces[_shape_of(experts)] = allocate_moe_workspace(
                        experts, num_tokens, columns
                    )
        return cls(
            residual=bf16(num_tokens, hidden),
            normed=bf16(num_tokens, hidden),
            qkv=bf16(num_tokens, config.query_rank + 2 * HEAD_DIM),
            q=bf16(num_tokens, heads, HEAD_DIM),
            attended=bf16(num_tokens, heads, HEAD_DIM),
            normed_latent=bf16(num_tokens, config.query_rank),
            projected=bf16(1, num_tokens, hidden),
            partial_sums=bf16(num_sums, num_tokens, hidden),
            hidden=QuantizedRows.empty(num_tokens, hidden, device),
            latent=QuantizedRows.empty(num_tokens, config.query_rank, device),
            rows_fp8=QuantizedRows.empty(num_tokens, heads * HEAD_DIM, device),
            q_fp8=(
                torch.empty(num_tokens, heads, HEAD_DIM, dtype=torch.float8_e4m3fn, device=device),
                torch.empty(num_tokens, heads, device=device),
            ),
            topk=(
                torch.zeros(num_tokens, max(config.top_k, 1), dtype=torch.int32, device=device),
                torch.zeros(num_tokens, max(config.top_k, 1), device=device),
            ),
            workspaces=workspaces,
        )

    def rows(self, num_tokens: int) -> "LayerBuffers":
        """Returns the same memory for a step of `num_tokens`, each buffer contiguous."""

        def cut(buffer: torch.Tensor) -> torch.Tensor:
            return buffer[:num_tokens]

        def cut_rows(buffer: QuantizedRows) -> QuantizedRows:
            return QuantizedRows(cut(buffer.values), cut(buffer.scales))

        num_sums, _, hidden = self.partial_sums.shape
        sums = self.partial_sums.flatten()[: num_sums * num_tokens * hidden]
        return LayerBuffers(
            residual=cut(self.residual),
            normed=cut(self.normed),
            qkv=cut(self.qkv),
            q=cut(self.q),
            attended=cut(self.attended),
            normed_latent=cut(self.normed_latent),
            projected=self.projected[:, :num_tokens],
            partial_sums=sums.view(num_sums, num_tokens, hidden),
            hidden=cut_rows(self.hidden),
            latent=cut_rows(self.latent),
            rows_fp8=cut_rows(self.rows_fp8),
            q_fp8=(cut(self.q_fp8[0]), cut(self.q_fp8[1])),
            topk=(cut(self.topk[0]), cut(self.topk[1])),
            workspaces=self.workspaces,
        )

    def norm_only(self, weight: torch.Tensor, eps: float, *, fills_normed: bool) -> None:
        """Normalises and quantises the residual: the first layer's input."""
        self.add_and_norm(self.partial_sums[:0], weight, eps, fills_normed=fills_normed)

    def add_and_norm(
        self, sums: torch.Tensor, weight: torch.Tensor, eps: float, *, fills_normed: bool
    ) -> None:
        """Adds bf16[n, T, H] to the residual; fills `hidden` from it, and `normed` if asked to.

        Otherwise `normed` is undefined: rows that nobody reads cost time to store.
        """
        if self.residual.shape[1] == HIDDEN_SIZE:
            out = self._norm_outputs(fills_normed=fills_normed)
            add_rmsnorm_quantize(self.residual, sums, weight, out, eps)
            return
        if sums.shape[0]:
            self.residual.add_(sums.float().sum(dim=0).bfloat16())
        self.normed.copy_(rms_norm(self.residual, weight, eps))
        _quantize(self.normed, self.hidden)

    def add_sums_and_norm(
        self,
        sums: torch.Tensor,
        present: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        fills_normed: bool,
    ) -> None:
        """As `add_and_norm`, of sums that lie in slots: see `ops.sums_rmsnorm_quantize`."""
        out = self._norm_outputs(fills_normed=fills_normed)
        add_sums_rmsnorm_quantize(self.residual, sums, present, weight, out, eps)

    def _norm_outputs(self, *, fills_normed: bool) -> NormOutputs:
        return NormOutputs(self.residual, self.normed if fills_normed else None, self.hidden)


class LayerRunner:
    """One layer: its weights and its KV cache."""

    def __init__(
        self, config: Step3Config, weights: GpuLayerWeights, kv: torch.Tensor, *, is_fp8_kv: bool
    ) -> None:
        """Keeps what a launch needs; `kv` is the layer's cache, in the decode kernel's format."""
        self._config = config
        self._weights = weights
        self._kv = kv
        self._is_fp8_kv = is_fp8_kv
        self._softmax_scale = config.head_dim**-0.5
        self._has_fused_router = (config.hidden_size, config.top_k) == (
            HIDDEN_SIZE,
            router_topk.TOP_K,
        ) and config.num_experts <= router_topk.MAX_EXPERTS
        self.reads_normed = not isinstance(weights.qkv, Fp8Matrix)
        """Whether the layer reads its normed input in bf16 too."""
        self._ffn_reads_normed = weights.router is not None or any(
            isinstance(experts, Bf16Experts) for experts in weights.experts
        )

    def launch(
        self,
        buffers: LayerBuffers,
        work: AttentionWork,
        places: Places,
        next_norm: torch.Tensor,
        *,
        fills_normed: bool,
    ) -> None:
        """Computes the layer on the current stream.

        `buffers.hidden` is the normed input, `buffers.residual` what it was made from. Afterwards
        they are those of the next layer, whose input norm (or the final norm) is `next_norm`;
        `fills_normed`: whether that is wanted in bf16 too.
        """
        self.launch_attention(buffers, work, places)
        self._compute_ffn(buffers)
        self.launch_next_norm(buffers, next_norm, fills_normed=fills_normed)

    def launch_next_norm(
        self, buffers: LayerBuffers, next_norm: torch.Tensor, *, fills_normed: bool
    ) -> None:
        """Adds what the FFN gave to the residual and normalises it for the next layer."""
        sums = buffers.partial_sums[: len(self._weights.experts)]
        eps = self._config.rms_norm_eps
        buffers.add_and_norm(sums, next_norm, eps, fills_normed=fills_normed)

    def launch_attention(self, buffers: LayerBuffers, work: AttentionWork, places: Places) -> None:
        """Computes the attention side: up to the FFN's quantised input and the router's choice."""
        self._attend(buffers, work, places)
        eps = self._config.rms_norm_eps
        norm = self._weights.post_attention_norm
        buffers.add_and_norm(buffers.projected, norm, eps, fills_normed=self._ffn_reads_normed)
        self._route(buffers)

    def _attend(self, buffers: LayerBuffers, work: AttentionWork, places: Places) -> None:
        weights, rank = self._weights, self._config.query_rank
        positions, slots, table = places
        _linear(buffers.normed, buffers.hidden, weights.qkv, buffers.qkv)
        self._norm_latent(buffers)
        _linear(buffers.normed_latent, buffers.latent, weights.wq, buffers.q.flatten(1))
        tokens = RopeTokens(buffers.q, buffers.qkv[:, rank:], positions, slots)
        # Decode quantises its own output, unless the prefill kernel overwrites rows of it.
        is_quantized = isinstance(weights.o_proj, Fp8Matrix)
        is_fused = is_quantized and work.prefill is None
        out = buffers.rows_fp8 if is_fused else buffers.attended
        if self._is_fp8_kv:
            rope_append_fp8(tokens, table, buffers.q_fp8, self._kv)
            self._attend_fp8(buffers, work, out)
        else:
            rope_append_bf16(tokens, table, buffers.q, self._kv)
            self._attend_bf16(buffers, work, out)
        attended = buffers.attended.flatten(1)
        if is_quantized and not is_fused:
            quantize_groups_fp8(attended, buffers.rows_fp8)
        _linear(attended, buffers.rows_fp8, weights.o_proj, buffers.projected[0])

    def _attend_bf16(
        self, buffers: LayerBuffers, work: AttentionWork, out: torch.Tensor | QuantizedRows
    ) -> None:
        q, kv, scale = buffers.q, self._kv, self._softmax_scale
        if work.decode is not None:
            mfa_decode_bf16(q, kv, work.decode, out, scale)
        if work.prefill is not None:
            mfa_prefill_bf16(q, kv, work.prefill, buffers.attended, scale)

    def _attend_fp8(
        self, buffers: LayerBuffers, work: AttentionWork, out: torch.Tensor | QuantizedRows
    ) -> None:
        (q, q_scale), kv, scale = buffers.q_fp8, self._kv, self._softmax_scale
        if work.decode is not None:
            mfa_decode_fp8(q, q_scale, kv, work.decode, out, scale)
        if work.prefill is not None:
            mfa_prefill_fp8(q, q_scale, kv, work.prefill, buffers.attended, scale)

    def _norm_latent(self, buffers: LayerBuffers) -> None:
        rank, eps = self._config.query_rank, self._config.rms_norm_eps
        latent = buffers.qkv[:, :rank]
        if rank == QUERY_RANK and isinstance(self._weights.wq, Fp8Matrix):
            rmsnorm_quantize(latent, self._weights.inter_norm, buffers.latent, eps)
            return
        buffers.normed_latent.copy_(rms_norm(latent, self._weights.inter_norm, eps))
        _quantize(buffers.normed_latent, buffers.latent)

    def _compute_ffn(self, buffers: LayerBuffers) -> None:
        for index, experts in enumerate(self._weights.experts):
            ids, weights = buffers.topk
            if not experts.num_routed:
                ids, weights = ids[:, :0], weights[:, :0]
            if isinstance(experts, Bf16Experts):
                _compute_bf16(buffers, experts, buffers.partial_sums[index])
                continue
            tokens = MoeTokens(buffers.hidden.values, buffers.hidden.scales, ids, weights)
            workspace = buffers.workspaces[_shape_of(experts)]
            moe_fp8(tokens, experts, workspace, buffers.partial_sums[index])

    def _route(self, buffers: LayerBuffers) -> None:
        gate = self._weights.router
        if gate is None:
            return
        is_normalised = self._config.norm_expert_weight
        if self._has_fused_router:
            router_topk.route_topk(buffers.normed, gate, buffers.topk, is_normalised=is_normalised)
            return
        logits = linear_bf16(buffers.normed, gate)
        ids, weights = route(logits, self._config.top_k, is_normalised=is_normalised)
        buffers.topk[0].copy_(ids)
        buffers.topk[1].copy_(weights)


def _linear(x: torch.Tensor, rows: QuantizedRows, matrix: Matrix, out: torch.Tensor) -> None:
    """Multiplies with what the matrix needs: rows in FP8, or `x`, the same in bf16."""
    if isinstance(matrix, Fp8Matrix):
        linear_fp8(rows.values, rows.scales, matrix.values, matrix.scales, out)
    else:
        linear_bf16(x, matrix, out)


def _compute_bf16(buffers: LayerBuffers, experts: Bf16Experts, out: torch.Tensor) -> None:
    """Every expert computes every token: counts stay unknown to the host, as a graph needs."""
    ids, weights = buffers.topk
    total = torch.zeros_like(out, dtype=torch.float32)
    for index in range(experts.down.shape[0]):
        gate, up = linear_bf16(buffers.normed, experts.gate_up[index]).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        output = linear_bf16(inner, experts.down[index]).float()
        if index < experts.num_routed:
            output *= (weights * (ids == index)).sum(dim=1, keepdim=True)
        total += output
    out.copy_(total)


def _quantize(rows: torch.Tensor, out: QuantizedRows) -> None:
    out.copy_(*quantize_groups(rows))


def _shape_of(experts: Fp8Experts) -> tuple[int, int, int]:
    return experts.num_groups, experts.num_routed, experts.intermediate_size
