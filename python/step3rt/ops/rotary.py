"""Rotary position embedding, half-split: dim j turns together with dim j + D/2."""

import torch


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin of every position's angles, each float64[T, D/2].

    Frequency and angle are each rounded to float32 once, as in the published model; that is part
    of the model's definition, since at position 300 it moves logits by more than float32 rounding.

    Args:
        positions: int[T].
        head_dim: D, even.
        theta: base of the frequencies.
    """
    exponents = torch.arange(head_dim // 2, dtype=torch.float64) * (-2.0 / head_dim)
    frequencies = torch.pow(torch.tensor(theta, dtype=torch.float64), exponents).float()
    angles = (positions[:, None].float() * frequencies).double()
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns every head of every token by its position's angles.

    Args:
        x: float[T, N, D].
        cos: float32 or float64 [T, D/2]; the product is computed in the wider of both dtypes.
        sin: like cos.

    Returns:
        Same shape and dtype as x.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
