"""Links between two GPUs of one host: slots and flags in the receiver's memory, over CUDA IPC.

Owns device memory and the lanes' state; it exchanges nothing itself: whoever connects two
processes passes `DeviceLink.handle` across and calls `connect`.
"""

import contextlib
import enum
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from step3rt.errors import InvalidArgument, Unavailable
from step3rt.ops import launch

DEFAULT_PUSH_CTAS = 16
"""Within 5 % of the fastest count at every size from 64 KiB to 14 MiB, and the fewest SMs."""

MAX_PUSH_CTAS = 128
"""All resident at once beside one CTA of another kernel on every SM of an H200."""

_SLOT_ALIGNMENT_BYTES = 256
_FLAG_BYTES = 128
"""A flag of 16 bytes has a line of its own: the peer's stores to it touch nothing else."""

_SEQUENCE_BITS = 40
_IPC_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_ARRIVED_LIMIT_NS = 1_000_000_000

# struct LinkLane of kernels/link/link.cuh.
LINK_LANE = np.dtype(
    [
        ("peer_slot", np.uint64),
        ("peer_flag", np.uint64),
        ("slot", np.uint64),
        ("flag", np.uint64),
        ("stop", np.uint64),
        ("epoch_bits", np.uint64),
        ("wait_limit_ns", np.uint64),
        ("slot_bytes", np.uint32),
        ("error", np.uint32),
        ("sent", np.uint64),
        ("received", np.uint64),
        ("arrivals", np.uint32),
        ("reserved0", np.uint32),
        ("reserved1", np.uint64, 5),
    ]
)

_PUSH = launch.Kernel("link/sm90_u8_link_push.cu", num_threads=512, is_dependent=True)
_PUBLISH = launch.Kernel("link/sm90_u64_link_publish.cu", num_threads=32)
_WAIT = launch.Kernel("link/sm90_u64_link_wait.cu", num_threads=32, is_dependent=True)


