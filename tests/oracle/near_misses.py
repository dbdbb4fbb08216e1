"""Step-3 with one mistake each that a real implementation could make.

A test that compares with the oracle should fail for every one of them. It never changes the
oracle it is given: weights and settings are replaced in copies, operations only by the caller.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fixtures.checkpoint import CheckpointSpec
from tests.oracle.step3_numpy import Step3Oracle, choose_experts, rms_norm, rotate
from tests.oracle.tensor_file import Array


def with_weights(oracle: Step3Oracle, changes: dict[str, Array]) -> Step3Oracle:
    """Returns the oracle with some weights replaced."""
    assert changes.keys() <= oracle.weights.keys()
    return dataclasses.replace(oracle, weights={**oracle.weights, **changes})


def map_weights(oracle: Step3Oracle, change: Callable[[Array], Array], *ends: str) -> Step3Oracle:
    """Returns the oracle with `change` applied to every weight whose name ends so."""
    changes = {name: change(w) for name, w in oracle.weights.items() if name.endswith(ends)}
    assert changes
    return with_weights(oracle, changes)


def relative_difference(actual: Array, expected: Array) -> float:
    """Returns the largest difference over the largest expected value."""
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def weight_mutants(oracle: Step3Oracle) -> dict[str, Step3Oracle]:
    """Returns oracles whose weights or settings make the mistake that their key names."""

    def swapped(first: str, second: str) -> Step3Oracle:
        changes: dict[str, Array] = {}
        for name in oracle.weights:
            if name.endswith(first):
                partner = name.removesuffix(first) + second
                changes |= {name: oracle.weights[partner], partner: oracle.weights[name]}
        return with_weights(oracle, changes)

    def configured(**changes: Any) -> Step3Oracle:
        return dataclasses.replace(oracle, config=dataclasses.replace(oracle.config, **changes))

    norms = ("norm.weight", "layernorm.weight")
    return {
        "renormalised top-k": configured(norm_expert_weight=True),
        "one expert fewer": configured(top_k=1),
        "rope theta of llama": configured(rope_theta=10_000.0),
        "k and v swapped": swapped("k_proj.weight", "v_proj.weight"),
        "mlp gate and up swapped": swapped("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "expert gate and up swapped": swapped("moe.gate_proj.weight", "moe.up_proj.weight"),
        "shared gate and up swapped": swapped(
            "share_expert.gate_proj.weight", "share_expert.up_proj.weight"
        ),
        "norms before attention and mlp swapped": swapped(
            "input_layernorm.weight", "post_attention_layernorm.weight"
        ),
        "inter_norm weight ignored": map_weights(oracle, np.ones_like, "inter_norm.weight"),
        "norm weight plus one": map_weights(oracle, lambda w: 1 + w, *norms),
        "last norm weight ignored": map_weights(oracle, np.ones_like, "model.norm.weight"),
        "shared expert left out": map_weights(oracle, np.zeros_like, "share_expert.up_proj.weight"),
        "routed experts scaled by 2": map_weights(oracle, lambda w: 2 * w, "moe.down_proj.weight"),
        "head tied to the embedding": with_weights(
            oracle, {"lm_head.weight": oracle.weights["model.embed_tokens.weight"]}
        ),
        "embedding scaled": map_weights(
            oracle, lambda w: math.sqrt(oracle.config.hidden_size) * w, "embed_tokens.weight"
        ),
        "attention scores not scaled": map_weights(
            oracle, lambda w: math.sqrt(oracle.config.head_dim) * w, "self_attn.wq.weight"
        ),
    }


def interleaved_rope(x: Array, positions: np.ndarray, theta: float) -> Array:
    order = np.concatenate([np.arange(0, x.shape[-1], 2), np.arange(1, x.shape[-1], 2)])
    turned = np.empty_like(x)
    turned[..., order] = rotate(x[..., order], positions, theta)
    return turned


def rope_turning_backwards_for_keys(x: Array, positions: np.ndarray, theta: float) -> Array:
    return rotate(x, -positions if x.ndim == 2 else positions, theta)


def rope_of_half_the_dims(x: Array, positions: np.ndarray, theta: float) -> Array:
    half = x.shape[-1] // 2
    return np.concatenate([rotate(x[..., :half], positions, theta), x[..., half:]], axis=-1)


def sigmoid_router(
    router_logits: Array, top_k: int, norm_expert_weight: bool
) -> tuple[np.ndarray, Array]:
    topk_ids, _ = choose_experts(router_logits, top_k, norm_expert_weight)
    return topk_ids, 1 / (1 + np.exp(-np.take_along_axis(router_logits, topk_ids, axis=-1)))


def no_inter_norm(x: Array, weight: Array, eps: float) -> Array:
    is_latent = x.shape[-1] == CheckpointSpec().query_rank
    return x * weight if is_latent else rms_norm(x, weight, eps)


def layer_norm(x: Array, weight: Array, eps: float) -> Array:
    return rms_norm(x - np.mean(x, axis=-1, keepdims=True), weight, eps)


def gelu_in_place_of_silu(h: Array, *, gate: Array, up: Array, down: Array) -> Array:
    gated = h @ gate.T
    gelu = gated / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gated + 0.044715 * gated**3)))
    return (gelu * (h @ up.T)) @ down.T


# Mistake -> (the function of `step3_numpy` that makes it, the function to put in its place). They
# are written for the sizes of the default `CheckpointSpec`.
FUNCTION_MUTANTS = {
    "interleaved rope": ("rotate", interleaved_rope),
    "keys turned the other way": ("rotate", rope_turning_backwards_for_keys),
    "rope of half the dims": ("rotate", rope_of_half_the_dims),
    "no rope": ("rotate", lambda x, positions, theta: x),
    "sigmoid router": ("choose_experts", sigmoid_router),
    "no inter_norm": ("rms_norm", no_inter_norm),
    "layer norm in place of rms norm": ("rms_norm", layer_norm),
    "gelu in place of silu": ("swiglu", gelu_in_place_of_silu),
}
