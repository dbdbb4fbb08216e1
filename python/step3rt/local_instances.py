"""The instance processes of a cluster on this host: how each is started, and started again.

Owns the processes that `step3rt serve` keeps beside its coordinator. Those of a cluster that lives
as long as a program are `local_cluster`'s.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from step3rt.config import COLOCATED, NodeConfig, ServeConfig, resolve_model
from step3rt.placement import HostConfig

logger = logging.getLogger(__name__)

EX_CONFIG = 78
"""Exit code of a process that cannot use its configuration: starting it again would not help."""

STOP_TIMEOUT_S = 10.0
RESTART_DELAY_S = 1.0
_POLL_S = 0.05


def node_config(
    serve: ServeConfig, host: HostConfig, role: str, device: str, coordinator: str
) -> NodeConfig:
    """The settings of one process of a cluster."""
    return NodeConfig(
        role=role,
        model=resolve_model(serve.model),
        coordinator=coordinator,
        device=device,
        threads=host.threads,
        kv_blocks=host.kv_blocks,
        random_weights=host.random_weights,
        attention_sms=host.attention_sms,
        ffn_sms=host.ffn_sms,
        tls_cert=serve.tls_cert,
        tls_key=serve.tls_key,
        tls_ca=serve.tls_ca,
        # Who assumes that prompts are computed needs something in their place.
        random_kv=serve.assume_computed_prompts and role != "ffn",
    )


def node_command(config: NodeConfig) -> list[str]:
    """The arguments of `step3rt` that start a process, which ends with this one."""
    return ["node", config.role, *flags_of(config, skip=("role",)), exits_with_this_process()]


def flags_of(config: ServeConfig | NodeConfig, skip: Sequence[str]) -> list[str]:
    """The command line that gives `config`, defaults left out."""
    flags = []
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in skip or value is None or value == item.default:
            continue
        name = f"--{item.name.replace('_', '-')}"
        flags.append(name if value is True else f"{name}={value}")
    return flags


def exits_with_this_process() -> str:
    """The flag that has the kernel end a child when the thread that started it has ended."""
    return f"--exit-with-parent={os.getpid()}"


@dataclass(slots=True)
class _Place:
    """What runs on a device; `process` is None once it ended as it was told to."""

    name: str
    role: str
    device: str
    process: subprocess.Popen[bytes] | None = None


class LocalInstances:
    """Starts instances once the coordinator of this process listens, and again when one dies."""

    def __init__(self, serve: ServeConfig, host: HostConfig) -> None:
        """Starts nothing yet.

        Raises:
            ConfigError: the placement does not fit the cluster.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="step3rt-")
        self._ready_file = serve.ready_file or Path(self._directory.name) / "addresses.json"
        self.serve = replace(serve, ready_file=self._ready_file)
        """With what the coordinator is to be run."""
        self._host = host
        self._places = _places(serve, host)
        self._is_stopping = threading.Event()
        self._refusal: int | None = None
        # One thread starts them all: a child ends with the thread that started it.
        self._keeper = threading.Thread(target=self._keep, name="step3rt-instances", daemon=True)

    @property
    def refusal(self) -> int | None:
        """The exit code of an instance that refused its configuration, if one has."""
        return self._refusal

    def __enter__(self) -> Self:
        # One that is left from before would name another coordinator.
        self._ready_file.unlink(missing_ok=True)
        self._keeper.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_stopping.set()
        self._keeper.join()
        self._directory.cleanup()

    def _keep(self) -> None:
        while not self._ready_file.exists():
            if self._is_stopping.wait(_POLL_S):
                return
        addresses = json.loads(self._ready_file.read_text(encoding="utf-8"))
        coordinator = _reachable(addresses["control_address"])
        for place in self._places:
            self._start(place, coordinator)
        while not self._is_stopping.wait(_POLL_S):
            for place in self._places:
                self._look_after(place, coordinator)
        self._stop()

    def _start(self, place: _Place, coordinator: str) -> None:
        config = node_config(self.serve, self._host, place.role, place.device, coordinator)
        place.process = subprocess.Popen(
            [sys.executable, "-m", "step3rt", *node_command(config)],
            stdin=subprocess.DEVNULL,
            # A group of its own: Ctrl-C reaches this process alone, whose coordinator drains.
            process_group=0,
        )
        logger.info("Started %s on %s as process %d", place.name, place.device, place.process.pid)

    def _look_after(self, place: _Place, coordinator: str) -> None:
        code = None if place.process is None else place.process.poll()
        if code is None:
            return
        place.process = None
        if code == 0:
            logger.info("%s has ended, as it was told", place.name)
        elif code == EX_CONFIG:
            # It has said why. The coordinator drains as at any SIGTERM.
            self._refusal = self._refusal or code
            signal.raise_signal(signal.SIGTERM)
        elif not self._is_stopping.wait(RESTART_DELAY_S):
            logger.warning("%s ended with code %d and is started again", place.name, code)
            self._start(place, coordinator)

    def _stop(self) -> None:
        """The coordinator has asked its instances to end; who does not is made to."""
        running = [place.process for place in self._places if place.process is not None]
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()


def _places(serve: ServeConfig, host: HostConfig) -> list[_Place]:
    devices = host.used_devices(serve)
    roles = ["attention"] * serve.attention + ["ffn"] * serve.ffn
    if host.placement == COLOCATED:
        roles = [COLOCATED] * len(devices)
    return [
        _Place(f"{role}-{roles[:index].count(role)}", role, device)
        for index, (role, device) in enumerate(zip(roles, devices, strict=True))
    ]


def _reachable(address: str) -> str:
    """Where a process of this host reaches a listener of all its addresses."""
    for every, loopback in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if address.startswith(every):
            return loopback + address.removeprefix(every)
    return address
