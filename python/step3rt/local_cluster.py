"""A whole cluster on this host: one coordinator and its instances as child processes.

Owns the children from start to end. It uses the same commands that an operator uses, and nothing
of it is left when it closes, when this process dies, or when a child fails.
"""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

from step3rt.config import (
    COLOCATED,
    DEFAULT_TRACE_STEPS,
    DISAGGREGATED,
    REFERENCE_DEVICE,
    ServeConfig,
    build,
    resolve_model,
)
from step3rt.errors import ConfigError, Step3Error, Unavailable
from step3rt.local_instances import (
    EX_CONFIG,
    STOP_TIMEOUT_S,
    exits_with_this_process,
    flags_of,
    node_command,
    node_config,
)
from step3rt.placement import HostConfig, devices_of

_T = TypeVar("_T")

_POLL_S = 0.05
_CHECK_S = 0.5
"""How often the processes are looked at while no request is done."""
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_LOG_TAIL_CHARS = 4000


@dataclass(frozen=True, slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


class _Starts:
    """A thread that starts children: one ends with the thread that started it.

    That of whoever makes a cluster may end before the cluster is to.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Start | None] = SimpleQueue()
        threading.Thread(
            target=_run_starts, args=(self._queue,), name="step3rt-children", daemon=True
        ).start()

    def start(self, make: Callable[[], "subprocess.Popen[bytes]"]) -> "subprocess.Popen[bytes]":
        """Calls `make` there and returns what it gives, or raises what it raises."""
        started: Future[subprocess.Popen[bytes]] = Future()
        self._queue.put((started, make))
        return started.result()

    def end(self) -> None:
        """Ends the thread, and by that every child that still runs."""
        self._queue.put(None)


_Start = tuple["Future[subprocess.Popen[bytes]]", Callable[[], "subprocess.Popen[bytes]"]]


def _run_starts(queue: "SimpleQueue[_Start | None]") -> None:
    while (start := queue.get()) is not None:
        started, make = start
        try:
            started.set_result(make())
        except BaseException as error:
            started.set_exception(error)


class LocalCluster:
    """Starts `attention` + `ffn` instances and a coordinator, and stops them on `close()`.

    Placed "disaggregated", each instance is a process of its own; "colocated", each process has one
    of either role, on one device, so that there are as many of both.

    Args:
        serve: the coordinator's settings; addresses and ready file are chosen here. Instances
            share its certificate, which must be for 127.0.0.1.
        threads: threads for one instance's computation.
        kv_blocks: KV blocks of 64 tokens per attention instance; default: by memory.
        placement: "disaggregated" or "colocated".
        devices: what the processes compute on, attention instances first, see `NodeConfig.device`;
            the list begins anew where it ends.
        attention_sms: see `NodeConfig.attention_sms`.
        ffn_sms: see `NodeConfig.ffn_sms`.
        random_weights: see `NodeConfig.random_weights`.
        trace_dir, trace_steps: see `NodeConfig`.
        log_dir: where the children's logs go; default: a temporary directory, shown on failure.
        on_status: called with one line of progress for people.
        start_timeout_s: time until the cluster must serve.

    Raises:
        ConfigError: a child refused its configuration or the checkpoint; the message is its own. Or
            the placement does not fit the instances.
        Unavailable: the cluster did not come up in time, with what it was doing.
    """

    def __init__(
        self,
        serve: ServeConfig,
        *,
        threads: int = 1,
        kv_blocks: int | None = None,
        placement: str = DISAGGREGATED,
        devices: Sequence[str] = (REFERENCE_DEVICE,),
        attention_sms: int | None = None,
        ffn_sms: int | None = None,
        random_weights: bool = False,
        trace_dir: Path | None = None,
        trace_steps: int = DEFAULT_TRACE_STEPS,
        log_dir: Path | None = None,
        on_status: Callable[[str], None] | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        self._serve = serve
        placed = {
            "placement": placement,
            "devices": devices,
            "random_weights": random_weights,
            "threads": threads,
            "kv_blocks": kv_blocks,
            "attention_sms": attention_sms,
            "ffn_sms": ffn_sms,
        }
        self._host = build(HostConfig, placed, "LocalCluster")
        self._devices = devices_of(serve, placement, devices)
        self._trace_dir = trace_dir
        self._trace_steps = trace_steps
        self._children: list[_Child] = []
        self._starts = _Starts()
        self._directory = tempfile.TemporaryDirectory(prefix="step3rt-")
        self._log_dir = log_dir or Path(self._directory.name)
        self._on_status = on_status or (lambda _text: None)
        self.address = ""
        self.control_address = ""
        try:
            _make_log_dir(self._log_dir)
            self._start(time.monotonic() + start_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def instances(self) -> list[dict[str, object]]:
        """The coordinator's view of its instances: role, rank, pid, state, links."""
        from step3rt import _core

        snapshot = json.loads(_core.list_instances(self.control_address, 5.0, self._serve.tls))
        return list(snapshot["instances"])

    def check(self) -> None:
        """Raises what a dead child said, if one has died.

        Raises:
            ConfigError: it refused its configuration.
            Unavailable: it ended otherwise.
        """
        for child in self._children:
            code = child.process.poll()
            if code is not None:
                raise self._failure(child, code)

    def is_broken(self) -> bool:
        """Whether it cannot compute any more, unless somebody replaces a child that has died.

        It goes on without one of several attention instances: their sequences move.
        """
        dead = {child.name for child in self._children if child.process.poll() is not None}
        attention = {item.name for item in self._children if item.name.startswith("attention-")}
        return bool(dead - attention) or (bool(attention) and attention <= dead)

    def as_completed(self, futures: Iterable[Future[_T]]) -> Iterator[Future[_T]]:
        """The futures of requests as they are done.

        Raises:
            Unavailable: they wait for a process that is dead, and that nobody else replaces.
        """
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, _CHECK_S, FIRST_COMPLETED)
            yield from done
            if not done and self.is_broken():
                raise Unavailable("A process that the local cluster needs has ended")

    def start_instance(self, role: str) -> int:
        """Starts one more instance, or "colocated" one of each role; returns its process id."""
        names = {child.name for child in self._children}
        number = next(number for number in itertools.count() if f"{role}-{number}" not in names)
        return self._spawn_node(role, number)

    def forget(self, pid: int) -> None:
        """Stops watching a child that was ended on purpose, and reaps it."""
        for child in [child for child in self._children if child.process.pid == pid]:
            child.process.wait(STOP_TIMEOUT_S)
            self._children.remove(child)

    def close(self) -> None:
        """Stops every child: politely, then for good; idempotent."""
        # The coordinator drains and then asks its instances to end; they also get the signal, in
        # case it is already gone.
        with _interrupts_held():
            running = [child for child in self._children if child.process.poll() is None]
            for child in running:
                child.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for child in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()
            self._children.clear()
            self._starts.end()
            self._directory.cleanup()

    def _start(self, deadline: float) -> None:
        ready_file = Path(self._directory.name) / "addresses.json"
        self._spawn("coordinator", self._serve_command(ready_file))
        self._wait(lambda: ready_file.exists(), "starting the coordinator", deadline)
        addresses = json.loads(ready_file.read_text(encoding="utf-8"))
        self.address = addresses["address"]
        self.control_address = addresses["control_address"]
        counts = {"ffn": self._serve.ffn, "attention": self._serve.attention}
        if self._host.placement == COLOCATED:
            counts = {COLOCATED: len(self._devices)}
        for role, count in counts.items():
            for number in range(count):
                self._spawn_node(role, number)
        self._wait(self._is_serving, "starting the instances", deadline)

    def _is_serving(self) -> bool:
        from step3rt import _core

        try:
            snapshot = json.loads(_core.list_instances(self.control_address, 5.0, self._serve.tls))
        except Step3Error:
            return False
        self._on_status(str(snapshot["status"]))
        return bool(snapshot["is_serving"])

    def _wait(self, is_done: Callable[[], bool], doing: str, deadline: float) -> None:
        while not is_done():
            self.check()
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {item.name}\n{_tail(item.log)}" for item in self._children)
                raise Unavailable(
                    f"The local cluster did not come up in time while {doing}. The logs of its "
                    f"processes follow. Raise start_timeout_s if they are only slow\n{logs}"
                )
            time.sleep(_POLL_S)

    def _serve_command(self, ready_file: Path) -> list[str]:
        return [
            "serve",
            *flags_of(self._serve, skip=("model", "ready_file", "listen", "control_listen")),
            f"--listen={self._serve.listen}",
            "--control-listen=127.0.0.1:0",
            f"--ready-file={ready_file}",
            exits_with_this_process(),
            str(resolve_model(self._serve.model)),
        ]

    def _spawn_node(self, role: str, number: int) -> int:
        place = self._serve.attention + number if role == "ffn" else number
        device = self._devices[place % len(self._devices)]
        config = node_config(self._serve, self._host, role, device, self.control_address)
        config = replace(config, trace_dir=self._trace_dir, trace_steps=self._trace_steps)
        return self._spawn(f"{role}-{number}", node_command(config))

    def _spawn(self, name: str, arguments: Sequence[str]) -> int:
        log = self._log_dir / f"{name}.log"
        command = [sys.executable, "-m", "step3rt", *arguments]
        with log.open("ab") as output, _interrupts_held():
            # A group of its own: Ctrl-C reaches this process alone, which then stops the
            # children in order.
            process = self._starts.start(
                lambda: subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            )
            self._children.append(_Child(name, process, log))
        return process.pid

    def _failure(self, child: _Child, code: int) -> Step3Error:
        tail = _tail(child.log)
        last_line = tail.strip().rpartition("\n")[2]
        if code == EX_CONFIG and last_line:
            # The child's last line is its error message, already in the form of ours.
            return ConfigError(last_line.removeprefix("error: "))
        return Unavailable(
            f"The {child.name} process ended with code {code}. A cluster needs all of its "
            f"processes. Its log ends with:\n{tail}"
        )


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_MAX_LOG_TAIL_CHARS:]


def _make_log_dir(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The log directory {str(directory)!r} cannot be made: {error.strerror}. The "
            "processes write their logs there. Give one that can be written"
        ) from error


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays what Ctrl-C raises to the end of the block, so that no child is left half-way.

    The same for other signals for which this program has a function: it may raise, too.
    """
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _INTERRUPTS}
    previous = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in previous:
            # A function, not SIG_IGN nor a mask: children would inherit those.
            signal.signal(number, lambda number, _frame: held.append(number))
    except ValueError:  # not the main thread, which alone receives them
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
