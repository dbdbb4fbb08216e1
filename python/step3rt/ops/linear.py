"""Linear layers."""

import torch


def weight_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a linear layer's weights are kept, and its products are summed.

    For float32 it is float64: then results are within float32 rounding of exact, and a token's
    values do not depend on its batch mates, although BLAS sums in another order for each batch
    size. bfloat16 products are summed in float32 by the hardware.
    """
    return torch.float64 if compute_dtype == torch.float32 else compute_dtype


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies rows with a weight matrix, in the weight's dtype.

    Args:
        x: float[T, K].
        weight: float[N, K], of dtype `weight_dtype(x.dtype)`.

    Returns:
        [T, N] in the dtype of x.
    """
    return torch.nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)
