"""What a lane does, on a CPU: the reference of the kernels a lane launches on a GPU.

The same slots, flags, sequence numbers and errors as kernels/link/afd.cuh, where the argument for
their order is told, over memory that processes share. It never hangs without a stop word that ends
it, and holds no lock while it sleeps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from step3rt.ops.afd_host_lane import HostFlag, HostLane, Pause, bits, frame_number
from step3rt.ops.afd_region import HostWords
from step3rt.ops.afd_slots import AfdShape, PeerState, local_ids
from step3rt.ops.device_link import LinkError
from step3rt.ops.rmsnorm_quantize import QuantizedRows

_SEND_COLUMN, _WAIT_COLUMN = 1, 3  # of AFD_TRACE_ROW
_MASK_SHIFT = 32  # in the second word of a frame's flag; the rows lie below


@dataclass(frozen=True, slots=True)
class RankSlot:
    """What an attention instance writes at one FFN rank, and reads from it; views of one lane.

    `hidden` e4m3[T, H], `scales` f32[T, H / 128], `ids` i32[T, C], `weights` f32[T, C].
    """

    hidden: torch.Tensor
    scales: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    peer_flag: HostFlag
    flag: HostFlag


@dataclass(frozen=True, slots=True)
class SourceSlot:
    """What an FFN rank writes at one source, `sums` bf16[T, H], and reads from it."""

    sums: torch.Tensor
    peer_flag: HostFlag
    peer_admission: HostFlag
    flag: HostFlag


class AttentionHostLane(HostLane):
    """One lane of an attention instance: sends rows to the ranks, awaits their sums."""

    def __init__(
        self,
        shape: AfdShape,
        source: int,
        admission: HostFlag,
        present: torch.Tensor,
        stop: Callable[[], bool],
        report: HostWords,
        first_report: int,
    ) -> None:
        """Starts without links; `present` is i32[T] of the lane, `admission` its flag."""
        super().__init__(stop, report, first_report)
        self._shape = shape
        self._source = source
        self._admission = admission
        self._present = present
        self.ranks: list[RankSlot | None] = [None] * shape.num_ranks
        self.state.peers = [PeerState() for _ in self.ranks]

    @property
    def _linked(self) -> list[RankSlot]:
        return [slot for slot in self.ranks if slot is not None]

    def send(
        self,
        hidden: QuantizedRows,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_rows: torch.Tensor,
        num_experts: int,
        *,
        is_first_layer: bool,
    ) -> None:
        """Writes each row to the ranks that compute it, and publishes; see `AttentionSlots`."""
        begin_ns = time.time_ns()
        if self.state.error:
            return
        capacity, count = hidden.values.shape[0], int(num_rows[0])
        slots = self._linked
        if len(slots) < len(self.ranks) or not 0 <= count <= capacity:
            is_linked = len(slots) == len(self.ranks)
            self.fail(LinkError.WRONG_LENGTH if is_linked else LinkError.NOT_LINKED)
            return
        ids, weights = local_ids(self._shape, topk, count, num_experts)
        is_wanted = (ids >= 0).any(dim=2)
        places = torch.arange(self._shape.num_ranks, dtype=torch.int32)
        self._present[:capacity] = 0
        self._present[:count] = (is_wanted.int() << places[:, None]).sum(dim=0, dtype=torch.int32)
        for rank, slot in enumerate(slots):
            rows = is_wanted[rank].nonzero()[:, 0]
            slot.hidden.view(torch.uint8)[rows] = hidden.values.view(torch.uint8)[rows]
            slot.scales[rows] = hidden.scales[rows]
            slot.ids[:count] = ids[rank]
            slot.weights[:count] = weights[rank]
            peer = self.state.peers[rank]
            peer.sent += 1
            peer.num_rows = count
            if rank == 0 or not is_first_layer:
                # Of a first layer rank 0 learns who asks; the others, later, who was admitted.
                self._publish(rank, 1 << self._source if is_first_layer else 0)
        self.note(_SEND_COLUMN, begin_ns, self.state.frames, 1 << self._source, count)

    def _publish(self, rank: int, mask: int) -> None:
        slot, peer = self._linked[rank], self.state.peers[rank]
        slot.peer_flag.publish(frame_number(peer, peer.sent), peer.num_rows | mask << _MASK_SHIFT)

    def wait(self, *, is_first_layer: bool) -> None:
        """Waits for the sums of every rank."""
        begin_ns = time.time_ns()
        if self.state.error:
            return
        slots, pause = self._linked, Pause()
        if is_first_layer and len(slots) > 1:
            mask = self._await(0, self._admission, self.state.peers[0].sent, pause)
            if self.state.error:
                return
            for rank in range(1, len(slots)):
                self._publish(rank, mask)
        for rank, slot in enumerate(slots):
            peer = self.state.peers[rank]
            num_rows = self._await(rank, slot.flag, peer.received + 1, pause)
            if not self.state.error and num_rows != peer.num_rows:
                self._lose_all(rank, LinkError.WRONG_LENGTH)
            if self.state.error:
                return
            peer.received += 1
        num_rows = self.state.peers[0].num_rows
        self.note(_WAIT_COLUMN, begin_ns, self.state.frames, 1 << self._source, num_rows)
        self.state.frames += 1

    def _await(self, rank: int, flag: HostFlag, sequence: int, pause: Pause) -> int:
        expected = frame_number(self.state.peers[rank], sequence)
        while True:
            number, payload = flag.read()
            if number == expected:
                return payload
            if number > expected:
                self._lose_all(rank, LinkError.WRONG_SEQUENCE)
            elif self._stop():
                self.fail(LinkError.STOPPED)
            elif pause.elapsed_ns > self.wait_limit_ns:
                self._lose_all(rank, LinkError.TIMED_OUT)
            if self.state.error:
                return 0
            pause.sleep()

    def _lose_all(self, rank: int, error: LinkError) -> None:
        self.lose(rank, error)
        self.fail(error)  # a row needs the sums of all its ranks


class FfnHostLane(HostLane):
    """One lane of an FFN instance: awaits the rows of a step's sources, pushes their sums."""

    def __init__(
        self,
        shape: AfdShape,
        rank: int,
        ids: tuple[torch.Tensor, torch.Tensor],
        private: tuple[torch.Tensor, torch.Tensor],
        control: tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]],
        stop: Callable[[], bool],
        report: HostWords,
        first_report: int,
    ) -> None:
        """Starts without links.

        Args:
            shape: Of the links.
            rank: Of this instance.
            ids: ids i32[A, T, C] and weights f32[A, T, C] in the lane's region.
            private: the lane's own copies i32[A * T, C] and f32[A * T, C].
            control: for each source the epoch under which it may send, or 0; and, of one word,
                whether no step may begin.
            stop: Ends waits.
            report: Where errors go.
            first_report: The lane's first word there.
        """
        super().__init__(stop, report, first_report)
        self._shape = shape
        self._rank = rank
        self._ids, self._weights = ids
        self._private_ids, self._private_weights = (
            tensor.view(shape.num_sources, shape.max_tokens, -1) for tensor in private
        )
        self._active_epochs, self._pause = control
        self.join_window_ns = 0
        self.idle_limit_ns = 0
        self.sources: list[SourceSlot | None] = [None] * shape.num_sources
        self.state.peers = [PeerState() for _ in self.sources]

    def connect(self, peer: int, epoch: int) -> None:
        """Counts from 1; what is in flight of the source before is not answered any more."""
        super().connect(peer, epoch)
        self.state.participants &= ~(1 << peer)

    def wait(self, *, is_first_layer: bool) -> None:
        """Waits for the layer's rows and takes their ids; see `FfnSlots`."""
        state, begin_ns = self.state, time.time_ns()
        arrived = 0
        if not state.error:
            if not is_first_layer:
                arrived = self._await_all()
            elif self._rank == 0:
                arrived = self._admit()
            else:
                arrived = self._await_admitted()
        with self.lock:
            # Those that were linked anew in the meantime begin with a step of their own.
            state.participants &= 0 if state.error else arrived
            self._private_ids.fill_(-1)
            self._private_weights.zero_()
            for source in bits(state.participants):
                peer = state.peers[source]
                peer.received += 1
                rows = slice(0, peer.num_rows)
                self._private_ids[source, rows] = self._ids[source, rows]
                self._private_weights[source, rows] = self._weights[source, rows]
            if state.participants:
                num_rows = self._num_rows()
                self.note(_WAIT_COLUMN, begin_ns, state.frames, state.participants, num_rows)
                state.frames += 1

    def _admit(self) -> int:
        """Rank 0: who has sent by the end of the join window begins the step."""
        state, pause = self.state, Pause()
        window_start_ns: int | None = None
        arrived = 0
        while self._may_begin(0 if arrived else pause.elapsed_ns):
            with self.lock:
                active = self._active()
                arrived = sum(1 << source for source in bits(active) if self._look(source, True))
                if arrived:
                    if window_start_ns is None:
                        window_start_ns = pause.elapsed_ns
                    is_over = pause.elapsed_ns - window_start_ns > self.join_window_ns
                    awaited = active & (state.joined | state.previous)
                    if is_over or not awaited & ~arrived:
                        self._begin(arrived)
                        self._tell(arrived)
                        return arrived
            pause.sleep()
        return 0

    def _tell(self, admitted: int) -> None:
        for source in bits(admitted) if self._shape.num_ranks > 1 else ():
            slot, peer = self.sources[source], self.state.peers[source]
            if slot is not None:
                slot.peer_admission.publish(frame_number(peer, peer.received + 1), admitted)

    def _await_admitted(self) -> int:
        """Other ranks: the first frame says whom rank 0 has admitted to the step."""
        pause = Pause()
        while self._may_begin(pause.elapsed_ns):
            with self.lock:
                arrived = next((s for s in bits(self._active()) if self._look(s, True)), None)
                if arrived is not None:
                    admitted = self._mask(arrived) & self._active()
                    self._begin(admitted)
                    break
            pause.sleep()
        else:
            return 0
        return self._await_all(is_first_layer=True)

    def _await_all(self, *, is_first_layer: bool = False) -> int:
        state, pause = self.state, Pause()
        first_ns: int | None = None
        while True:
            with self.lock:
                state.participants &= self._active()
                arrived = sum(
                    1 << source
                    for source in bits(state.participants)
                    if self._look(source, is_first_layer)
                )
                missing = state.participants & self._active() & ~arrived
                if not missing:
                    return arrived
                if self._stop():
                    self.fail(LinkError.STOPPED)
                    return 0
                now_ns = pause.elapsed_ns
                if arrived and first_ns is None:
                    first_ns = now_ns
                # While nobody has come, another rank may be waiting for one, and all with it.
                is_late = first_ns is not None and now_ns - first_ns > self.wait_limit_ns
                if is_late or now_ns > 2 * self.wait_limit_ns:
                    for source in bits(missing):
                        self.lose(source, LinkError.TIMED_OUT)
                    return arrived
            pause.sleep()

    def _num_rows(self) -> int:
        return sum(self.state.peers[source].num_rows for source in bits(self.state.participants))

    def _may_begin(self, idle_ns: int) -> bool:
        if self._stop():
            self.fail(LinkError.STOPPED)
        self.state.participants = 0
        is_over = 0 < self.idle_limit_ns < idle_ns
        return not self.state.error and not self._pause[0] and not is_over

    def _begin(self, admitted: int) -> None:
        state = self.state
        state.participants = admitted
        state.previous, state.joined = state.joined, admitted
        state.steps += 1

    def _active(self) -> int:
        return sum(
            1 << source
            for source, peer in enumerate(self.state.peers)
            if peer.epoch and not peer.error and int(self._active_epochs[source]) == peer.epoch
        )

    def _mask(self, source: int) -> int:
        slot = self.sources[source]
        return 0 if slot is None else slot.flag.read()[1] >> _MASK_SHIFT

    def _look(self, source: int, is_first_layer: bool) -> bool:
        """Whether a source's next frame is there; loses the source if another one is."""
        slot, peer = self.sources[source], self.state.peers[source]
        if slot is None:
            return False
        number, payload = slot.flag.read()
        expected = frame_number(peer, peer.received + 1)
        if number < expected:
            return False
        mask, num_rows = payload >> _MASK_SHIFT, payload & ((1 << _MASK_SHIFT) - 1)
        if number > expected or bool(mask >> source & 1) != is_first_layer:
            self.lose(source, LinkError.WRONG_SEQUENCE)
            return False
        if num_rows > self._shape.max_tokens:
            self.lose(source, LinkError.WRONG_LENGTH)
            return False
        peer.num_rows = num_rows
        return True

    def push(self, sums: torch.Tensor) -> None:
        """Writes bf16[A * T, H] back to who asked, and publishes; see `FfnSlots`."""
        by_source = sums.view(self._shape.num_sources, self._shape.max_tokens, -1)
        state, begin_ns = self.state, time.time_ns()
        with self.lock:
            if state.error or not state.participants:
                return
            for source in bits(state.participants):
                slot, peer = self.sources[source], state.peers[source]
                if slot is None:
                    continue
                rows = (self._private_ids[source] >= 0).any(dim=1).nonzero()[:, 0]
                slot.sums[rows] = by_source[source, rows]
                peer.sent += 1
                slot.peer_flag.publish(frame_number(peer, peer.sent), peer.num_rows)
            frame, num_rows = state.frames - 1, self._num_rows()
            self.note(_SEND_COLUMN, begin_ns, frame, state.participants, num_rows)
