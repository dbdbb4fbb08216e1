"""Residual add, RMS normalisation and FP8 quantisation of activations, fused.

Launches the kernels of kernels/fused, on the CPU their references; computes no GEMM.
"""

from dataclasses import dataclass

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.norm import rms_norm
from step3rt.ops.quantize import GROUP_SIZE, quantize_groups

HIDDEN_SIZE = 7168
QUERY_RANK = 2048

_ADD_THREADS = 448
_LATENT_THREADS = 256
ADD_KERNELS = tuple(
    launch.Kernel(
        "fused/sm90_bf16_add_rmsnorm_quantize.cu",
        num_threads=_ADD_THREADS,
        is_dependent=True,
        options=(f"-DSTEP3RT_NORM_SINGLE={is_single}",),
    )
    for is_single in (0, 1)
)
"""Builds for any number of partial sums, and for exactly one."""
_LATENT_KERNEL = launch.Kernel(
    "fused/sm90_bf16_rmsnorm_quantize.cu", num_threads=_LATENT_THREADS, is_dependent=True
)

# struct AddNormParams of the kernel; QuantizedRows are its members `quantized` and `scales`.
_PARAMS_DTYPE = np.dtype(
    [
        ("residual", np.uint64),
        ("partial_sums", np.uint64),
        ("weight", np.uint64),
        ("residual_out", np.uint64),
        ("normed", np.uint64),
        ("quantized", np.uint64),
        ("scales", np.uint64),
        ("num_partial_sums", np.int32),
        ("num_tokens", np.int32),
        ("eps", np.float32),
    ],
    align=True,
)

