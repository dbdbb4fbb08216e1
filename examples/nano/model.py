"""The Step-3 text architecture in torch, small enough to train in minutes.

Never reads or writes files. Its `state_dict` has the tensor names of a Step-3 checkpoint.

Dimensions: B sequences, T tokens, H hidden, N query heads, D head dim, E experts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes, named as in a Step-3 config.json. Those of linear layers are multiples of 128."""

    vocab_size: int = 3072
    hidden_size: int = 384
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    head_dim: int = 128
    share_q_dim: int = 256
    moe_layers: tuple[int, ...] = (1, 2, 3, 4)
    moe_num_experts: int = 8
    moe_top_k: int = 3
    moe_intermediate_size: int = 128
    share_expert_dim: int = 256
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    max_position_embedding: int = 4096


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        """Starts with weight 1."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Norms [..., H] to the dtype that came in."""
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(hidden.dtype) * self.weight.to(hidden.dtype)


def rotary_table(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines, float32[max_position_embedding, D/2] each."""
    half = torch.arange(config.head_dim // 2, dtype=torch.float64, device=device)
    inv_freq = config.rope_theta ** (-2.0 * half / config.head_dim)
    positions = torch.arange(config.max_position_embedding, dtype=torch.float64, device=device)
    angles = torch.outer(positions, inv_freq)
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies half-split RoPE to `heads` [..., T, D]: dimension j pairs with j + D/2."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
        heads.dtype
    )


class Attention(nn.Module):
    """Multi-Matrix Factorization Attention: low-rank queries, one K and one V head for all."""

    def __init__(self, config: ModelConfig) -> None:
        """Makes the five projections and the norm of the low-rank query."""
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.share_q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.inter_norm = RMSNorm(config.share_q_dim, config.rms_norm_eps)
        self.wq = nn.Linear(config.share_q_dim, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, kv_dtype: torch.dtype | None
    ) -> Tensor:
        """Maps [B, T, H] to [B, T, H]; see `Step3.forward` for `kv_dtype`."""
        batch, tokens, _ = hidden.shape
        query = self.wq(self.inter_norm(self.q_proj(hidden)))
        query = rotate(
            query.view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2), cos, sin
        )
        key = rotate(self.k_proj(hidden)[:, None], cos, sin)
        value = self.v_proj(hidden)[:, None]
        if kv_dtype is not None:
            key, value = key.to(kv_dtype).to(key.dtype), value.to(kv_dtype).to(value.dtype)
        heads = functional.scaled_dot_product_attention(
            query, key.expand_as(query), value.expand_as(query), is_causal=True
        )
        return self.o_proj(heads.transpose(1, 2).reshape(batch, tokens, -1))


class SwiGLU(nn.Module):
    """Dense feed-forward network, of a dense layer or the shared expert."""

    def __init__(self, hidden_size: int, width: int) -> None:
        """Makes gate and up [width, H] and down [H, width]."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [..., H] to [..., H]."""
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class StackedWeights(nn.Module):
    """One matrix for each expert: `weight` [E, out, in]."""

    def __init__(self, num_experts: int, out_size: int, in_size: int) -> None:
        """Leaves the weight unset; `Step3` initialises all of them."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_size, in_size))


class MoE(nn.Module):
    """Routed experts: softmax over all of them in float32, then top-k without renormalisation.

    All experts run on all tokens and the router's zeros select: at these sizes large products beat
    a gather. A serving runtime does not do this.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Makes the router and the stacked experts."""
        super().__init__()
        experts, width, hidden = (
            config.moe_num_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        self.top_k = config.moe_top_k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_proj = StackedWeights(experts, width, hidden)
        self.up_proj = StackedWeights(experts, width, hidden)
        self.down_proj = StackedWeights(experts, hidden, width)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, T, H] to [B, T, H] and the load-balancing loss, which is 1 when balanced."""
        probabilities = self.gate(hidden).float().softmax(dim=-1)
        topk_weights, topk_ids = probabilities.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, topk_ids, topk_weights)

        gate = functional.linear(hidden, self.gate_proj.weight.flatten(0, 1))
        up = functional.linear(hidden, self.up_proj.weight.flatten(0, 1))
        activated = (functional.silu(gate) * up).unflatten(-1, (len(self.gate_proj.weight), -1))
        weighted = (activated * weights[..., None].to(activated.dtype)).flatten(-2)
        out = functional.linear(weighted, self.down_proj.weight.transpose(0, 1).flatten(1))

        load = (weights > 0).float().mean(dim=(0, 1)) / self.top_k
        balance = len(load) * (load * probabilities.mean(dim=(0, 1))).sum()
        return out, balance


class Layer(nn.Module):
    """One decoder layer, dense or MoE with a shared expert."""

    def __init__(self, config: ModelConfig, *, is_moe: bool, dropout: float) -> None:
        """Makes a dense layer, or a MoE layer with its shared expert."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = is_moe
        if is_moe:
            self.moe = MoE(config)
            self.share_expert = SwiGLU(config.hidden_size, config.share_expert_dim)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, kv_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """Maps [B, T, H] to [B, T, H], and the load-balancing loss of a MoE layer."""
        hidden = hidden + self.dropout(
            self.self_attn(self.input_layernorm(hidden), cos, sin, kv_dtype)
        )
        normed = self.post_attention_layernorm(hidden)
        if not self.is_moe:
            return hidden + self.dropout(self.mlp(normed)), None
        routed, balance = self.moe(normed)
        return hidden + self.dropout(routed + self.share_expert(normed)), balance


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        """Makes the layers named by `config`."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(config, is_moe=i in config.moe_layers, dropout=dropout)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Step3(nn.Module):
    """The whole text model with an untied head."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        """Initialises all matrices; norms start at 1."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                # Branch outputs add up over the depth of the residual stream.
                is_branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = (
                    INIT_STD / (2 * config.num_hidden_layers) ** 0.5 if is_branch_end else INIT_STD
                )
                nn.init.normal_(weight, std=std)

    def forward(
        self, token_ids: Tensor, kv_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps int64[B, T] to logits [B, T, V] and the mean load-balancing loss of the MoE layers.

        `kv_dtype` rounds K (after RoPE) and V to that type with scale 1, as such a KV cache does.
        """
        cos, sin = rotary_table(self.config, token_ids.device)
        cos, sin = cos[: token_ids.shape[1]], sin[: token_ids.shape[1]]
        hidden = self.model.dropout(self.model.embed_tokens(token_ids))
        balances = []
        for layer in self.model.layers:
            hidden, balance = layer(hidden, cos, sin, kv_dtype)
            if balance is not None:
                balances.append(balance)
        return self.lm_head(self.model.norm(hidden)), torch.stack(balances).mean()
