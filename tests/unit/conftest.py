"""Processes and clusters for the tests of the extension module and of the instances' loops.

The imports inside the fixtures keep the extension module and torch out of tests that do not need
them.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.fixtures.checkpoint import Checkpoint
    from tests.fixtures.core_processes import Coordinator, Processes
    from tests.fixtures.planned_cluster import Cluster, ClusterMaker


@pytest.fixture
def processes() -> Iterator["Processes"]:
    """Starts processes that do not outlive the test."""
    from tests.fixtures.core_processes import Processes

    with Processes() as running:
        yield running


@pytest.fixture
def coordinator(processes: "Processes", tmp_path: Path) -> "Coordinator":
    """The coordinator of one attention and one FFN instance."""
    from tests.fixtures.core_processes import start_coordinator

    return start_coordinator(processes, tmp_path)


@pytest.fixture
def loop() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls a function on a thread that plays an instance's loop.

    Sessions take signals over on the main thread only, so here they leave SIGINT to pytest.
    """
    from tests.fixtures.core_processes import PATIENCE_S

    with ThreadPoolExecutor(1) as executor:
        yield lambda work: executor.submit(work).result(PATIENCE_S)


@pytest.fixture
def make_cluster(tiny_checkpoint: "Checkpoint", tmp_path: Path) -> "Iterator[ClusterMaker]":
    """Makes 1AnF of the tiny model; `starts_ffn=False` leaves the FFN instances to the test."""
    from tests.fixtures.plan_server import PlanServer
    from tests.fixtures.planned_cluster import Cluster

    clusters: list[Cluster] = []

    def make(ffn: int, *, starts_ffn: bool = True, **settings: Any) -> "Cluster":
        server = PlanServer(tmp_path, ep_size=ffn, **settings)
        cluster = Cluster(server, tiny_checkpoint.directory)
        clusters.append(cluster)
        cluster.start("attention")
        if starts_ffn:
            for _ in range(ffn):
                cluster.start("ffn")
            server.wait_ready(1, ffn)
        return cluster

    yield make
    for cluster in clusters:
        cluster.close()
