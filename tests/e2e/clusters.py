"""Starts clusters of real processes for the end-to-end tests, and looks at them from outside.

Owns how long a test waits for what; it never looks into a process, only at what operators see.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from step3rt import LocalCluster, _core
from step3rt.config import ServeConfig

# Longer than anything takes on a busy machine; reached only when a test fails.
PATIENCE_S = 120.0


@contextmanager
def running_cluster(
    model: Path,
    *,
    kv_blocks: int = 64,
    log_dir: Path | None = None,
    devices: Sequence[str] = ("reference",),
    placement: str = "disaggregated",
    **settings: Any,
) -> Iterator[LocalCluster]:
    """A cluster that serves `model` on `devices`; `settings` are those of `ServeConfig`."""
    serve = ServeConfig(model=model, listen="127.0.0.1:0", **settings)
    with LocalCluster(
        serve, kv_blocks=kv_blocks, log_dir=log_dir, devices=devices, placement=placement
    ) as cluster:
        yield cluster


def wait_until(is_done: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Returns once `is_done` says so; fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.01)


def snapshot(control_address: str) -> dict[str, Any]:
    """What the coordinator tells dashboards."""
    return dict(json.loads(_core.list_instances(control_address, PATIENCE_S)))


def num_used_blocks(cluster: LocalCluster) -> int:
    """KV blocks that sequences hold, over all attention instances."""
    return sum(
        int(str(item["num_kv_blocks"])) - int(str(item["num_free_kv_blocks"]))
        for item in cluster.instances()
    )


def assert_all_blocks_return(cluster: LocalCluster) -> None:
    """Every KV block is free again, at the latest when the last stream's end is digested."""
    assert any(item["num_kv_blocks"] for item in cluster.instances())
    wait_until(lambda: num_used_blocks(cluster) == 0, "the return of every KV block")


def pid_of(cluster: LocalCluster, role: str, rank: int = 0) -> int:
    """The process that is instance `rank` of `role` now."""
    [pid] = [
        int(str(item["pid"]))
        for item in cluster.instances()
        if (item["role"], item["role_rank"]) == (role, rank)
    ]
    return pid


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def processes_with(marker: str) -> dict[int, str]:
    """pid -> command line of every running process whose arguments or environment name `marker`.

    The test's own process is left out.
    """
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            arguments = (directory / "cmdline").read_bytes()
            environment = (directory / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if marker.encode() in arguments + environment and is_running(int(directory.name)):
            found[int(directory.name)] = arguments.replace(b"\0", b" ").decode()
    return found
