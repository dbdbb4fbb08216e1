"""The theoretical cost of a decoded token: section 4 of the Step-3 paper, from configs.

Owns FLOPs and bytes per token, their price, and the minimum sparsity of section 5.4. Assumes full
utilisation as the paper does; what a deployment reaches is `stages` and `simulate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from step3rt.plan.architecture import STATE_FLOPS_PER_ELEMENT, AttentionLayer, Model
from step3rt.plan.hardware import Hardware

TOKENS_PER_PRICE = 1e6

# Section 5.4: two of three pipeline stages' time, 16.6 ms each, over the three bytes that a token
# and hidden unit cost on the network (FP8 there, BF16 back), at two FLOPs per weight byte:
# 16.6 ms * 2 / 3. The paper rounds it to 11.1 ms.
NETWORK_BUDGET_S = 0.0111

DTYPE_BYTES = {"fp8": 1.0, "bfloat16": 2.0, "float32": 4.0}


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per element of what a decode step reads. Weights have one byte throughout.

    Attributes:
        kv_bytes: KV of layers that attend to all of the context.
        window_kv_bytes: KV of layers that attend to a window or chunk.
        state_bytes: recurrent state of linear attention; it is read and written each step.
    """

    kv_bytes: float = 1.0
    window_kv_bytes: float = 1.0
    state_bytes: float = 4.0


def paper_precision(model: Model, kv_dtype: str | None = None) -> Precision:
    """The quantisation that section 4.1 of the Step-3 paper gives each family.

    Args:
        model: the model.
        kv_dtype: another type for the KV of full attention layers, one of DTYPE_BYTES.

    FP8 throughout for MFA, MLA and GQA models (INT8 where a card has no FP8). Hybrids keep BF16
    KV in their full attention layers, FP8 KV in chunked ones, FP32 linear attention states.
    """
    if kv_dtype is not None:
        return Precision(kv_bytes=DTYPE_BYTES[kv_dtype])
    return Precision(kv_bytes=2.0 if model.is_hybrid else 1.0)


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What one decoded token costs at one context length (paper tables 2 and 3).

    Attributes:
        kv_bytes: KV and state bytes read, and state bytes written.
        attn_flops: FLOPs of scores, values and states.
        linear_flops: FLOPs of the projections before and after attention.
        ffn_flops: FLOPs of the FFNs; embedding and LM head are left out, as in the paper.
    """

    kv_bytes: float
    attn_flops: float
    linear_flops: float
    ffn_flops: float

    @property
    def arithmetic_intensity(self) -> float:
        """Attention FLOPs per byte of KV."""
        return self.attn_flops / self.kv_bytes if self.kv_bytes else 0.0

    def attention_usd(self, card: Hardware) -> float:
        """Attention cost of 1M tokens: the larger of compute and memory, plus projections."""
        core = max(self.attn_flops * card.usd_per_flop, self.kv_bytes * card.usd_per_byte)
        return TOKENS_PER_PRICE * (core + self.linear_flops * card.usd_per_flop)

    def ffn_usd(self, card: Hardware) -> float:
        """FFN cost of 1M tokens, compute-bound."""
        return TOKENS_PER_PRICE * self.ffn_flops * card.usd_per_flop


def layer_kv_bytes(layer: AttentionLayer, context_tokens: float, precision: Precision) -> float:
    """KV and state bytes that one token moves in one layer."""
    element_bytes = precision.window_kv_bytes if layer.kind == "window" else precision.kv_bytes
    kv = layer.kv_elements * layer.attended_tokens(context_tokens) * element_bytes
    return kv + 2 * layer.state_elements * precision.state_bytes


def layer_core_flops(layer: AttentionLayer, context_tokens: float) -> float:
    """FLOPs of scores, values and states of one token in one layer."""
    from_kv = layer.core_flops * layer.attended_tokens(context_tokens)
    return from_kv + STATE_FLOPS_PER_ELEMENT * layer.state_elements


def token_cost(model: Model, context_tokens: int, precision: Precision | None = None) -> TokenCost:
    """The cost of one token of `model` with `context_tokens` behind it.

    Args:
        model: the model.
        context_tokens: cached tokens that it attends to; 8K is 8192.
        precision: bytes per element; the paper's rules by default.
    """
    precision = precision or paper_precision(model)
    groups = model.groups
    return TokenCost(
        kv_bytes=sum(
            g.count * layer_kv_bytes(g.attention, context_tokens, precision) for g in groups
        ),
        attn_flops=sum(g.count * layer_core_flops(g.attention, context_tokens) for g in groups),
        linear_flops=sum(2.0 * g.count * g.attention.linear_params for g in groups),
        ffn_flops=sum(2.0 * g.count * g.ffn.active_params for g in groups),
    )


@dataclass(frozen=True, slots=True)
class AfdCost:
    """The cheapest attention card plus the cheapest FFN card, in USD per 1M tokens."""

    attention_card: str
    ffn_card: str
    usd: float


def afd_cost(cost: TokenCost, cards: Iterable[Hardware]) -> AfdCost:
    """Attention and FFN each on the card that is cheapest for it (paper section 4.2)."""
    cards = list(cards)
    attention = min(cards, key=cost.attention_usd)
    ffn = min(cards, key=cost.ffn_usd)
    return AfdCost(attention.key, ffn.key, cost.attention_usd(attention) + cost.ffn_usd(ffn))


def min_moe_sparsity(hidden_size: int, num_layers: int, card: Hardware) -> float:
    """The sparsest MoE that `card` runs at full rate with the network hidden (paper table 7).

    A host's cards share one FFN batch, so its NICs count together while compute per byte of
    memory is a card's.
    """
    host_nic_bytes_per_s = card.nic_bytes_per_s * card.gpus_per_host
    return hidden_size * card.roofline * num_layers / (host_nic_bytes_per_s * NETWORK_BUDGET_S)
