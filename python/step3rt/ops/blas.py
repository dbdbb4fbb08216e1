"""How many SMs cuBLAS counts on.

Its large products are persistent kernels, a CTA per SM, each with its share from the start: one SM
that another stream holds makes the last CTA begin when the others end.
"""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_LIBRARIES = ("libcublas.so.13", "libcublas.so.12")  # by soname, as torch has loaded it
_DEFAULT = 0  # all SMs of the device


@contextlib.contextmanager
def blas_sms(device: torch.device, num_sms: int) -> Iterator[None]:
    """Lets this thread's products on the device, or their capture, use `num_sms` SMs.

    On the CPU, and where cuBLAS cannot be asked, nothing changes but speed.
    """
    library = _library() if device.type == "cuda" else None
    if library is None:
        yield
        return
    with torch.cuda.device(device):
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())  # type: ignore[no-untyped-call]
    library.cublasSetSmCountTarget(handle, ctypes.c_int(num_sms))
    try:
        yield
    finally:
        library.cublasSetSmCountTarget(handle, ctypes.c_int(_DEFAULT))


def _library() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None
