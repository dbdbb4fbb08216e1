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


def linear_bf16(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies bf16 rows with a bf16 weight; the result is rounded to bf16 once.

    A GPU sums in float32, by cuBLAS. The CPU sums in float64, so that there a token's values do
    not depend on its batch mates.

    Args:
        x: bf16[T, K].
        weight: bf16[N, K].
        out: bf16[T, N]; None: a new tensor.

    Returns:
        bf16[T, N], `out` if there is one.
    """
    if x.device.type != "cpu":
        return torch.mm(x, weight.T) if out is None else torch.mm(x, weight.T, out=out)
    product = x.double() @ weight.double().T
    return product.bfloat16() if out is None else out.copy_(product)
