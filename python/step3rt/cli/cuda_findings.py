"""Whether this host's GPUs can be used, and whether they reach each other's memory.

Asks the driver's own library, so neither torch nor a CUDA toolkit is needed; no context is made and
no memory taken.
"""

import ctypes
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from step3rt.cli.finding import Finding
from step3rt.ops.compile import COMPUTE_CAPABILITY

_NAME_BYTES = 128
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_ON_CPU = "the reference backend computes on the CPU, and no link is cuda_ipc"


class _CudaError(Exception):
    """A call of the driver's library failed."""


def cuda_findings(
    proc: Path = Path("/proc/driver/nvidia"),
    dev: Path = Path("/dev"),
    library: str = "libcuda.so.1",
) -> Iterator[Finding]:
    """Looks at the driver, its library, the devices and their peers; stops at what is missing."""
    has_nodes = any(dev.glob("nvidia[0-9]*"))
    if not has_nodes:
        if proc.exists():
            yield Finding(
                "note",
                "gpu",
                f"the NVIDIA driver is loaded, but this process sees no device; {_ON_CPU}",
                "in a container, start it with the devices: --gpus all",
            )
        else:
            yield Finding(
                "note",
                "gpu",
                f"no NVIDIA driver; {_ON_CPU}",
                "on a host with NVIDIA GPUs, install their driver",
            )
        return
    try:
        driver = _Driver(library)
        devices = driver.devices()
        capabilities = [driver.capability(index) for index in range(len(devices))]
    except OSError as error:
        yield Finding(
            "note",
            "gpu",
            f"there are NVIDIA devices, but {library} cannot be loaded ({error}); {_ON_CPU}",
            "install the driver's library; in a container, set "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
        return
    except _CudaError as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hides = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}"
        yield Finding(
            "note",
            "gpu",
            f"the CUDA driver cannot be used: {error}{hides}; {_ON_CPU}",
            "see that nvidia-smi works, that driver and library are of one version, and that "
            "CUDA_VISIBLE_DEVICES names devices",
        )
        return
    names = ", ".join(f"{index} {name}" for index, name in enumerate(devices))
    yield Finding("ok", "gpu", f"{names}; CUDA {driver.version()}")
    others = [
        f"{index} ({major}.{minor})"
        for index, (major, minor) in enumerate(capabilities)
        if (major, minor) != COMPUTE_CAPABILITY
    ]
    if others:
        yield Finding(
            "note",
            "kernels",
            f"built for Hopper GPUs, compute capability 9.0; not for {', '.join(others)}",
            "leave these out of --device; instances compute on the CPU with reference and cpu",
        )
    yield _peers(driver, len(devices))
    yield from _torch()


def _peers(driver: "_Driver", num_devices: int) -> Finding:
    if num_devices == 1:
        return Finding("ok", "cuda_ipc", "one device; instances that share it reach its memory")
    apart = [
        (one, other)
        for one, other in itertools.combinations(range(num_devices), 2)
        if not (driver.can_access(one, other) and driver.can_access(other, one))
    ]
    if not apart:
        return Finding(
            "ok", "cuda_ipc", f"each of {num_devices} devices reaches the others' memory"
        )
    pairs = ", ".join(f"{one} and {other}" for one, other in apart)
    return Finding(
        "note",
        "cuda_ipc",
        f"these devices do not reach each other's memory: {pairs}; set fabric to shm there",
        "`nvidia-smi topo -p2p r` says why; often it is the IOMMU or PCIe access control (ACS), "
        "which the firmware's settings turn off",
    )


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.version.cuda is None:
        yield Finding(
            "note",
            "gpu",
            f"torch {torch.__version__} is built without CUDA and computes on the CPU",
            "install a build with CUDA: pip install --force-reinstall torch",
        )


class _Driver:
    """The few calls of libcuda that say what there is."""

    def __init__(self, library: str) -> None:
        self._cuda = ctypes.CDLL(library)
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            what = (text.value or b"unknown error").decode(errors="replace")
            raise _CudaError(f"{name}: {what} ({status})")

    def devices(self) -> list[str]:
        """Names of the visible devices, one at least."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise _CudaError("no device is visible")
        names = []
        for index in range(count.value):
            name = ctypes.create_string_buffer(_NAME_BYTES)
            self._call("cuDeviceGetName", name, _NAME_BYTES, self._device(index))
            names.append(name.value.decode(errors="replace"))
        return names

    def capability(self, index: int) -> tuple[int, int]:
        """A device's compute capability, as in (9, 0)."""
        return (
            self._attribute(_CAPABILITY_MAJOR, index),
            self._attribute(_CAPABILITY_MINOR, index),
        )

    def _attribute(self, attribute: int, index: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device(index))
        return value.value

    def version(self) -> str:
        """The newest CUDA that the driver supports, as in 12.8."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def can_access(self, one: int, other: int) -> bool:
        """Whether kernels on `one` may read and write the memory of `other`."""
        can = ctypes.c_int()
        peers = (self._device(one), self._device(other))
        self._call("cuDeviceCanAccessPeer", ctypes.byref(can), *peers)
        return can.value == 1

    def _device(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        return device
