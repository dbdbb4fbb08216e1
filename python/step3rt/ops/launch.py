"""Loads cubins and launches them on torch's current stream; the only user of CuPy.

Never allocates, copies or converts a tensor: launchers check their tensors here and pass pointers.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import numpy as np
import torch

from step3rt.ops.compile import compile_kernel, kernels_dir


@functools.cache
def load_kernel(source: str, dynamic_shared_bytes: int, options: tuple[str, ...] = ()) -> Any:
    """Compiles and loads a kernel by its path below `kernels/`, once per process.

    Call it before CUDA graph capture: loading a module is not capturable.
    """
    compiled = compile_kernel(kernels_dir() / source, options)
    kernel = cupy.RawModule(path=str(compiled.cubin_path)).get_function(compiled.name)
    if dynamic_shared_bytes > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = dynamic_shared_bytes
    return kernel


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[None]:
    """Makes torch's current stream of `device` the one that CuPy launches on."""
    stream = torch.cuda.current_stream(device)
    with (
        cupy.cuda.Device(stream.device_index),
        cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index),
    ):
        yield


def pointer(tensor: torch.Tensor) -> np.uint64:
    """Returns the device address of the first element as a kernel argument."""
    return np.uint64(tensor.data_ptr())


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Checks a contiguous kernel argument.

    Args:
        name: As the caller knows it, for the message.
        tensor: The argument.
        shape: Expected sizes; -1 accepts any.
        dtype: Expected dtype.
        device: Expected device, a CUDA device.

    Raises:
        ValueError: shape, dtype, device or layout differ.
    """
    fits = tensor.dim() == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` has shape {list(tensor.shape)}, the kernel takes {list(shape)} "
            "(-1: any size). Reshape it, or pass the tensor that the docstring names."
        )
    if tensor.dtype != dtype:
        raise ValueError(f"`{name}` is {tensor.dtype}, the kernel takes {dtype}. Convert it.")
    if tensor.device != device:
        raise ValueError(
            f"`{name}` is on {tensor.device}, the other arguments on {device}. Move it there."
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"`{name}` has strides {list(tensor.stride())}, the kernel takes a contiguous tensor. "
            "Call `.contiguous()` where the tensor is made."
        )
