"""Ordered work beside the caller: a CUDA stream, or on the CPU one thread with a queue.

Owns the order of what it is given and nothing else: no buffers, no graphs. Both kinds keep the same
promise, so that a program written for streams of a GPU runs in tests without one: work of one
stream runs in order, streams do not wait for each other, and whoever gives work returns at once.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

import torch

Work = Callable[[], None]

MAX_QUEUED = 1024
"""Work that waits in a CPU stream; who gives more waits, as at the end of the driver's queue."""


class Event:
    """A place in a stream: done when all work that was given before it is."""

    def __init__(self, recorded: "torch.cuda.Event | _CpuEvent") -> None:
        """`Stream.record` makes it."""
        self._recorded = recorded

    def is_done(self) -> bool:
        """Whether the stream has passed this place; never waits.

        Raises:
            Exception: what work of the stream has raised, or the driver's error.
        """
        return bool(self._recorded.query())

    def wait(self) -> None:
        """Waits until the stream has passed this place, without the GIL.

        Raises:
            Exception: what work of the stream has raised, or the driver's error.
        """
        self._recorded.synchronize()

    def elapsed_ns(self, since: "Event") -> int:
        """Returns the nanoseconds by the device's own clock from the end of `since` to this one's.

        Both are done, of one stream, and were recorded with `is_timed`.
        """
        elapsed_ms = since._recorded.elapsed_time(self._recorded)  # type: ignore[arg-type]
        return round(elapsed_ms * 1e6)


class Stream:
    """Runs work in order, beside the caller and beside other streams.

    On a GPU work is launched by the caller and runs on a CUDA stream. On the CPU a thread of the
    stream's own calls it, so that one that parks in a wait holds up nobody else. After an error
    nothing more of the stream runs, and every later call reports it: so it is with CUDA.

    As a context manager it is the current stream of the block: launches in it follow all work that
    was given before. On the CPU the caller computes them itself, so entering waits for that work;
    what is to follow work that the block itself gives, a replay for example, goes through `run`.
    One thread at a time enters.
    """

    def __init__(self, device: torch.device) -> None:
        """Makes a stream of `device`, a CUDA device or the CPU."""
        self.device = device
        self._cuda: torch.cuda.Stream | None = None
        self._entered: list[torch.cuda.StreamContext] = []
        if device.type == "cuda":
            self._cuda = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return
        self._worker = _Worker()
        # Frees the thread of a stream that nobody closed.
        self._finalizer = weakref.finalize(self, self._worker.close)

    def run(self, work: Work) -> None:
        """Gives the stream work and returns; it runs after all that was given before.

        Args:
            work: Launches kernels or copies; on a GPU it is called here, on the CPU later, by the
                stream's thread.

        Raises:
            Exception: what earlier work has raised.
        """
        if self._cuda is None:
            self._worker.run(work)
            return
        with torch.cuda.stream(self._cuda):
            work()

    def record(self, *, is_timed: bool = False) -> Event:
        """Returns the event of all work given so far.

        Args:
            is_timed: The device notes when it gets there, see `Event.elapsed_ns`.

        Raises:
            Exception: what earlier work has raised.
        """
        if self._cuda is None:
            return Event(self._worker.record())
        event = torch.cuda.Event(blocking=True, enable_timing=is_timed)  # type: ignore[no-untyped-call]
        event.record(self._cuda)
        return Event(event)

    def synchronize(self) -> None:
        """Waits for all work given so far.

        Raises:
            Exception: what it has raised.
        """
        self.record().wait()

    def close(self) -> None:
        """Lets the work given so far run and ends a CPU stream's thread; takes no more work."""
        if self._cuda is None:
            self._finalizer()

    def cuda_stream(self) -> torch.cuda.Stream | None:
        """The CUDA stream, for capture; None on the CPU."""
        return self._cuda

    def __enter__(self) -> "Stream":
        if self._cuda is None:
            self.synchronize()
            return self
        context = torch.cuda.stream(self._cuda)
        context.__enter__()  # type: ignore[no-untyped-call]
        self._entered.append(context)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._cuda is not None:
            self._entered.pop().__exit__(kind, error, traceback)


class _CpuEvent:
    """The CPU's counterpart of torch.cuda.Event; work of its stream sets it."""

    def __init__(self, worker: "_Worker") -> None:
        self._worker = worker
        self._reached = threading.Event()
        self._reached_ns = 0

    def reach(self) -> None:
        self._reached_ns = time.perf_counter_ns()
        self._reached.set()

    def elapsed_time(self, other: "_CpuEvent") -> float:
        """Milliseconds from here to the other one."""
        return (other._reached_ns - self._reached_ns) / 1e6

    def query(self) -> bool:
        is_reached = self._reached.is_set()
        if is_reached:
            self._worker.check()
        return is_reached

    def synchronize(self) -> None:
        self._reached.wait()
        self._worker.check()


class _Worker:
    """The thread of one CPU stream; it does not keep the stream alive."""

    def __init__(self) -> None:
        # Simple, so that a finalizer, which may run anywhere, can always put the end into it.
        self._queue: queue.SimpleQueue[Work | _CpuEvent | None] = queue.SimpleQueue()
        self._room = threading.BoundedSemaphore(MAX_QUEUED)
        self._error: BaseException | None = None
        self._is_closed = False
        # A daemon: work that is parked for ever must not keep the process.
        self._thread = threading.Thread(target=self._loop, name="step3rt-stream", daemon=True)
        self._thread.start()

    def run(self, work: Work) -> None:
        self.check()
        self._put(work)

    def record(self) -> _CpuEvent:
        self.check()
        event = _CpuEvent(self)
        self._put(event)
        return event

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._queue.put(None)

    def _put(self, item: Work | _CpuEvent) -> None:
        if self._is_closed:
            raise RuntimeError(
                "The stream is closed. Its thread has ended. Give work to it before `close`."
            )
        self._room.acquire()
        self._queue.put(item)

    def _loop(self) -> None:
        while (item := self._queue.get()) is not None:
            self._room.release()
            if isinstance(item, _CpuEvent):
                item.reach()
            elif self._error is None:
                try:
                    item()
                except BaseException as error:
                    self._error = error  # raised to whoever asks next
            # What the work holds on to is not kept until there is more.
            del item
