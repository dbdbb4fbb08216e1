"""Coordinator and instances speak to a service manager over a real notification socket."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.clusters import PATIENCE_S, snapshot, wait_until
from tests.e2e.commands import Commands
from tests.fixtures.checkpoint import Checkpoint


class Manager:
    """The service manager's end of one unit's notification socket.

    Reads all the time: whoever notifies waits while the socket is full, after ten messages or so.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._has_news = threading.Condition()
        self.heard: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """What the manager gives to the unit's process."""
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._path)}
        if watchdog_s is not None:
            environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        return environment

    def wait_for(self, line: str, times: int = 1) -> None:
        """Waits until a line begins with `line`, counted from the beginning."""
        with self._has_news:
            came = self._has_news.wait_for(lambda: self.count(line) >= times, PATIENCE_S)
        assert came, f"{line} came {self.count(line)} times, not {times}: {self.heard[-20:]}"

    def count(self, line: str) -> int:
        """How many lines that begin with `line` have come by now."""
        return sum(item.startswith(line) for item in self.heard)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        while message := self._socket.recv(1 << 16):
            with self._has_news:
                self.heard += message.decode().splitlines()
                self._has_news.notify_all()


@pytest.fixture
def managers(tmp_path: Path) -> Iterator[list[Manager]]:
    """One manager for the coordinator's unit, one for an instance's."""
    pair = [Manager(tmp_path / name) for name in ("serve.sock", "node.sock")]
    yield pair
    for manager in pair:
        manager.close()


def test_units_report_ready_status_watchdog_and_stopping(
    tiny_checkpoint: Checkpoint, commands: Commands, managers: list[Manager], tmp_path: Path
) -> None:
    model = tiny_checkpoint.directory
    of_serve, of_node = managers
    coordinator = commands.serve(model, environment=of_serve.environment(watchdog_s=2))
    of_serve.wait_for("READY=1")
    of_serve.wait_for("STATUS=waiting for instances")
    of_serve.wait_for("WATCHDOG=1", times=2)

    # As the unit file starts it: everything comes from the file.
    file = tmp_path / "node-ffn0.toml"
    file.write_text(
        f'role = "ffn"\nmodel = "{model}"\ncoordinator = "{coordinator.control_address}"\n',
        encoding="utf-8",
    )
    node = commands.start("node", f"--config={file}", environment=of_node.environment(watchdog_s=2))
    of_node.wait_for("STATUS=")
    of_node.wait_for("READY=1")
    of_node.wait_for("WATCHDOG=1", times=2)
    assert of_node.heard.index("READY=1") < of_node.heard.index("WATCHDOG=1")

    node.process.send_signal(signal.SIGTERM)
    of_node.wait_for("STOPPING=1")
    assert node.process.wait(60) == 0
    coordinator.process.send_signal(signal.SIGTERM)
    of_serve.wait_for("STOPPING=1")
    assert coordinator.process.wait(60) == 0


def test_an_instance_is_ready_only_after_its_weights_are_loaded(
    tiny_checkpoint: Checkpoint, commands: Commands, managers: list[Manager]
) -> None:
    coordinator = commands.serve(tiny_checkpoint.directory)
    _of_serve, of_node = managers
    commands.node(
        "attention", tiny_checkpoint.directory, coordinator, environment=of_node.environment()
    )
    of_node.wait_for("READY=1")
    loading = [line for line in of_node.heard if line.startswith("STATUS=loading weights")]
    assert any("100 %" in line for line in loading)
    assert of_node.heard.index(loading[-1]) < of_node.heard.index("READY=1")
    wait_until(
        lambda: snapshot(coordinator.control_address)["instances"][0]["state"] == "ready",
        "the coordinator's notice",
    )
    assert "WATCHDOG=1" not in of_node.heard


def test_an_instance_that_waits_for_its_coordinator_is_not_taken_for_dead(
    tiny_checkpoint: Checkpoint, commands: Commands, managers: list[Manager]
) -> None:
    coordinator = commands.serve(tiny_checkpoint.directory)
    _of_serve, of_node = managers
    commands.node(
        "ffn", tiny_checkpoint.directory, coordinator, environment=of_node.environment(watchdog_s=2)
    )
    of_node.wait_for("READY=1")
    coordinator.process.kill()
    # It keeps its weights meanwhile: a watchdog that were not fed would cost them.
    looking = f"STATUS=looking for the coordinator at {coordinator.control_address}"
    of_node.wait_for(looking, times=2)
    of_node.wait_for("WATCHDOG=1", times=of_node.count("WATCHDOG=1") + 4)
    assert of_node.count("READY=1") == 1


def test_a_start_without_a_coordinator_asks_for_time(
    tiny_checkpoint: Checkpoint, commands: Commands, managers: list[Manager]
) -> None:
    _of_serve, of_node = managers
    commands.start(
        "node", "ffn", f"--model={tiny_checkpoint.directory}", "--coordinator=127.0.0.1:9",
        environment=of_node.environment(watchdog_s=2),
    )  # fmt: skip
    of_node.wait_for("STATUS=looking for the coordinator at 127.0.0.1:9")
    of_node.wait_for("EXTEND_TIMEOUT_USEC=")
    assert "WATCHDOG=1" not in of_node.heard


def test_a_drain_that_may_take_long_asks_for_its_time(
    tiny_checkpoint: Checkpoint, commands: Commands, managers: list[Manager]
) -> None:
    of_serve, _of_node = managers
    coordinator = commands.serve(
        tiny_checkpoint.directory, "--drain-timeout-s=600", environment=of_serve.environment()
    )
    of_serve.wait_for("READY=1")
    coordinator.process.send_signal(signal.SIGTERM)
    of_serve.wait_for("STOPPING=1")
    of_serve.wait_for("EXTEND_TIMEOUT_USEC=615000000")
    assert coordinator.process.wait(60) == 0
