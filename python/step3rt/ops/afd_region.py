"""Memory that another process writes: a region on a GPU over CUDA IPC, or a sealed memfd.

Owns the mapping of memory; knows nothing of what lies in it.
"""

import fcntl
import mmap
import os
import secrets
import struct
import weakref
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from step3rt.errors import Unavailable
from step3rt.ops.afd_slots import Section

CPU_MEMORY = 1
CUDA_MEMORY = 2

_TOKEN_BYTES = 16
_CPU_ADDRESS = struct.Struct(f"<IIQ{_TOKEN_BYTES}s")  # process, descriptor, bytes, token
_CUDA_ADDRESS = struct.Struct(f"<{_TOKEN_BYTES}s64s")  # token, IPC handle
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_IPC_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_PEER_ACCESS_ALREADY_ENABLED = 704


class Mapping(Protocol):
    """A region as this process sees it, its own or a peer's."""

    def view(self, section: Section) -> torch.Tensor:
        """Returns the tensor that lies there."""

    def address(self, section: Section) -> int:
        """Returns its address on the device; 0 on a CPU, whose tensors carry theirs."""

    def close(self) -> None:
        """Gives the memory back; nothing may use it any more. Idempotent."""


class Region(Mapping, Protocol):
    """A region of this process, zeroed when it is made."""

    @property
    def kind(self) -> int:
        """`CPU_MEMORY` or `CUDA_MEMORY`."""

    @property
    def handle(self) -> bytes:
        """What `map_region` of another process takes, as long as this one lives."""


def allocate_region(num_bytes: int, device: torch.device) -> Region:
    """Allocates a region on a device.

    Args:
        num_bytes: Size.
        device: CPU, or a CUDA device with an index.
    """
    return CpuRegion(num_bytes) if device.type == "cpu" else CudaRegion(num_bytes, device)


def map_region(handle: bytes, num_bytes: int, device: torch.device) -> Mapping:
    """Maps a region of another process, or of this one.

    Raises:
        Unavailable: its process is gone, or out of reach.
    """
    if device.type == "cpu":
        return _map_cpu_region(handle, num_bytes)
    return CudaMapping(handle, device)


class _CpuMemory:
    """Shared memory of CPUs. Views keep it mapped, so that `close` unmaps nothing in use."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        # The mapping has no owner but the tensors over it: the last one to go unmaps.
        mapped = mmap.mmap(descriptor, num_bytes)
        self._bytes: torch.Tensor | None = torch.frombuffer(mapped, dtype=torch.uint8)

    def view(self, section: Section) -> torch.Tensor:
        if self._bytes is None:
            raise ValueError("The region is closed. Views are made before. Keep the slots open.")
        taken = self._bytes[section.offset :][: section.num_bytes]
        return taken.view(section.dtype).view(section.shape)

    def address(self, section: Section) -> int:
        return 0

    def close(self) -> None:
        self._bytes = None


class CpuRegion(_CpuMemory):
    """A memfd, sealed so that no peer can take memory away from the others."""

    kind = CPU_MEMORY

    def __init__(self, num_bytes: int) -> None:
        """Allocates and zeroes it; its first bytes are a token that its handle repeats."""
        self._num_bytes = num_bytes
        self._descriptor = os.memfd_create("step3rt-afd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._release = weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, num_bytes)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        os.pwrite(self._descriptor, self._token, 0)
        super().__init__(self._descriptor, num_bytes)

    @property
    def handle(self) -> bytes:
        """Where a process of the same user finds the memory."""
        return _CPU_ADDRESS.pack(os.getpid(), self._descriptor, self._num_bytes, self._token)

    def close(self) -> None:
        """Ends the region: it can be mapped no more. Peers that have mapped it keep it."""
        super().close()
        self._release()


def _map_cpu_region(handle: bytes, num_bytes: int) -> _CpuMemory:
    try:
        process, descriptor, size, token = _CPU_ADDRESS.unpack(handle)
        ours = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, struct.error) as error:
        raise _cannot_map(error) from error
    try:
        is_sealed = fcntl.fcntl(ours, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        is_whole = size == num_bytes == os.fstat(ours).st_size
        # A process that ended may have left its number to another one.
        if not is_sealed or not is_whole or os.pread(ours, _TOKEN_BYTES, 0) != token:
            raise _cannot_map("what its process has there now is something else")
        return _CpuMemory(ours, num_bytes)
    except OSError as error:  # not a memfd
        raise _cannot_map(error) from error
    finally:
        os.close(ours)


def _cannot_map(reason: object) -> Unavailable:
    return Unavailable(
        f"The peer's memory cannot be mapped: {reason}. Both processes have to live, on one host "
        "and as one user. Link again when the peer is back, or use another fabric"
    )


class _CudaMemory:
    """Device memory by address."""

    def __init__(self, device: torch.device) -> None:
        import cupy

        self.device = device
        self._runtime = cupy.cuda.runtime
        self._base = 0

    def view(self, section: Section) -> torch.Tensor:
        span = _DeviceBytes(self.address(section), section.num_bytes)
        taken = torch.as_tensor(span, device=self.device)
        return taken.view(section.dtype).view(section.shape)

    def address(self, section: Section) -> int:
        return self._base + section.offset


class CudaRegion(_CudaMemory):
    """Memory of one GPU, an allocation of its own: an IPC handle exports the whole one."""

    kind = CUDA_MEMORY
    _of_this_process: ClassVar[weakref.WeakValueDictionary[bytes, "CudaRegion"]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocates and zeroes it."""
        import cupy

        super().__init__(device)
        with cupy.cuda.Device(device.index):
            self._base = int(self._runtime.malloc(num_bytes))
            self._runtime.memset(self._base, 0, num_bytes)
            self._runtime.deviceSynchronize()
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._of_this_process[self._token] = self

    @property
    def handle(self) -> bytes:
        """The driver's handle of the memory."""
        return _CUDA_ADDRESS.pack(self._token, bytes(self._runtime.ipcGetMemHandle(self._base)))

    @classmethod
    def find(cls, token: bytes) -> "CudaRegion | None":
        """Returns the region of this process with that token: the driver maps none of those."""
        return cls._of_this_process.get(token)

    def close(self) -> None:
        """Frees the memory."""
        self._of_this_process.pop(self._token, None)
        if self._base:
            self._runtime.free(self._base)
            self._base = 0