# struct QuantizedRows of kernels/fused/quantize.cuh.
_ROWS_DTYPE = np.dtype([("values", np.uint64), ("scales", np.uint64)], align=True)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations in FP8: `values` e4m3[T, K], `scales` f32[T, K / 128], both contiguous."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, width: int, device: torch.device) -> "QuantizedRows":
        """Allocates room for `num_tokens` rows of `width` values, a multiple of 128."""
        return cls(
            torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(num_tokens, width // GROUP_SIZE, device=device),
        )

    def check(self, num_tokens: int, width: int, device: torch.device) -> None:
        """Checks that the rows fit.

        Raises:
            ValueError: a shape, dtype, device or layout differs.
        """
        launch.check_tensor("values", self.values, (num_tokens, width), torch.float8_e4m3fn, device)
        scale_shape = (num_tokens, width // GROUP_SIZE)
        launch.check_tensor("scales", self.scales, scale_shape, torch.float32, device)

    def copy_(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Takes over rows of the same shape."""
        self.values.copy_(values)
        self.scales.copy_(scales)

    def pointers(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        """The kernel argument."""
        pointers = np.zeros(1, dtype=_ROWS_DTYPE)
        pointers["values"] = self.values.data_ptr()
        pointers["scales"] = self.scales.data_ptr()
        return pointers


@dataclass(frozen=True, slots=True)
class NormOutputs:
    """Where the results go; None: not stored. All [T, 7168] and contiguous.

    `residual` bf16: the sum; may be the residual that was added to. `normed` bf16.
    """

    residual: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    quantized: QuantizedRows | None = None


def add_rmsnorm_quantize(
    residual: torch.Tensor,
    partial_sums: torch.Tensor,
    weight: torch.Tensor,
    out: NormOutputs,
    eps: float,
    kernel: launch.Kernel | None = None,
) -> None:
    """Adds n tensors to the residual, normalises the sum and quantises it.

    The partial sums are added in fp32 in their order, rounded to bf16 and added to the residual:
    the output projection's result with n = 1, those of n FFN instances, or nothing with n = 0.

    Args:
        residual: bf16[T, 7168], contiguous.
        partial_sums: bf16[n, T, 7168], contiguous.
        weight: bf16[7168]; older than the previous kernel of the stream.
        out: Where the results go.
        eps: Added to the mean square.
        kernel: A variant, for measurements; chosen by n if None.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or T is 0.
    """
    device = residual.device
    launch.check_tensor("residual", residual, (-1, HIDDEN_SIZE), torch.bfloat16, device)
    num_tokens = residual.shape[0]
    _check_any_tokens(num_tokens)
    shape = (num_tokens, HIDDEN_SIZE)
    launch.check_tensor("partial_sums", partial_sums, (-1, *shape), torch.bfloat16, device)
    launch.check_tensor("weight", weight, (HIDDEN_SIZE,), torch.bfloat16, device)
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    for name, tensor in (("residual_out", out.residual), ("normed", out.normed)):
        if tensor is not None:
            launch.check_tensor(name, tensor, shape, torch.bfloat16, device)
            params[name] = tensor.data_ptr()
    if out.quantized is not None:
        out.quantized.check(num_tokens, HIDDEN_SIZE, device)
        params["quantized"] = out.quantized.values.data_ptr()
        params["scales"] = out.quantized.scales.data_ptr()
    if device.type == "cpu":
        added, normed, quantized = reference_add_rmsnorm_quantize(
            residual, partial_sums, weight, eps
        )
        if out.residual is not None:
            out.residual.copy_(added)
        if out.normed is not None:
            out.normed.copy_(normed)
        if out.quantized is not None:
            out.quantized.copy_(quantized.values, quantized.scales)
        return
    params["residual"] = residual.data_ptr()
    params["partial_sums"] = partial_sums.data_ptr()
    params["weight"] = weight.data_ptr()
    params["num_partial_sums"] = partial_sums.shape[0]
    params["num_tokens"] = num_tokens
    params["eps"] = eps
    if kernel is None:
        kernel = ADD_KERNELS[partial_sums.shape[0] == 1]
    kernel.launch(device, num_tokens, (params,))


def rmsnorm_quantize(
    latent: torch.Tensor,
    weight: torch.Tensor,
    out: QuantizedRows,
    eps: float,
    kernel: launch.Kernel = _LATENT_KERNEL,
) -> None:
    """Normalises the low-rank query and quantises it.

    Args:
        latent: bf16[T, 2048]; rows may be further apart, as in a slice of the fused projection.
        weight: bf16[2048]; older than the previous kernel of the stream.
        out: [T, 2048].
        eps: Added to the mean square.
        kernel: A variant, for measurements.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or T is 0.
    """
    device = latent.device
    num_tokens = latent.shape[0]
    _check_any_tokens(num_tokens)
    # One row checks dtype and device; the distance of the rows is free.
    launch.check_tensor("latent[:1]", latent[:1], (1, QUERY_RANK), torch.bfloat16, device)
    if latent.stride(0) % 8 or latent.data_ptr() % 16:
        raise ValueError(
            f"`latent` has rows {latent.stride(0)} elements apart at {latent.data_ptr():#x}, the "
            "kernel takes rows aligned to 16 bytes. Slice the projection's output at a multiple of "
            "8 columns."
        )
    launch.check_tensor("weight", weight, (QUERY_RANK,), torch.bfloat16, device)
    out.check(num_tokens, QUERY_RANK, device)
    if device.type == "cpu":
        out.copy_(*quantize_groups(rms_norm(latent, weight, eps)))
        return
    arguments = (
        launch.pointer(latent),
        np.int64(latent.stride(0)),
        launch.pointer(weight),
        out.pointers(),
        np.float32(eps),
    )
    kernel.launch(device, num_tokens, arguments)


def reference_add_rmsnorm_quantize(
    residual: torch.Tensor, partial_sums: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows]:
    """Returns the sum, the normed sum and its quantised rows, as the model computes them.

    Args as for `add_rmsnorm_quantize`, of any width that is a multiple of 128.
    """
    total = torch.zeros_like(residual, dtype=torch.float32)
    for partial_sum in partial_sums:
        total += partial_sum.float()
    added = residual + total.to(residual.dtype) if len(partial_sums) else residual
    normed = rms_norm(added, weight, eps)
    return added, normed, QuantizedRows(*quantize_groups(normed))


def _check_any_tokens(num_tokens: int) -> None:
    if num_tokens == 0:
        raise ValueError("The batch has 0 tokens. A launch needs one. Skip it for an empty batch.")
