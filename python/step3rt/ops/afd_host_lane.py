"""What a lane on a CPU is made of: flags that processes share, pauses, its peers and errors.

It sends and awaits nothing by itself: `afd_reference` has what each end does.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from step3rt.ops.afd_region import HostWords
from step3rt.ops.afd_slots import SEQUENCE_BITS, LaneState, PeerState
from step3rt.ops.device_link import LinkError

_FIRST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 500e-6
"""Between looks at the flags: what a wait adds to a layer at worst."""


class HostFlag:
    """A flag of 16 bytes that another process reads or writes.

    Two aligned words: the writer stores the number last, the reader loads it first. Processors
    that keep the order of stores (x86) need no more; on others the interpreter's own locks, taken
    between two bytecodes of different threads, are what orders them.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        """Takes u8[16 or more] of a region."""
        data: Any = memory.numpy()
        self._words = memoryview(data).cast("B")[:16].cast("Q")

    def publish(self, number: int, payload: int) -> None:
        """Makes everything written before visible to who sees `number`."""
        self._words[1] = payload
        self._words[0] = number

    def read(self) -> tuple[int, int]:
        """Returns the number, and the payload that came with it if the number is awaited."""
        number = self._words[0]
        return number, self._words[1]


class Pause:
    """Sleeps between two looks, longer and longer."""

    def __init__(self) -> None:
        self._next_s = _FIRST_SLEEP_S
        self._start_ns = time.monotonic_ns()

    @property
    def elapsed_ns(self) -> int:
        """Since the wait began."""
        return time.monotonic_ns() - self._start_ns

    def sleep(self) -> None:
        """Twice as long as the last time, up to a limit."""
        time.sleep(self._next_s)
        self._next_s = min(2 * self._next_s, _LONGEST_SLEEP_S)


class HostLane:
    """What both ends share: errors and numbers of frames."""

    def __init__(self, stop: Callable[[], bool], report: HostWords, first_report: int) -> None:
        self.lock = threading.Lock()
        self.state = LaneState(peers=[])
        self.wait_limit_ns = 0
        self.trace: torch.Tensor | None = None
        self._stop = stop
        self._report = report.values
        self._first_report = first_report

    def fail(self, error: LinkError) -> None:
        """Ends the lane: it sends and awaits nothing until its links are made anew."""
        self.state.error = error
        self._report[self._first_report] = error

    def lose(self, peer: int, error: LinkError) -> None:
        """Notes what a peer did wrong."""
        self.state.peers[peer].error = error
        self._report[self._first_report + 1 + peer] = error

    def connect(self, peer: int, epoch: int) -> None:
        """Counts a peer's frames from 1 under a new epoch."""
        self.state.peers[peer] = PeerState(epoch=epoch)
        self._report[self._first_report + 1 + peer] = LinkError.OK

    def note(
        self, column: int, begin_ns: int, frame: int, participants: int, num_rows: int
    ) -> None:
        """Writes begin and end of a launch into the trace, if there is one."""
        if self.trace is not None:
            row = self.trace[frame % len(self.trace)]
            row[0], row[column], row[column + 1] = frame, begin_ns, time.time_ns()
            row[5], row[6] = participants, num_rows

    def reset(self) -> None:
        """Forgets all peers and errors."""
        self.state = LaneState(peers=[PeerState() for _ in self.state.peers])
        self._report[self._first_report :][: 1 + len(self.state.peers)] = LinkError.OK


def frame_number(peer: PeerState, sequence: int) -> int:
    """What a flag shows once a peer's frame `sequence` is there."""
    return peer.epoch << SEQUENCE_BITS | sequence


def bits(mask: int) -> Iterable[int]:
    """The peers that a mask names, in order."""
    return (bit for bit in range(mask.bit_length()) if mask >> bit & 1)
