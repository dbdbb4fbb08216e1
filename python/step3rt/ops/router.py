"""The router: which experts compute a token, and with what weight."""

import torch


def route(
    router_logits: torch.Tensor, top_k: int, *, is_normalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the `top_k` most probable experts of every token.

    The softmax runs over all experts in float32; without `is_normalised` the chosen probabilities
    are used as they are, so that they sum to less than 1. Of equal experts the lower id wins.

    Args:
        router_logits: float[T, E].
        top_k: K, at most E.
        is_normalised: whether the weights of a token are divided by their sum
            (`norm_expert_weight`).

    Returns:
        topk_ids i32[T, K] and topk_weights f32[T, K] (f64 for f64 logits), best first.
    """
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    probabilities = torch.softmax(router_logits, dim=-1, dtype=wide)
    sorted_weights, sorted_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    topk_weights = sorted_weights[:, :top_k]
    if is_normalised:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return sorted_ids[:, :top_k].int(), topk_weights
