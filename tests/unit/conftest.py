"""Starts clusters for tests of the instances' loops, and ends them whatever happens."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.fixtures.checkpoint import Checkpoint
    from tests.fixtures.planned_cluster import Cluster, ClusterMaker


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