class CudaMapping(_CudaMemory):
    """A peer's region, seen from one GPU of this process."""

    def __init__(self, handle: bytes, device: torch.device) -> None:
        """Maps it.

        Raises:
            Unavailable: the GPUs cannot reach each other, or the peer is gone.
        """
        import cupy

        super().__init__(device)
        self._is_imported = False
        try:
            token, ipc_handle = _CUDA_ADDRESS.unpack(handle)
            with cupy.cuda.Device(device.index):
                local = CudaRegion.find(token)
                if local is None:
                    self._base = int(
                        self._runtime.ipcOpenMemHandle(ipc_handle, _IPC_LAZY_PEER_ACCESS)
                    )
                    self._is_imported = True
                else:
                    self._base = local._base
                    self._reach(local.device)
        except (cupy.cuda.runtime.CUDARuntimeError, struct.error) as error:
            raise Unavailable(
                f"The peer's memory cannot be mapped: {error}. CUDA IPC needs both processes on "
                "one host, with peer access between their GPUs. Check `nvidia-smi topo -p2p r`, or "
                "use another fabric"
            ) from error

    def _reach(self, device: torch.device) -> None:
        import cupy

        if device.index == self.device.index:
            return
        try:
            self._runtime.deviceEnablePeerAccess(device.index)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != _PEER_ACCESS_ALREADY_ENABLED:
                raise

    def close(self) -> None:
        """Unmaps it. Nothing on the device may still write to it."""
        if self._is_imported:
            self._runtime.ipcCloseMemHandle(self._base)
            self._is_imported = False
        self._base = 0


class _DeviceBytes:
    """Device memory that torch can look at."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class HostWords:
    """Words of the host that kernels read and write too: pinned for a GPU, plain for a CPU."""

    def __init__(self, count: int, device: torch.device) -> None:
        """Allocates `count` zeros."""
        num_bytes = max(4 * count, 64)
        self.address = 0
        """On the device, by unified addressing."""
        self._memory: Any = bytearray(num_bytes)
        if device.type != "cpu":
            import cupy

            self._memory = cupy.cuda.alloc_pinned_memory(num_bytes)
            self.address = int(self._memory.ptr)
        self.values: npt.NDArray[np.uint32] = np.frombuffer(
            self._memory, dtype=np.uint32, count=count
        )
        self.values[:] = 0
