"""The device pipeline over real processes and the real coordinator, on the CPU and on GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from step3rt import Client, LocalCluster
from step3rt.errors import Unavailable
from tests.e2e.clusters import assert_all_blocks_return, pid_of, wait_until
from tests.e2e.commands import Commands, Running
from tests.e2e.device_clusters import (
    ON_SHARED_OR_OWN_GPUS,
    SETTINGS,
    Texts,
    Topology,
    assert_same_while_decided,
    device_cluster,
    generate,
    generate_through_a_kill,
    prompts,
    setting_flags,
)
from tests.fixtures.device_reference import assert_agrees, reference_decoder
from tests.kernels.decoder_inputs import NANO

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(slots=True)
class Smallest:
    """1A1F, started as an operator does, and what it gave at first."""

    commands: Commands
    coordinator: Running
    nodes: list[Running]
    texts: Texts


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smallest]:
    with Commands(tmp_path_factory.mktemp("smallest")) as commands:
        coordinator = commands.serve(NANO, *setting_flags(SETTINGS))
        nodes = [
            commands.node(role, NANO, coordinator, "--device=cpu", "--kv-blocks=64")
            for role in ("attention", "ffn")
        ]
        yield Smallest(commands, coordinator, nodes, generate(coordinator))


def test_one_attention_and_one_ffn_instance_give_the_decoders_tokens(smallest: Smallest) -> None:
    assert_agrees(reference_decoder(), smallest.texts)


def test_instances_outlive_a_killed_coordinator_and_serve_the_next_one(smallest: Smallest) -> None:
    first = smallest.coordinator
    with Client(first.address) as client:
        stream = client.generate(prompts()[0], temperature=0, max_tokens=100, ignore_eos=True)
        next(stream)
        first.process.kill()
        first.process.wait()
        with pytest.raises(Unavailable):
            stream.result()
    addresses = {"listen": first.address, "control-listen": first.control_address}
    second = smallest.commands.serve(NANO, *setting_flags({**SETTINGS, **addresses}))
    # One rank: tokens do not depend on batch mates, not even in the last bit.
    assert generate(second) == smallest.texts
    assert [node.process.poll() for node in smallest.nodes] == [None, None]
    second.process.terminate()
    assert second.process.wait(60) == 0
    # A coordinator that drains dismisses its instances.
    assert [node.process.wait(60) for node in smallest.nodes] == [0, 0]


def test_experts_over_three_instances_give_the_same_tokens(smallest: Smallest) -> None:
    with device_cluster(1, 3) as cluster:
        texts = generate(cluster)
    assert_agrees(reference_decoder(), texts)
    assert_same_while_decided(smallest.texts, texts)


@pytest.mark.parametrize("topology", ON_SHARED_OR_OWN_GPUS)
def test_gpus_give_the_same_tokens(topology: Topology, smallest: Smallest) -> None:
    with device_cluster(
        topology.attention, topology.ffn, topology.devices, topology.placement
    ) as cluster:
        texts = generate(cluster)
    assert_agrees(reference_decoder(), texts)
    assert_same_while_decided(smallest.texts, texts)


@pytest.fixture(scope="module")
def four() -> Iterator[LocalCluster]:
    """2A2F; every test here leaves it whole again."""
    with device_cluster(2, 2) as cluster:
        yield cluster


def test_two_of_each_give_the_same_tokens(four: LocalCluster, smallest: Smallest) -> None:
    texts = generate(four)
    assert_agrees(reference_decoder(), texts)
    assert_same_while_decided(smallest.texts, texts)
    assert_all_blocks_return(four)


@pytest.mark.parametrize("role", ["ffn", "attention"])
def test_streams_go_on_after_an_instance_is_killed_and_replaced(
    four: LocalCluster, role: str
) -> None:
    pids = {item["pid"] for item in four.instances()}
    texts, _ = generate_through_a_kill(four, pid_of(four, role), role)
    assert_agrees(reference_decoder(), texts)
    wait_until(
        lambda: sum(item["state"] == "ready" for item in four.instances()) == 4, "the return"
    )
    assert len(pids & {item["pid"] for item in four.instances()}) == 3, "the others lived on"
    assert_all_blocks_return(four)
