"""Instances of the device pipeline die under streams, on the CPU and on GPUs.

Their peers have the dead process's memory mapped, and kernels of theirs wait for it. Nobody hangs:
the cluster knows within a second, the other processes live on, and one that takes the place is
linked to them. What each death took is recorded.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from step3rt import Client, LocalCluster
from step3rt.errors import Step3Error, Unavailable
from tests.e2e.clusters import assert_all_blocks_return, pid_of, snapshot, wait_until
from tests.e2e.device_clusters import (
    ON_CPU,
    ON_GPUS,
    TOPOLOGIES,
    Topology,
    assert_in_time,
    device_cluster,
    generate,
    generate_through_a_kill,
    kill,
    prompts,
)
from tests.fixtures.device_reference import assert_agrees, reference_decoder
from tests.fixtures.figures import record

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_MODEL_LEN = 512
RECOVERY_MS = 100_000
"""A process that takes the place imports torch, starts CUDA, loads and captures first."""

SHORT_RECOVERY_MS = 100
"""For streams that are to be told at once."""

GPU_LEASE_MS = 500
"""A driver that cleans up behind a killed process may hold its sockets open for seconds: then it is
the lease that says so, within a second."""

SMALLEST = [
    pytest.param(ON_CPU, id=str(ON_CPU)),
    pytest.param(ON_GPUS[0], id=str(ON_GPUS[0]), marks=pytest.mark.multi_gpu),
]


def num_tokens_of(topology: Topology) -> int:
    """So many that no stream ends before the death; a GPU gives hundreds a second."""
    return 36 if topology.kind == "cpu" else MAX_MODEL_LEN - max(map(len, prompts())) - 1


def lease_of(topology: Topology) -> dict[str, int]:
    """Settings of a cluster that knows of a death within a second."""
    return {"lease_ms": GPU_LEASE_MS} if topology.kind == "cuda" else {}


def pids(cluster: LocalCluster) -> set[int]:
    """Of the processes with an instance that the coordinator knows."""
    return {int(str(item["pid"])) for item in cluster.instances()}


def wait_until_whole(cluster: LocalCluster, topology: Topology) -> None:
    """Returns once every instance is there again, and linked."""

    def is_whole() -> bool:
        state = snapshot(cluster.control_address)
        ready = [item for item in state["instances"] if item["state"] == "ready"]
        linked = [item for item in ready if len(item["links"]) == topology.ffn]
        return (
            state["is_serving"]
            and len(ready) == topology.attention + topology.ffn
            and sum(item["role"] == "attention" for item in linked) == topology.attention
        )

    wait_until(is_whole, "the return of every instance")


@pytest.fixture(scope="module", params=TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> Topology:
    found: Topology = request.param
    return found


@pytest.fixture(scope="module")
def cluster(topology: Topology) -> Iterator[LocalCluster]:
    """Every test here leaves it whole again."""
    with device_cluster(
        topology.attention,
        topology.ffn,
        topology.devices,
        topology.placement,
        max_model_len=MAX_MODEL_LEN,
        recovery_timeout_ms=RECOVERY_MS,
        **lease_of(topology),
    ) as running:
        yield running


@pytest.mark.parametrize("role", ["ffn", "attention"])
def test_streams_go_on_after_a_death_and_the_others_live_on(
    cluster: LocalCluster, topology: Topology, role: str
) -> None:
    before, victim = pids(cluster), pid_of(cluster, role)
    process = "colocated" if topology.is_colocated else role
    started_s = time.monotonic()
    texts, death = generate_through_a_kill(cluster, victim, process, num_tokens_of(topology))
    wait_until_whole(cluster, topology)
    record(
        f"death of the process of {role} 0, {topology}",
        {
            "freed_ms": round(death.freed_s * 1e3, 1),
            "noticed_ms": round(death.noticed_s * 1e3, 1),
            "ended_ms": round(death.ended_s * 1e3, 1),
            "whole_again_s": round(time.monotonic() - started_s, 1),
        },
    )
    assert_agrees(reference_decoder(max_model_len=MAX_MODEL_LEN), texts)
    assert pids(cluster) & before == before - {victim}, "the others lived on"
    assert len(pids(cluster)) == topology.num_processes
    assert_all_blocks_return(cluster)


@pytest.fixture(scope="module", params=SMALLEST)
def impatient(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """1A1F whose streams wait no longer than a moment for who is lost."""
    topology: Topology = request.param
    with device_cluster(
        topology.attention,
        topology.ffn,
        topology.devices,
        max_model_len=MAX_MODEL_LEN,
        recovery_timeout_ms=SHORT_RECOVERY_MS,
        **lease_of(topology),
    ) as running:
        yield running


@pytest.mark.parametrize("role", ["ffn", "attention"])
def test_streams_that_cannot_go_on_end_with_a_typed_error_within_a_second(
    impatient: LocalCluster, request: pytest.FixtureRequest, role: str
) -> None:
    before, victim = pids(impatient), pid_of(impatient, role)
    with Client(impatient.address) as client, ThreadPoolExecutor(len(prompts())) as pool:
        streams = [
            client.generate(prompt, temperature=0, max_tokens=400, ignore_eos=True)
            for prompt in prompts()
        ]
        for stream in streams:
            next(stream)

        def read(index: int) -> tuple[Step3Error | None, float]:
            try:
                streams[index].result()
            except Step3Error as error:
                return error, time.monotonic()
            return None, time.monotonic()

        ends = [pool.submit(read, index) for index in range(len(streams))]
        killed_s = time.monotonic()
        death = kill(impatient, victim)
        found = [end.result() for end in ends]
    told_s = max(at_s for _, at_s in found) - killed_s
    record(
        f"typed error, {request.node.callspec.id}",
        {
            "freed_ms": round(death.freed_s * 1e3, 1),
            "noticed_ms": round(death.noticed_s * 1e3, 1),
            "ended_ms": round(death.ended_s * 1e3, 1),
            "told_ms": round(told_s * 1e3, 1),
            "recovery_timeout_ms": SHORT_RECOVERY_MS,
        },
    )
    errors = [error for error, _ in found]
    assert all(isinstance(error, Unavailable) for error in errors), errors
    assert {error.reason for error in errors if error is not None} == {"NODE_LOST"}
    assert all(error.is_retryable for error in errors if error is not None)
    assert_in_time(impatient, death, told_s)
    assert_agrees(reference_decoder(), replace_and_generate(impatient, role))
    assert pids(impatient) & before == before - {victim}, "the other one lived on"
    assert_all_blocks_return(impatient)


def replace_and_generate(cluster: LocalCluster, role: str) -> list[tuple[list[int], list[int]]]:
    """Starts an instance in place of one that died, and generates with it."""
    cluster.start_instance(role)
    return generate(cluster)
