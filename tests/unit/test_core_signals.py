"""Signals and the service manager: what an instance does when it is asked to stop.

Every instance here is a process of its own, whose main thread is its loop.
"""

import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from step3rt import _core
from step3rt.errors import Cancelled
from tests.fixtures.core_processes import (
    PATIENCE_S,
    Coordinator,
    Processes,
    join_cluster,
    node_options,
    receive,
    wait_until,
)


def _ends_on_drain(pipe: Connection, options: str) -> None:
    session = join_cluster(options)
    pipe.send("ready")
    while not any(event.kind == "drain" for event in session.poll(10.0)):
        pass
    pipe.send("drained")
    session.close()


def _ignores_drain(pipe: Connection, options: str) -> None:
    session = join_cluster(options)
    pipe.send("ready")
    while True:
        for event in session.poll(10.0):
            pipe.send(event.kind)


def _loads_forever(pipe: Connection, options: str) -> None:
    session = _core.NodeSession(options)
    session.set_status("loading")
    pipe.send("loading")
    time.sleep(PATIENCE_S)


def _loads_again(pipe: Connection, options: str) -> None:
    join_cluster(options).close()  # has served
    session = _core.NodeSession(options)
    pipe.send("loading again")
    try:
        while True:
            session.set_status("loading")
            time.sleep(0.01)
    except Cancelled as error:
        pipe.send(str(error))
    session.close()


def _connects_forever(pipe: Connection, options: str) -> None:
    pipe.send("connecting")
    try:
        _core.NodeSession(options)
    except KeyboardInterrupt:
        pipe.send("interrupted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_loop_to_drain(
    number: signal.Signals,
    coordinator: Coordinator,
    processes: Processes,
) -> None:
    process, pipe = processes.start(_ends_on_drain, coordinator.options("attention"))
    assert receive(pipe) == "ready"
    assert process.pid is not None
    os.kill(process.pid, number)
    assert receive(pipe) == "drained"
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    wait_until(lambda: coordinator.instances() == [])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_a_loop_that_does_not_listen(
    number: signal.Signals,
    code: int,
    coordinator: Coordinator,
    processes: Processes,
) -> None:
    process, pipe = processes.start(_ignores_drain, coordinator.options("ffn"))
    assert receive(pipe) == "ready"
    assert process.pid is not None
    os.kill(process.pid, number)
    assert receive(pipe) == "drain"
    wait_until(lambda: [item["state"] for item in coordinator.instances()] == ["draining"])
    os.kill(process.pid, number)
    process.join(PATIENCE_S)
    assert process.exitcode == code


def test_a_signal_ends_an_instance_that_is_still_loading(
    coordinator: Coordinator, processes: Processes
) -> None:
    process, pipe = processes.start(_loads_forever, coordinator.options("ffn"))
    assert receive(pipe) == "loading"
    process.terminate()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGTERM


def test_a_signal_ends_an_instance_that_loads_again(
    coordinator: Coordinator, processes: Processes
) -> None:
    process, pipe = processes.start(_loads_again, coordinator.options("ffn"))
    assert receive(pipe) == "loading again"
    process.terminate()
    assert "while this instance loaded" in receive(pipe)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    wait_until(lambda: coordinator.instances() == [])


def test_ctrl_c_ends_the_wait_for_a_coordinator(
    processes: Processes,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        process, pipe = processes.start(_connects_forever, node_options(address, "ffn"))
        assert receive(pipe) == "connecting"
        silent.accept()[0].close()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        assert receive(pipe) == "interrupted"


def test_the_service_manager_hears_of_loading_readiness_life_and_the_end(
    coordinator: Coordinator,
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        process, pipe = processes.start(_is_supervised, coordinator.options("ffn"))

        def next_message() -> list[str]:
            return manager.recv(4096).decode().splitlines()

        extension = "EXTEND_TIMEOUT_USEC=120000000"
        looking = f"STATUS=looking for the coordinator at {coordinator.control_address}"
        for status in (looking, "STATUS=connected", "STATUS=loading 1 of 2"):
            assert next_message() == [status, extension]
        assert next_message() == ["READY=1", "STATUS=ready"]
        # Only a loop that comes round feeds the watchdog.
        manager.settimeout(0.5)
        with pytest.raises(TimeoutError):
            next_message()
        manager.settimeout(PATIENCE_S)
        pipe.send("poll")
        assert [next_message() for _ in range(3)] == [["WATCHDOG=1"]] * 3
        process.terminate()
        while (message := next_message()) == ["WATCHDOG=1"]:
            pass
        assert message == ["STOPPING=1", "STATUS=draining"]


def _is_supervised(pipe: Connection, options: str) -> None:
    session = _core.NodeSession(options)
    session.set_status("loading 1 of 2")
    session.bind(64, 64)
    session.ready(0)
    pipe.recv()
    while not any(event.kind == "drain" for event in session.poll(10.0)):
        pass
    session.close()
