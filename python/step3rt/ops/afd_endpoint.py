"""One end of a deployment's links: its region, its peers, its lanes' state and errors.

Owns memory and counters; what a lane sends and awaits is the business of the two roles' files.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from step3rt.errors import InvalidArgument
from step3rt.ops import launch
from step3rt.ops.afd_host_lane import HostLane
from step3rt.ops.afd_region import HostWords, Mapping, allocate_region, map_region
from step3rt.ops.afd_slots import (
    AFD_LANE,
    AFD_PEER,
    MAX_EPOCH,
    MAX_PEERS,
    SEQUENCE_BITS,
    AfdShape,
    LaneErrors,
    LaneState,
    PeerState,
    Role,
    decode_handle,
    encode_handle,
)
from step3rt.ops.device_link import LinkError, StopWord
from step3rt.ops.stream import Stream

DEFAULT_WAIT_LIMIT_NS = 1_000_000_000
"""Of an attention instance; longer than an FFN rank's, which may wait for a dead source."""

REPORT_WORDS = 1 + MAX_PEERS
"""Of a lane: its error, then its peers'."""


class AfdEndpoint(ABC):
    """What both ends share: a region, its peers and the lanes' errors."""

    _role: Role

    def __init__(
        self, shape: AfdShape, index: int, device: torch.device, stop: StopWord, num_peers: int
    ) -> None:
        self.shape = shape
        self.index = index
        self.device = device
        self._stop = stop
        self._num_peers = num_peers
        self._region = allocate_region(shape.region_bytes(self._role), device)
        self._mapped: dict[int, tuple[bytes, Mapping]] = {}
        self._streams: list[Stream] = []
        self._last_epochs = [0] * num_peers
        self._report = HostWords(shape.num_lanes * REPORT_WORDS, device)
        self._traces: list[torch.Tensor | None] = [None] * shape.num_lanes
        self._is_on_cpu = device.type == "cpu"
        self._state = torch.zeros(
            0 if self._is_on_cpu else shape.num_lanes * AFD_LANE.itemsize,
            dtype=torch.uint8,
            device=device,
        )

        if not self._is_on_cpu:
            # A lane's own stream may be waiting for a peer.
            self._side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @abstractmethod
    def _host_lanes(self) -> Sequence[HostLane]:
        """The lanes of a CPU; none on a GPU."""

    @property
    def handle(self) -> bytes:
        """What a peer's `connect` takes; good as long as this object is open."""
        memory = (self._region.kind, self._region.handle)
        return encode_handle(self.shape, self._role, self.index, memory)

    def errors(self) -> list[LaneErrors]:
        """Returns what went wrong in each lane so far.

        Reads host memory: final for the launches whose end the caller has seen, and never a wait.
        """
        words = self._report.values.reshape(self.shape.num_lanes, REPORT_WORDS)
        return [
            LaneErrors(
                LinkError(int(lane[0])),
                tuple(LinkError(int(word)) for word in lane[1 : 1 + self._num_peers]),
            )
            for lane in words
        ]

    def state(self, lane: int) -> LaneState:
        """Returns what a lane counts; on a GPU as it is there, without waiting for launches."""
        if self._is_on_cpu:
            return self._host_lanes()[lane].state
        with torch.cuda.stream(self._side_stream):
            bytes_ = self._lane_memory(lane).cpu().numpy()
        found = bytes_.view(AFD_LANE)[0]
        peers = [
            PeerState(
                epoch=int(peer["epoch_bits"]) >> SEQUENCE_BITS,
                sent=int(peer["sent"]),
                received=int(peer["received"]),
                num_rows=int(peer["num_rows"]),
                error=LinkError(int(peer["error"])),
            )
            for peer in found["peers"][: self._num_peers]
        ]
        counts = {
            name: int(found[name])
            for name in ("participants", "joined", "previous", "frames", "steps")
        }
        return LaneState(peers=peers, error=LinkError(int(found["error"])), **counts)

    def set_trace(self, lane: int, rows: torch.Tensor | None) -> None:
        """Lets a lane note when its launches began and ended; call it while the lane is idle.

        Args:
            lane: Which one.
            rows: i64[N, 8], contiguous, on the device: frame f goes to row f % N, laid out as
                `AFD_TRACE_ROW` (on an FFN instance "send" is the push of the sums). None: no more.

        Raises:
            ValueError: the rows do not fit.
        """
        if rows is not None:
            launch.check_tensor("rows", rows, (-1, 8), torch.int64, self.device)
        self._traces[lane] = rows
        if self._is_on_cpu:
            self._host_lanes()[lane].trace = rows
            return
        header = np.zeros(1, dtype=AFD_LANE)
        header["trace"] = 0 if rows is None else rows.data_ptr()
        header["trace_rows"] = 0 if rows is None else rows.shape[0]
        for name in ("trace", "trace_rows"):
            self._write_field(lane, name, header)

    def run_on(self, stream: Stream) -> None:
        """Says that lanes are launched on a stream: what waits for lanes waits for such alone.

        Without any it waits for the whole GPU, on which others of this process may be waiting for
        this end.
        """
        self._streams.append(stream)

    def close(self) -> None:
        """Unmaps the peers' regions and frees this one, when no lane runs any more; idempotent."""
        for peer in list(self._mapped):
            self._unmap(peer)
        self._region.close()

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

    def _map(self, peer: int, handle: bytes, epoch: int) -> Mapping:
        """Maps a peer's region in place of the one before; no lane may be using that.

        The same region stays mapped: to map and unmap may take a GPU that is idle.
        """
        if not 0 <= peer < self._num_peers:
            raise InvalidArgument(
                f"Peer {peer} is not one of {self._num_peers}. Ranks and sources are counted from "
                "0. Pass one of the shape's"
            )
        if not self._last_epochs[peer] < epoch <= MAX_EPOCH:
            raise InvalidArgument(
                f"Epoch {epoch} of peer {peer} does not follow {self._last_epochs[peer]}. Flags "
                f"of older epochs are told by it. Use a larger one, at most {MAX_EPOCH}"
            )
        role = Role.FFN if self._role is Role.ATTENTION else Role.ATTENTION
        address = decode_handle(handle, self.shape, role, peer, self._region.kind)
        if peer not in self._mapped or self._mapped[peer][0] != address:
            self._unmap(peer)
            mapping = map_region(address, self.shape.region_bytes(role), self.device)
            self._mapped[peer] = address, mapping
        self._last_epochs[peer] = epoch
        return self._mapped[peer][1]

    def _unmap(self, peer: int) -> None:
        if peer in self._mapped:
            self._mapped.pop(peer)[1].close()

    def _clear_report(self, lane: int, first: int, count: int) -> None:
        start = lane * REPORT_WORDS + first
        self._report.values[start : start + count] = 0

    def _lane_memory(self, lane: int) -> torch.Tensor:
        return self._state[lane * AFD_LANE.itemsize :][: AFD_LANE.itemsize]

    def _lane_pointer(self, lane: int) -> int:
        return int(self._lane_memory(lane).data_ptr())

    def _write_lane(self, lane: int, values: np.ndarray[Any, Any]) -> None:
        self._lane_memory(lane).copy_(torch.from_numpy(values.view(np.uint8)))

    def _write_field(self, lane: int, name: str, values: np.ndarray[Any, Any]) -> None:
        dtype, offset = AFD_LANE.fields[name][:2]  # type: ignore[index]
        field = np.ascontiguousarray(values[name]).view(np.uint8).reshape(-1)
        self._lane_memory(lane)[offset : offset + dtype.itemsize].copy_(torch.from_numpy(field))

    def _write_peer(self, lane: int, peer: int, values: np.ndarray[Any, Any]) -> None:
        first = AFD_LANE.fields["peers"][1] + peer * AFD_PEER.itemsize  # type: ignore[index]
        target = self._lane_memory(lane)[first : first + AFD_PEER.itemsize]
        target.copy_(torch.from_numpy(values.view(np.uint8)))
        self._clear_report(lane, 1 + peer, 1)

    def _lane_header(self, lane: int, wait_limit_ns: int) -> np.ndarray[Any, Any]:
        """A lane without links."""
        header = np.zeros(1, dtype=AFD_LANE)
        header["stop"] = self._stop.address
        header["report"] = self._report.address + 4 * lane * REPORT_WORDS
        header["wait_limit_ns"] = wait_limit_ns
        header["num_peers"] = self._num_peers
        header["index"] = self.index
        header["num_ranks"] = self.shape.num_ranks
        header["max_tokens"] = self.shape.max_tokens
        trace = self._traces[lane]
        header["trace"] = 0 if trace is None else trace.data_ptr()
        header["trace_rows"] = 0 if trace is None else trace.shape[0]
        return header

    def _wait_for_lanes(self) -> None:
        if self._is_on_cpu:
            return
        for stream in self._streams:
            stream.synchronize()
        if not self._streams:
            torch.cuda.synchronize(self.device)
