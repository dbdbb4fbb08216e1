"""Loads cubins through CuPy and launches them on torch's current stream.

Never allocates, copies or converts a tensor: launchers check their tensors here and pass pointers.
With tensors on the CPU a launcher makes the same checks and runs its torch reference instead of the
kernel, from and into the same formats.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops.compile import compile_kernel, kernels_dir

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_STATIC_SHARED_LIMIT_BYTES = 48 * 1024  # more needs an opt-in per kernel
_CPU_SMS = 2  # what buffers are sized for that only kernels use; whole clusters of 2


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel with its fixed launch shape.

    `source` is its path below kernels/; `options` go to NVRTC. `num_threads` of every CTA,
    `shared_bytes` of dynamic shared memory. `is_dependent`: the kernel calls griddepcontrol.wait
    before it touches what earlier kernels wrote, so it may start while the previous one drains.
    `leaves_shared`: an SM that runs it keeps all its shared memory for others; how an SM splits it
    from L1 changes only while nothing runs there.
    """

    source: str
    num_threads: int
    shared_bytes: int = 0
    is_dependent: bool = False
    options: tuple[str, ...] = ()
    leaves_shared: bool = False

    def load(self, device: torch.device) -> None:
        """Loads it now; a first launch might wait for the device, and so for what spins on it."""
        index = torch.cuda.current_device() if device.index is None else device.index
        function = _load_function(self, index)
        # The driver puts off the code itself until it is needed; drivers before CUDA 12.4 cannot be
        # asked for it. A failure is reported by the first launch.
        finish = getattr(driver(), "cuFuncLoad", None)
        if finish is not None:
            with torch.cuda.device(index):
                finish(ctypes.c_void_p(function.kernel.ptr))

    def launch(self, device: torch.device, num_ctas: int, arguments: Sequence[Any]) -> None:
        """Launches on torch's current stream of `device`; capturable after the first launch.

        Args:
            device: A CUDA device; the one that the arguments' tensors are on.
            num_ctas: Grid size, one-dimensional.
            arguments: NumPy scalars and size-one arrays, passed by value in order.

        Raises:
            RuntimeError: the driver rejects the launch.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        function = _load_function(self, index)
        attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        config = _LaunchConfig(
            grid=(num_ctas, 1, 1),
            block=(self.num_threads, 1, 1),
            shared_bytes=self.shared_bytes,
            stream=torch.cuda.current_stream(device).cuda_stream,
            attributes=ctypes.pointer(attribute),
            num_attributes=int(self.is_dependent),
        )
        values = [np.ascontiguousarray(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        # Not CuPy's own launch: it cannot set launch attributes.
        status = driver().cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function.kernel.ptr), pointers, None
        )
        if status != 0:
            raise RuntimeError(
                f"cuLaunchKernelEx returned {error_name(status)} for {self.source} with {num_ctas} "
                f"CTAs of {self.num_threads} threads and {self.shared_bytes} bytes of shared "
                "memory. What an earlier kernel of the process did wrong is said of later ones, "
                "too. CUDA_LAUNCH_BLOCKING=1 finds out which, where there are no graphs."
            )


@functools.cache
def _load_function(kernel: Kernel, device_index: int) -> Any:
    import cupy  # here alone: the torch references of this package work without it

    compiled = compile_kernel(kernels_dir() / kernel.source, kernel.options)
    with cupy.cuda.Device(device_index):
        function = cupy.RawModule(path=str(compiled.cubin_path)).get_function(compiled.name)
        if kernel.shared_bytes > _STATIC_SHARED_LIMIT_BYTES:
            function.max_dynamic_shared_size_bytes = kernel.shared_bytes
        if kernel.leaves_shared:
            function.preferred_shared_memory_carveout = 100  # per cent
        return function


@functools.cache
def driver() -> ctypes.CDLL:
    """Returns the CUDA driver's library.

    Raises:
        RuntimeError: this machine has none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(
            "The CUDA driver (libcuda.so.1) cannot be loaded. Launching kernels needs a GPU "
            "machine. Run the torch reference on this one."
        ) from error


def error_name(status: int) -> str:
    """What the driver calls a status of one of its functions, as in 700 (CUDA_ERROR_...)."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
    return f"{status} ({(name.value or b'unknown').decode()})"


def num_sms(device: torch.device) -> int:
    """Returns how many SMs a GPU has; on the CPU a small number, so that scratch is small."""
    if device.type == "cpu":
        return _CPU_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
        device: Expected device.

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