class LinkError(enum.IntEnum):
    """Why a lane stopped; `enum LinkError` of kernels/link/link.cuh."""

    OK = 0
    STOPPED = 1
    TIMED_OUT = 2
    WRONG_SEQUENCE = 3
    WRONG_LENGTH = 4
    NOT_LINKED = 5


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What both ends of a link agree on.

    `num_lanes` micro-batch lanes, each with one slot of `slot_bytes` of payload, a multiple of 16,
    in each direction.
    """

    num_lanes: int
    slot_bytes: int

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            InvalidArgument: a size cannot be used.
        """
        if self.num_lanes < 1 or self.slot_bytes < 0 or self.slot_bytes % 16:
            raise InvalidArgument(
                f"A link of {self.num_lanes} lanes with slots of {self.slot_bytes} bytes cannot be "
                "made. Payloads move 16 bytes at a time. Use at least one lane and a multiple of 16"
            )

    @property
    def slot_stride_bytes(self) -> int:
        """From one lane's slot to the next."""
        return -(-self.slot_bytes // _SLOT_ALIGNMENT_BYTES) * _SLOT_ALIGNMENT_BYTES

    @property
    def region_bytes(self) -> int:
        """All flags, then all slots."""
        return self.slots_offset + self.num_lanes * self.slot_stride_bytes

    @property
    def slots_offset(self) -> int:
        """Where the slots begin."""
        flags = self.num_lanes * _FLAG_BYTES
        return -(-flags // _SLOT_ALIGNMENT_BYTES) * _SLOT_ALIGNMENT_BYTES


class StopWord:
    """A word in host memory that ends every wait of a process's links when it is set."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Allocates the word, not set; pinned for GPUs, unless `device` is a CPU."""
        self.address = 0
        """The same on the device, by unified addressing."""
        memory: Any = bytearray(64)
        if device is None or device.type != "cpu":
            import cupy

            memory = cupy.cuda.alloc_pinned_memory(64)
            self.address = int(memory.ptr)
        self._memory = memory
        self._word = np.frombuffer(memory, dtype=np.uint32, count=1)
        self._word[0] = 0

    @property
    def is_set(self) -> bool:
        """Whether waits end."""
        return bool(self._word[0])

    def set(self) -> None:
        """Ends all waits within microseconds; they report `LinkError.STOPPED`."""
        self._word[0] = 1

    def clear(self) -> None:
        """Lets waits wait again, once the links that it stopped have been connected anew."""
        self._word[0] = 0


class DeviceLink:
    """One end of a link: the region that the peer writes, and the lanes' state on the device.

    The region outlives the peer: it is unmapped on neither side before `close`, which the owner
    calls when its stream is idle. Use `disconnect`, `reset` and `connect` to link to another peer.
    """

    def __init__(self, shape: LinkShape, device: torch.device, stop: StopWord) -> None:
        """Allocates the region on `device`, with no frame in it.

        Args:
            shape: Of both directions.
            device: A CUDA device with an index.
            stop: Ends the waits.
        """
        import cupy

        self.shape = shape
        self.device = device
        self._stop = stop
        self._runtime = cupy.cuda.runtime
        self._peer_region = 0
        with cupy.cuda.Device(device.index):
            # Memory of its own: an IPC handle exports the whole allocation.
            self._region = int(self._runtime.malloc(shape.region_bytes))
            self._runtime.memset(self._region, 0, shape.region_bytes)
            self._runtime.deviceSynchronize()
        self.lanes = torch.zeros(
            shape.num_lanes * LINK_LANE.itemsize, dtype=torch.uint8, device=device
        )

    @property
    def handle(self) -> bytes:
        """What the peer's `connect` takes: 64 bytes, good as long as this process lives."""
        return bytes(self._runtime.ipcGetMemHandle(self._region))

    def connect(
        self, peer_handle: bytes, epoch: int, wait_limit_ns: int = _ARRIVED_LIMIT_NS
    ) -> None:
        """Maps the peer's region and starts counting frames from 1 under `epoch`.

        Args:
            peer_handle: The peer's `handle`.
            epoch: Of this incarnation of the link, the same on both sides, above all before.
            wait_limit_ns: How long a wait may take before the peer counts as lost.

        Raises:
            Unavailable: the GPUs cannot reach each other, or the peer is gone.
        """
        import cupy

        self.disconnect()
        try:
            with cupy.cuda.Device(self.device.index):
                self._peer_region = int(
                    self._runtime.ipcOpenMemHandle(peer_handle, _IPC_LAZY_PEER_ACCESS)
                )
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise Unavailable(
                f"The peer's memory cannot be mapped: {error}. CUDA IPC needs both processes on "
                "one host, with peer access between their GPUs. Check `nvidia-smi topo -p2p r`, or "
                "use another fabric"
            ) from error
        lanes = np.zeros(self.shape.num_lanes, dtype=LINK_LANE)
        for index, lane in enumerate(lanes):
            lane["peer_slot"] = self._slot_address(self._peer_region, index)
            lane["peer_flag"] = self._peer_region + index * _FLAG_BYTES
            lane["slot"] = self._slot_address(self._region, index)
            lane["flag"] = self._region + index * _FLAG_BYTES
        lanes["stop"] = self._stop.address
        lanes["epoch_bits"] = epoch << _SEQUENCE_BITS
        lanes["wait_limit_ns"] = wait_limit_ns
        lanes["slot_bytes"] = self.shape.slot_bytes
        self.lanes.copy_(torch.from_numpy(lanes.view(np.uint8)))

    def disconnect(self) -> None:
        """Unmaps the peer's region. Nothing on the device may still write to it."""
        if self._peer_region:
            torch.cuda.synchronize(self.device)
            self._runtime.ipcCloseMemHandle(self._peer_region)
            self._peer_region = 0

    def close(self) -> None:
        """Unmaps the peer's region and frees this one; idempotent."""
        self.disconnect()
        if self._region:
            self._runtime.free(self._region)
            self._region = 0

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""
        self.close()

    def slot(self, lane: int) -> torch.Tensor:
        """Returns u8[slot_bytes]: the payload that the peer writes, a view of the region."""
        return self._view(self._slot_address(self._region, lane))

    def peer_slot(self, lane: int) -> torch.Tensor:
        """Returns u8[slot_bytes]: the payload in the peer's memory, for a copy engine to write."""
        return self._view(self._slot_address(self._peer_region, lane))

    def errors(self) -> list[LinkError]:
        """Returns what stopped each lane; waits for the device. Called once a step."""
        return [LinkError(int(error)) for error in self.state()["error"]]

    def state(self) -> np.ndarray[Any, Any]:
        """Returns LINK_LANE[num_lanes] as it is on the device, after waiting for it."""
        return self.lanes.cpu().numpy().view(LINK_LANE)

    def lane(self, index: int) -> torch.Tensor:
        """Returns u8[128]: one lane's state, the argument of the kernels."""
        return self.lanes[index * LINK_LANE.itemsize :][: LINK_LANE.itemsize]

    def push(
        self,
        lane: int,
        payload: torch.Tensor,
        num_rows: torch.Tensor,
        num_ctas: int = DEFAULT_PUSH_CTAS,
    ) -> None:
        """Writes the first rows of `payload` into the peer's slot and publishes them.

        Args:
            lane: Whose slot.
            payload: [R, C] of any dtype, contiguous, rows of a multiple of 16 bytes.
            num_rows: i32[1] on the device, at most R.
            num_ctas: How many SMs copy.

        Raises:
            ValueError: an argument does not fit.
        """
        row_bytes = self._row_bytes(payload, num_rows)
        if not 1 <= num_ctas <= MAX_PUSH_CTAS:
            raise ValueError(
                f"A push by {num_ctas} CTAs cannot run. All of them have to be resident. Use 1 to "
                f"{MAX_PUSH_CTAS}."
            )
        arguments = (
            launch.pointer(self.lane(lane)),
            launch.pointer(payload),
            launch.pointer(num_rows),
            np.uint32(row_bytes),
        )
        _PUSH.launch(self.device, num_ctas, arguments)

    def push_by_copy_engine(self, lane: int, payload: torch.Tensor, num_rows: torch.Tensor) -> None:
        """Copies all of `payload` into the peer's slot without an SM, then publishes it.

        Args:
            lane: Whose slot.
            payload: [R, C] of any dtype, contiguous, rows of a multiple of 16 bytes.
            num_rows: i32[1] on the device: how many rows the peer shall read.

        Raises:
            ValueError: an argument does not fit.
        """
        row_bytes = self._row_bytes(payload, num_rows)
        flat = payload.view(torch.uint8).flatten()
        self.peer_slot(lane)[: flat.numel()].copy_(flat)
        arguments = (
            launch.pointer(self.lane(lane)),
            launch.pointer(num_rows),
            np.uint32(row_bytes),
        )
        _PUBLISH.launch(self.device, 1, arguments)

    def wait(self, lane: int, num_rows: torch.Tensor, row_bytes: int) -> None:
        """Lets the stream wait for the peer's next frame; its row count goes to `num_rows`.

        Args:
            lane: Whose slot.
            num_rows: i32[1] on the device; 0 after an error, which `errors` tells.
            row_bytes: Bytes of a row, to count rows by.

        Raises:
            ValueError: an argument does not fit.
        """
        launch.check_tensor("num_rows", num_rows, (1,), torch.int32, self.device)
        arguments = (
            launch.pointer(self.lane(lane)),
            launch.pointer(num_rows),
            np.uint32(row_bytes),
        )
        _WAIT.launch(self.device, 1, arguments)

    def _row_bytes(self, payload: torch.Tensor, num_rows: torch.Tensor) -> int:
        launch.check_tensor("payload", payload, (-1, -1), payload.dtype, self.device)
        launch.check_tensor("num_rows", num_rows, (1,), torch.int32, self.device)
        row_bytes = payload.shape[1] * payload.element_size()
        if row_bytes % 16 or payload.data_ptr() % 16:
            raise ValueError(
                f"`payload` has rows of {row_bytes} bytes at address {payload.data_ptr():#x}. The "
                "push moves 16 bytes at a time. Pad the rows."
            )
        num_bytes = payload.shape[0] * row_bytes
        if num_bytes > self.shape.slot_bytes:
            raise ValueError(
                f"`payload` has {num_bytes} bytes, a slot holds {self.shape.slot_bytes}. Make the "
                "link with larger slots."
            )
        return row_bytes

    def _slot_address(self, region: int, lane: int) -> int:
        return region + self.shape.slots_offset + lane * self.shape.slot_stride_bytes

    def _view(self, address: int) -> torch.Tensor:
        return torch.as_tensor(_DeviceBytes(address, self.shape.slot_bytes), device=self.device)


class _DeviceBytes:
    """Device memory that torch can look at."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def can_link(device: int, peer: int) -> bool:
    """Returns whether the GPUs reach each other's memory."""
    with contextlib.suppress(RuntimeError):
        return device == peer or torch.cuda.can_device_access_peer(device, peer)
    return False
