"""Quantises activations to FP8 in groups of 1x128 on the GPU.

Launches kernels/fused/sm90_bf16_quantize_groups; the reference, which runs on the CPU, is
`ops.quantize.quantize_groups`.
"""

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.quantize import GROUP_SIZE, quantize_groups
from step3rt.ops.rmsnorm_quantize import QuantizedRows

_THREADS = 256
_VECTORS_PER_THREAD = 2
_VECTOR_WIDTH = 8
_KERNEL = launch.Kernel(
    "fused/sm90_bf16_quantize_groups.cu", num_threads=_THREADS, is_dependent=True
)


def quantize_groups_fp8(
    x: torch.Tensor,
    out: QuantizedRows,
    kernel: launch.Kernel = _KERNEL,
    vectors_per_thread: int = _VECTORS_PER_THREAD,
) -> None:
    """Quantises rows, for example attention's output before the output projection.

    Args:
        x: bf16[T, K], contiguous; K a multiple of 128, T at least 1.
        out: [T, K].
        kernel: A variant, for measurements.
        vectors_per_thread: Of that variant.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    device = x.device
    launch.check_tensor("x", x, (-1, -1), torch.bfloat16, device)
    num_tokens, width = x.shape
    if num_tokens == 0 or width == 0 or width % GROUP_SIZE:
        raise ValueError(
            f"`x` is {num_tokens}x{width}. The kernel takes one row or more of whole groups of "
            f"{GROUP_SIZE}. Skip it for an empty batch, or pad the rows."
        )
    out.check(num_tokens, width, device)
    if device.type == "cpu":
        out.copy_(*quantize_groups(x))
        return
    num_vectors = num_tokens * width // _VECTOR_WIDTH
    num_ctas = -(-num_vectors // (kernel.num_threads * vectors_per_thread))
    arguments = (launch.pointer(x), out.pointers(), np.int64(num_vectors))
    kernel.launch(device, num_ctas, arguments)
