"""Residual add of what FFN ranks sent back, RMS normalisation and FP8 quantisation, fused.

As ops/rmsnorm_quantize.py, but for sums that lie in slots: those of two ranks are a whole slot
apart, and a row has the sums of only some ranks. Computes no GEMM.
"""

import numpy as np
import torch

from step3rt.ops import launch
from step3rt.ops.norm import rms_norm
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.rmsnorm_quantize import HIDDEN_SIZE, NormOutputs, QuantizedRows

KERNEL = launch.Kernel(
    "fused/sm90_bf16_add_sums_rmsnorm_quantize.cu", num_threads=448, is_dependent=True
)

# struct AddSumsParams of the kernel; QuantizedRows are its members `quantized` and `scales`.
_PARAMS_DTYPE = np.dtype(
    [
        *((name, np.uint64) for name in ("residual", "sums", "present", "weight")),
        *((name, np.uint64) for name in ("residual_out", "normed", "quantized", "scales")),
        ("num_ranks", np.int32),
        ("row_capacity", np.int32),
        ("eps", np.float32),
    ],
    align=True,
)


def add_sums_rmsnorm_quantize(
    residual: torch.Tensor,
    sums: torch.Tensor,
    present: torch.Tensor,
    weight: torch.Tensor,
    out: NormOutputs,
    eps: float,
) -> None:
    """Adds the sums that are present to the residual, normalises the result and quantises it.

    The sums are added in fp32 in rank order, rounded to bf16 and added to the residual. On a CPU,
    and for widths that the model of the kernels does not have, torch computes the same.

    Args:
        residual: bf16[B, H], contiguous.
        sums: bf16[F, T, H], contiguous, B <= T, F <= 32: `AttentionSlots.sums`.
        present: i32[T], contiguous: bit f of row r says whether sums[f, r] is to be added; one that
            is not may hold anything. `AttentionSlots.present`.
        weight: bf16[H]; older than the previous kernel of the stream.
        out: Where the results go.
        eps: Added to the mean square.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or B is 0.
    """
    device = residual.device
    launch.check_tensor("residual", residual, (-1, -1), torch.bfloat16, device)
    num_tokens, width = residual.shape
    launch.check_tensor("sums", sums, (-1, -1, width), torch.bfloat16, device)
    num_ranks, row_capacity, _ = sums.shape
    if not 1 <= num_tokens <= row_capacity:
        raise ValueError(
            f"The batch has {num_tokens} tokens, the slots {row_capacity} rows. A launch needs one "
            "token at least and takes no more than were sent. Skip it for an empty batch."
        )
    launch.check_tensor("present", present, (row_capacity,), torch.int32, device)
    launch.check_tensor("weight", weight, (width,), torch.bfloat16, device)
    for name, tensor in (("residual_out", out.residual), ("normed", out.normed)):
        if tensor is not None:
            launch.check_tensor(name, tensor, residual.shape, torch.bfloat16, device)
    if out.quantized is not None:
        out.quantized.check(num_tokens, width, device)
    if device.type == "cpu" or width != HIDDEN_SIZE:
        _store(reference_add_sums_rmsnorm_quantize(residual, sums, present, weight, eps), out)
        return
    params = np.zeros(1, dtype=_PARAMS_DTYPE)
    params["residual"] = residual.data_ptr()
    params["sums"] = sums.data_ptr()
    params["present"] = present.data_ptr()
    params["weight"] = weight.data_ptr()
    if out.residual is not None:
        params["residual_out"] = out.residual.data_ptr()
    if out.normed is not None:
        params["normed"] = out.normed.data_ptr()
    if out.quantized is not None:
        params["quantized"] = out.quantized.values.data_ptr()
        params["scales"] = out.quantized.scales.data_ptr()
    params["num_ranks"] = num_ranks
    params["row_capacity"] = row_capacity
    params["eps"] = eps
    KERNEL.launch(device, num_tokens, (params,))


def reference_add_sums_rmsnorm_quantize(
    residual: torch.Tensor,
    sums: torch.Tensor,
    present: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows]:
    """Returns the sum, the normed sum and its quantised rows.

    Args as for `add_sums_rmsnorm_quantize`, of any width that is a multiple of 128.
    """
    num_tokens = residual.shape[0]
    total = torch.zeros_like(residual, dtype=torch.float32)
    for rank, part in enumerate(sums):
        is_present = (present[:num_tokens, None] >> rank & 1).bool()
        total += torch.where(is_present, part[:num_tokens].float(), 0.0)
    added = residual + total.to(residual.dtype)
    normed = rms_norm(added, weight, eps)
    return added, normed, QuantizedRows(*quantize_groups(normed))


def _store(result: tuple[torch.Tensor, torch.Tensor, QuantizedRows], out: NormOutputs) -> None:
    added, normed, rows = result
    if out.residual is not None:
        out.residual.copy_(added)
    if out.normed is not None:
        out.normed.copy_(normed)
    if out.quantized is not None:
        out.quantized.values.copy_(rows.values)
        out.quantized.scales.copy_(rows.scales)
