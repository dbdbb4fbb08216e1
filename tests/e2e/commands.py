"""Runs the `step3rt` command as a service manager or a shell does: one process for each.

Owns the processes that it starts until the test is over; their output lies in files, for nothing
waits on a pipe that a dead test no longer reads.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.e2e.clusters import PATIENCE_S, wait_until

COMMAND = (sys.executable, "-m", "step3rt")


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment,
        check=False,
    )


def free_address() -> str:
    """A loopback address whose port nothing listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@dataclass(slots=True)
class Running:
    """A command that runs. The addresses are a coordinator's."""

    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""
    control_address: str = ""
    metrics_address: str | None = None

    def output(self) -> str:
        """Everything that it said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@dataclass(slots=True)
class Commands:
    """Coordinators and instances that do not outlive a test."""

    directory: Path
    _running: list[Running] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for command in self._running:
            command.process.kill()
            command.process.wait()

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Running:
        """Starts any command."""
        handle, name = tempfile.mkstemp(suffix=".log", dir=self.directory)
        with os.fdopen(handle, "wb") as log:
            process = subprocess.Popen(
                [*COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
            )
        running = Running(process, Path(name))
        self._running.append(running)
        return running

    def serve(
        self, model: Path, *flags: str, environment: Mapping[str, str] | None = None
    ) -> Running:
        """Starts a coordinator on free ports, unless flags say otherwise, and waits for it."""
        ready_file = Path(tempfile.mkdtemp(dir=self.directory)) / "ready.json"
        command = self.start(
            "serve",
            "--listen=127.0.0.1:0",
            "--control-listen=127.0.0.1:0",
            f"--ready-file={ready_file}",
            *flags,
            str(model),
            environment=environment,
        )
        wait_until(
            lambda: ready_file.exists() or command.process.poll() is not None, "the ready file"
        )
        assert command.process.poll() is None, command.output()
        addresses: dict[str, Any] = json.loads(ready_file.read_text(encoding="utf-8"))
        command.address = addresses["address"]
        command.control_address = addresses["control_address"]
        command.metrics_address = addresses["metrics_address"]
        return command

    def node(
        self,
        role: str,
        model: Path,
        coordinator: Running,
        *flags: str,
        environment: Mapping[str, str] | None = None,
    ) -> Running:
        """Starts an instance of `coordinator`'s cluster."""
        return self.start(
            "node",
            role,
            f"--model={model}",
            f"--coordinator={coordinator.control_address}",
            "--kv-blocks=64",
            *flags,
            environment=environment,
        )
