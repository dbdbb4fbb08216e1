"""RMS normalisation."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides each row by its root mean square, then multiplies with `weight`.

    The mean of squares and the root are computed in float32 at least; the quotient is rounded to
    the dtype of `x` before the multiplication, as the published model does.

    Args:
        x: float[..., C].
        weight: same dtype as x, [C].
        eps: added to the mean square.

    Returns:
        Same shape and dtype as x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight
