"""Owns the order of Step-3's layers on the attention side; it never computes an expert.

`forward` is a generator: at each layer it hands out the input of the FFN and is resumed with the
FFN's output. Whoever drives it decides where FFNs run: `model.monolithic` in place, the attention
instance's step loop on FFN instances, while other lanes compute.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch

from step3rt.model.batch import Batch
from step3rt.model.config import Step3Config
from step3rt.model.kv_cache import KvCache
from step3rt.model.weights import AttentionLayerWeights, AttentionWeights
from step3rt.ops.linear import linear
from step3rt.ops.mfa_attention import append_kv, paged_mfa_attention
from step3rt.ops.norm import rms_norm
from step3rt.ops.rotary import rotate
from step3rt.ops.router import route


@dataclass(frozen=True, slots=True)
class FfnRequest:
    """The input of one layer's FFN.

    hidden: float[T, H], normed, in the compute dtype. topk_ids: i32[T, K] and topk_weights:
    f32[T, K]; K is 0 in a dense layer.
    """

    layer: int
    hidden: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def forward(
    batch: Batch, config: Step3Config, weights: AttentionWeights, kv: KvCache
) -> Generator[FfnRequest, torch.Tensor, torch.Tensor]:
    """Computes all layers for T tokens, appending their K and V to the cache.

    Yields one `FfnRequest` per layer and expects that layer's FFN output, float[T, H]. It may be
    closed at any layer and run again with the same batch: K and V are only ever overwritten with
    the same values.

    Returns:
        The normed final hidden state of `batch.logit_rows`, [R, H], for `compute_logits`.
    """
    x = weights.embed_tokens[batch.token_ids]
    for index, layer in enumerate(weights.layers):
        h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        x = x + _attend(h, batch, config, layer, kv.layer(index))
        h = rms_norm(x, layer.post_attention_norm, config.rms_norm_eps)
        ffn_output = yield _ffn_request(index, h, config, layer)
        x = x + ffn_output.to(x.dtype)
    return rms_norm(x[batch.logit_rows], weights.final_norm, config.rms_norm_eps)


def compute_logits(final_hidden: torch.Tensor, weights: AttentionWeights) -> torch.Tensor:
    """Applies the head: float[R, H] -> f32[R, V] (f64 for f64 inputs)."""
    logits = linear(final_hidden, weights.lm_head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _attend(
    h: torch.Tensor,
    batch: Batch,
    config: Step3Config,
    layer: AttentionLayerWeights,
    kv: torch.Tensor,
) -> torch.Tensor:
    rank, dim = config.query_rank, config.head_dim
    latent, k, v = torch.split(linear(h, layer.qkv_proj), [rank, dim, dim], dim=-1)
    latent = rms_norm(latent, layer.inter_norm, config.rms_norm_eps)
    q = linear(latent, layer.wq).view(-1, config.num_heads, dim)  # [T, N, D]
    q = rotate(q, batch.cos, batch.sin)
    k = rotate(k[:, None], batch.cos, batch.sin)[:, 0]
    append_kv(kv, k, v, batch.slot_mapping)
    attended = torch.empty_like(q)
    for group in batch.groups:
        attended[group.rows] = paged_mfa_attention(
            q[group.rows], kv, group.block_table, group.num_context_tokens
        )
    return linear(attended.flatten(1), layer.o_proj)


def _ffn_request(
    index: int, h: torch.Tensor, config: Step3Config, layer: AttentionLayerWeights
) -> FfnRequest:
    if layer.router is None:
        num_tokens = h.shape[0]
        return FfnRequest(
            index, h, torch.empty(num_tokens, 0, dtype=torch.int32), torch.empty(num_tokens, 0)
        )
    topk_ids, topk_weights = route(
        linear(h, layer.router), config.top_k, is_normalised=config.norm_expert_weight
    )
    return FfnRequest(index, h, topk_ids, topk_weights)
