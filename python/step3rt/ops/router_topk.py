"""Launches the router: logits of up to 48 experts, softmax, and the 3 most probable, in one kernel.

On the CPU it runs `ops.router.route` instead. Counts no tokens per expert: an FFN instance serves
several sources and counts over all of them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.linear import linear_bf16
from step3rt.ops.rmsnorm_quantize import HIDDEN_SIZE
from step3rt.ops.router import route

MAX_EXPERTS = 48
TOP_K = 3

_CLUSTER_CTAS = 8


@dataclass(frozen=True, slots=True)
class RouterVariant:
    """A build of the kernel: a cluster of 8 CTAs takes `tile_tokens`."""

    tile_tokens: int
    kernel: launch.Kernel


def _variant(num_tiles: int) -> RouterVariant:
    kernel = launch.Kernel(
        "fused/sm90_bf16_router_topk.cu",
        num_threads=224,
        is_dependent=True,
        options=(f"-DSTEP3RT_ROUTER_TILES={num_tiles}",),
    )
    return RouterVariant(16 * num_tiles, kernel)


VARIANTS = (_variant(1), _variant(2))
"""With 32 tokens a cluster, 256 tokens are 8 clusters; not all of 16 are resident at once."""

_MAX_NARROW_TOKENS = 128

# struct RouterParams of the kernel.
_PARAMS_DTYPE = np.dtype(
    [
        ("hidden", np.uint64),
        ("gate", np.uint64),
        ("topk_ids", np.uint64),
        ("topk_weights", np.uint64),
        ("logits", np.uint64),
        ("num_tokens", np.int32),
        ("num_experts", np.int32),
        ("is_normalised", np.int32),
    ],
    align=True,
)


def route_topk(
    hidden: torch.Tensor,
    gate: torch.Tensor,
    topk: tuple[torch.Tensor, torch.Tensor],
    *,
    is_normalised: bool,
    logits: torch.Tensor | None = None,
    variant: RouterVariant | None = None,
) -> None:
    """Chooses the 3 most probable experts of every token, as `ops.router.route` does.

    The logits are summed in fp32 and rounded to bf16, as a bf16 linear layer gives them. A token's
    result depends on its own row alone.

    Args:
        hidden: bf16[T, 7168], normed, contiguous; T at least 1.
        gate: bf16[E, 7168], E from 3 to 48, contiguous; older than the previous kernel of the
            stream.
        topk: i32[T, 3] ids and f32[T, 3] weights, contiguous, best first.
        is_normalised: Whether a token's weights are divided by their sum.
        logits: bf16[T, E], contiguous: also stored if not None.
        variant: For measurements; chosen by T if None.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    device = hidden.device
    launch.check_tensor("hidden", hidden, (-1, HIDDEN_SIZE), torch.bfloat16, device)
    num_tokens = hidden.shape[0]
    if num_tokens == 0:
        raise ValueError("The batch has 0 tokens. A launch needs one. Skip it for an empty batch.")
    ids, weights = topk
    launch.check_tensor("gate", gate, (-1, HIDDEN_SIZE), torch.bfloat16, device)
    num_experts = gate.shape[0]
    if not TOP_K <= num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"`gate` has {num_experts} experts. The kernel chooses {TOP_K} of {TOP_K} to "
            f"{MAX_EXPERTS}. Use `ops.router.route` for others."
        )
    launch.check_tensor("topk[0]", ids, (num_tokens, TOP_K), torch.int32, device)
    launch.check_tensor("topk[1]", weights, (num_tokens, TOP_K), torch.float32, device)
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    if logits is not None:
        launch.check_tensor("logits", logits, (num_tokens, num_experts), torch.bfloat16, device)
        params["logits"] = logits.data_ptr()
    if device.type == "cpu":
        rounded = linear_bf16(hidden, gate)
        chosen_ids, chosen_weights = route(rounded, TOP_K, is_normalised=is_normalised)
        ids.copy_(chosen_ids)
        weights.copy_(chosen_weights)
        if logits is not None:
            logits.copy_(rounded)
        return
    params["hidden"] = hidden.data_ptr()
    params["gate"] = gate.data_ptr()
    params["topk_ids"] = ids.data_ptr()
    params["topk_weights"] = weights.data_ptr()
    params["num_tokens"] = num_tokens
    params["num_experts"] = num_experts
    params["is_normalised"] = is_normalised
    if variant is None:
        variant = VARIANTS[num_tokens > _MAX_NARROW_TOKENS]
    num_ctas = -(-num_tokens // variant.tile_tokens) * _CLUSTER_CTAS
    variant.kernel.launch(device, num_ctas, (params,))
