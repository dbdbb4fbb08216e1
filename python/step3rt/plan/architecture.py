"""What a model is to the planner: its layers as sizes, nothing that depends on hardware.

Owns the arithmetic from layer shapes to bytes, FLOPs and parameters; never reads files
(`hf_config` does) and never knows precision beyond the element counts given here.
"""

from dataclasses import dataclass, replace
from typing import Literal

from step3rt.errors import InvalidArgument

AttentionKind = Literal["mfa", "mla", "gqa", "window", "linear"]

# Lightning attention per element of the recurrent state: outer product, decay, accumulate, and
# a multiply-add to read out, which the paper's table 2 counts twice (0.734 GFLOPs of MiniMax M1
# over 70 layers of 64 x 128 x 128 elements is 10 a piece); it keeps the state in FP32.
STATE_FLOPS_PER_ELEMENT = 10

MAX_EXPERTS = 65_536


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One layer's attention.

    Attributes:
        kind: the family; "window" is attention to a window or chunk of the context.
        kv_elements: cached elements per token; 0 for linear attention.
        core_flops: FLOPs of scores and values per cached token and query token.
        linear_params: weights of the projections before and after.
        effective_rank: heads x head dim of the query-key circuit (Step-3 paper section 5.1).
        window_tokens: tokens that are attended to at most; None is all.
        state_elements: elements of the recurrent state of linear attention.
    """

    kind: AttentionKind
    kv_elements: int
    core_flops: int
    linear_params: int
    effective_rank: int
    window_tokens: int | None = None
    state_elements: int = 0

    def attended_tokens(self, context_tokens: float) -> float:
        """Cached tokens that one query token reads."""
        if self.window_tokens is None:
            return context_tokens
        return min(context_tokens, float(self.window_tokens))


@dataclass(frozen=True, slots=True)
class FfnLayer:
    """One layer's feed-forward network, dense (no experts) or a mixture of experts.

    Attributes:
        dense_params: weights that every token uses: a dense FFN, or the shared experts.
        expert_params: weights of one routed expert.
        num_experts: routed experts; 0 if the layer is dense.
        top_k: routed experts per token.
        router_params: weights of the router; it runs on the attention side.
    """

    dense_params: int
    expert_params: int = 0
    num_experts: int = 0
    top_k: int = 0
    router_params: int = 0

    @property
    def active_params(self) -> int:
        """Weights that one token uses."""
        return self.dense_params + self.top_k * self.expert_params

    @property
    def total_params(self) -> int:
        """Weights of the layer."""
        return self.dense_params + self.num_experts * self.expert_params


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of the same shape. Order within the model does not matter to the planner."""

    count: int
    attention: AttentionLayer
    ffn: FfnLayer


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder as groups of equal layers.

    Attributes:
        name: what the user calls it.
        hidden_size: width of the residual stream, H.
        vocab_size: rows of the embedding and of the LM head.
        is_tied: whether the LM head is the embedding.
        groups: the layers.
    """

    name: str
    hidden_size: int
    vocab_size: int
    is_tied: bool
    groups: tuple[LayerGroup, ...]

    @property
    def num_layers(self) -> int:
        """Layers of all groups."""
        return sum(group.count for group in self.groups)

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers attend to all of the context and others do not."""
        kinds = {group.attention.kind for group in self.groups}
        return bool(kinds & {"window", "linear"}) and bool(kinds - {"window", "linear"})

    @property
    def attention_params(self) -> int:
        """Weights of all projections around attention, routers included."""
        return sum(
            group.count * (group.attention.linear_params + group.ffn.router_params)
            for group in self.groups
        )

    @property
    def ffn_params(self) -> int:
        """Weights of all FFNs."""
        return sum(group.count * group.ffn.total_params for group in self.groups)

    @property
    def embedding_params(self) -> int:
        """Weights of the input table; the LM head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def total_params(self) -> int:
        """All weights except norms and biases, which are under 0.01 %."""
        tables = 1 if self.is_tied else 2
        return self.attention_params + self.ffn_params + tables * self.embedding_params

    @property
    def active_params(self) -> int:
        """Weights that one token multiplies with: all but the input table."""
        active = sum(group.count * group.ffn.active_params for group in self.groups)
        return self.attention_params + active + self.embedding_params

    @property
    def effective_rank(self) -> int:
        """Attention's effective rank; of hybrids, that of their full layers."""
        return max(group.attention.effective_rank for group in self.groups)

    @property
    def sparsity(self) -> float | None:
        """Share of the experts that a token uses, shared expert included; None without experts.

        A shared expert wider than a routed one counts as so many routed ones (Step-3 paper
        section 5.4: Step-3 is "around 0.08", DeepSeek-V3 9 of 257).
        """
        moe = [group.ffn for group in self.groups if group.ffn.num_experts]
        if not moe:
            return None
        layer = moe[0]
        shared = layer.dense_params / layer.expert_params
        return (layer.top_k + shared) / (layer.num_experts + shared)

    def with_num_experts(self, num_experts: int) -> "Model":
        """The same model with that many routed experts in its MoE layers.

        A slice of a deployment runs so: each FFN GPU carries what it would in the full one.

        Raises:
            InvalidArgument: fewer than a token takes, or more than the planner counts.
        """
        top_k = max(group.ffn.top_k for group in self.groups)
        if not max(top_k, 1) <= num_experts <= MAX_EXPERTS:
            raise InvalidArgument(
                f"The slice has {num_experts} routed experts. A token of {self.name!r} takes "
                f"{top_k} different ones, and the planner counts up to {MAX_EXPERTS}. Correct the "
                "number"
            )
        groups = tuple(
            replace(group, ffn=replace(group.ffn, num_experts=num_experts))
            if group.ffn.num_experts
            else group
            for group in self.groups
        )
        return replace(self, groups=groups)
