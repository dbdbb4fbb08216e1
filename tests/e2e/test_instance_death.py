"""Processes die; streams go on with the same tokens, or are told that they cannot."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from step3rt import Client, LocalCluster, _core
from step3rt.config import NodeConfig
from step3rt.errors import Step3Error, Unavailable
from step3rt.instance.node import connect
from step3rt.model.checkpoint import Checkpoint
from tests.e2e.clusters import (
    assert_all_blocks_return,
    pid_of,
    running_cluster,
    snapshot,
    wait_until,
)
from tests.e2e.commands import Commands
from tests.fixtures import checkpoint

PROMPTS = [[10 + number] * (20 * number + 1) for number in range(6)]
NUM_TOKENS = 200


class Reader:
    """Reads one stream on a thread of its own and checks every event's position.

    It is greedy unless `params` say otherwise.
    """

    def __init__(self, address: str, prompt: list[int], **params: Any) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._client = Client(address)
        self._prompt = prompt
        self._params = {
            "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **params,
        }  # fmt: skip
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            stream = self._client.generate(self._prompt, **self._params)
            for event in stream:
                assert event.position == len(self.token_ids), "a gap or a duplicate"
                self.token_ids += event.token_ids
                self.finish_reason = event.finish_reason
        except (Step3Error, AssertionError) as error:
            self.error = error

    def join(self) -> None:
        """Waits for the end of the stream."""
        self._thread.join(120)
        assert not self._thread.is_alive()
        self._client.close()


@contextmanager
def streams_in_flight(cluster: LocalCluster, **params: Any) -> Iterator[list[Reader]]:
    """One stream for each prompt, all of them past their first tokens and far from their end."""
    readers = [Reader(cluster.address, prompt, **params) for prompt in PROMPTS]
    try:
        wait_until(lambda: all(len(item.token_ids) > 3 for item in readers), "the first tokens")
        assert all(len(item.token_ids) < NUM_TOKENS - 50 for item in readers)
        yield readers
    finally:
        for reader in readers:
            reader.join()


@pytest.fixture(scope="module")
def cluster(tiny_checkpoint: checkpoint.Checkpoint) -> Iterator[LocalCluster]:
    """2A2F; every test here leaves it whole again."""
    with running_cluster(tiny_checkpoint.directory, attention=2, ffn=2, fabric="auto") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster) -> list[list[int]]:
    """The greedy continuations when nobody dies."""
    readers = [Reader(cluster.address, prompt) for prompt in PROMPTS]
    for reader in readers:
        reader.join()
        assert reader.error is None
    return [reader.token_ids for reader in readers]


def kill(cluster: LocalCluster, role: str, rank: int = 0) -> int:
    """Kills an instance as the kernel's memory killer does, and returns its pid."""
    pid = pid_of(cluster, role, rank)
    os.kill(pid, signal.SIGKILL)
    cluster.forget(pid)
    return pid


def is_whole(cluster: LocalCluster) -> bool:
    """Whether the cluster serves with all of its instances."""
    state = snapshot(cluster.control_address)
    return state["is_serving"] and len(state["instances"]) == 4 and all(
        item["state"] == "ready" and (item["role"] == "ffn" or len(item["links"]) == 2)
        for item in state["instances"]
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_streams_continue_after_an_ffn_instance_is_killed_and_replaced(
    cluster: LocalCluster, undisturbed: list[list[int]], rank: int
) -> None:
    with streams_in_flight(cluster) as readers:
        kill(cluster, "ffn", rank)
        wait_until(
            lambda: not snapshot(cluster.control_address)["is_serving"], "notice of the death", 30
        )
        cluster.start_instance("ffn")
    for reader, expected in zip(readers, undisturbed, strict=True):
        assert reader.error is None
        assert reader.finish_reason == "length"
        assert reader.token_ids == expected
    wait_until(lambda: is_whole(cluster), "the cluster's recovery")
    assert_all_blocks_return(cluster)


def test_streams_of_a_killed_attention_instance_go_on_at_another(
    cluster: LocalCluster, undisturbed: list[list[int]]
) -> None:
    with streams_in_flight(cluster) as readers:
        kill(cluster, "attention", 0)
    for reader, expected in zip(readers, undisturbed, strict=True):
        assert reader.error is None
        assert reader.token_ids == expected
    cluster.start_instance("attention")
    wait_until(lambda: is_whole(cluster), "the return of the attention instance")
    assert_all_blocks_return(cluster)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_go_on_counting_where_a_killed_attention_instance_stopped(
    cluster: LocalCluster, undisturbed: list[list[int]], temperature: float
) -> None:
    params = {
        "temperature": temperature, "seed": 4, "frequency_penalty": 0.25, "presence_penalty": 0.5,
        "repetition_penalty": 1.25, "logit_bias": {12: -100.0, 31: 1.0},
    }  # fmt: skip
    alone = [Reader(cluster.address, prompt, **params) for prompt in PROMPTS]
    for reader in alone:
        reader.join()
    assert all(reader.token_ids != plain for reader, plain in zip(alone, undisturbed, strict=True))
    with streams_in_flight(cluster, **params) as readers:
        kill(cluster, "attention", 0)
    for reader, expected in zip(readers, alone, strict=True):
        assert reader.error is None
        assert reader.token_ids == expected.token_ids
    cluster.start_instance("attention")
    wait_until(lambda: is_whole(cluster), "the return of the attention instance")
    assert_all_blocks_return(cluster)


def test_an_instance_that_is_asked_to_leave_hands_its_streams_over_and_exits_well(
    cluster: LocalCluster, undisturbed: list[list[int]]
) -> None:
    [leaving] = [item for item in cluster._children if item.process.pid == pid_of(
        cluster, "attention", 1)]  # fmt: skip
    with streams_in_flight(cluster) as readers:
        leaving.process.terminate()
        leaving.process.wait(60)
    assert leaving.process.returncode == 0
    cluster.forget(leaving.process.pid)
    for reader, expected in zip(readers, undisturbed, strict=True):
        assert reader.error is None
        assert reader.token_ids == expected
    cluster.start_instance("attention")
    wait_until(lambda: is_whole(cluster), "the return of the attention instance")


def test_a_frozen_instance_is_lost_and_its_streams_go_on(
    cluster: LocalCluster, undisturbed: list[list[int]]
) -> None:
    frozen = pid_of(cluster, "attention", 0)
    with streams_in_flight(cluster) as readers:
        os.kill(frozen, signal.SIGSTOP)
    for reader, expected in zip(readers, undisturbed, strict=True):
        assert reader.error is None
        assert reader.token_ids == expected
    # Awake again, it finds its lease broken and comes back with a session of its own.
    os.kill(frozen, signal.SIGCONT)
    wait_until(lambda: is_whole(cluster), "the return of the frozen instance")
    assert frozen in [item["pid"] for item in cluster.instances()]
    assert_all_blocks_return(cluster)


@pytest.fixture(scope="module")
def impatient(tiny_checkpoint: checkpoint.Checkpoint) -> Iterator[LocalCluster]:
    """1A1F that gives up on who is lost after a moment; every test here leaves it whole again."""
    with running_cluster(
        tiny_checkpoint.directory, lease_ms=1000, recovery_timeout_ms=1000
    ) as running:
        yield running


def assert_serves_with_another_ffn(cluster: LocalCluster, client: Client) -> None:
    """Starts an instance in place of the one that was lost, and generates."""
    cluster.start_instance("ffn")
    wait_until(lambda: snapshot(cluster.control_address)["is_serving"], "recovery")
    assert len(client.generate([10], max_tokens=2).result().outputs[0].token_ids) == 2


def test_when_no_instance_returns_streams_end_and_the_next_ones_are_told_to_wait(
    impatient: LocalCluster,
) -> None:
    with Client(impatient.address) as client:
        stream = client.generate([10], temperature=0, max_tokens=1000, ignore_eos=True)
        next(stream)
        kill(impatient, "ffn")
        with pytest.raises(Unavailable) as caught:
            stream.result()
        assert caught.value.reason == "NODE_LOST"
        assert caught.value.is_retryable
        assert_all_blocks_return(impatient)
        with pytest.raises(Unavailable) as caught:
            client.generate([10], max_tokens=1, timeout_s=5).result()
        assert caught.value.reason == "ENGINE_NOT_READY"
        assert_serves_with_another_ffn(impatient, client)


def join_as_an_ffn_that_nobody_can_link(cluster: LocalCluster, model: Path) -> _core.NodeSession:
    """Registers slots of another size than the cluster's: every handshake refuses them."""
    config = NodeConfig(role="ffn", model=model, coordinator=cluster.control_address)

    def join() -> _core.NodeSession:
        opened = Checkpoint.open(model)
        session = connect(config, opened, opened.fingerprint())
        session.bind(64, 64)
        session.ready(0)
        return session

    # Not on the main thread, where a session takes over the process's signals.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(join).result()


def test_streams_do_not_wait_for_ever_for_an_instance_that_cannot_link(
    impatient: LocalCluster, tiny_checkpoint: checkpoint.Checkpoint
) -> None:
    with Client(impatient.address) as client:
        stream = client.generate([10], temperature=0, max_tokens=1000, ignore_eos=True)
        next(stream)
        kill(impatient, "ffn")
        misfit = join_as_an_ffn_that_nobody_can_link(impatient, tiny_checkpoint.directory)
        with pytest.raises(Unavailable) as caught:
            stream.result()
        assert caught.value.reason == "NODE_LOST"
        misfit.close()
        assert_serves_with_another_ffn(impatient, client)


def test_instances_outlive_a_killed_coordinator_and_join_the_next_one(
    tiny_checkpoint: checkpoint.Checkpoint, commands: Commands
) -> None:
    model = tiny_checkpoint.directory
    first = commands.serve(model)
    nodes = [commands.node(role, model, first) for role in ("ffn", "attention")]
    wait_until(lambda: snapshot(first.control_address)["is_serving"], "serving")
    with Client(first.address) as client:
        tokens = client.generate([10], temperature=0, max_tokens=8).result().outputs[0].token_ids
        stream = client.generate([10], temperature=0, max_tokens=1000, ignore_eos=True)
        next(stream)
        first.process.kill()
        first.process.wait()
        with pytest.raises(Unavailable) as caught:
            stream.result()
        assert caught.value.is_retryable

    flags = (f"--listen={first.address}", f"--control-listen={first.control_address}")
    second = commands.serve(model, *flags)
    wait_until(lambda: snapshot(second.control_address)["is_serving"], "serving again")
    with Client(second.address) as client:
        again = client.generate([10], temperature=0, max_tokens=8).result().outputs[0].token_ids
    assert again == tokens
    assert [node.process.poll() for node in nodes] == [None, None], "the same processes serve"
    second.process.terminate()
    assert second.process.wait(60) == 0
    # A coordinator that drains dismisses its instances.
    assert [node.process.wait(60) for node in nodes] == [0, 0]


def test_instances_end_when_their_coordinator_does_not_come_back(
    tiny_checkpoint: checkpoint.Checkpoint, commands: Commands
) -> None:
    coordinator = commands.serve(tiny_checkpoint.directory)
    node = commands.node("ffn", tiny_checkpoint.directory, coordinator, "--connect-timeout-s=1")
    wait_until(lambda: snapshot(coordinator.control_address)["instances"], "the registration")
    coordinator.process.kill()
    coordinator.process.wait()
    assert node.process.wait(60) == 69
    assert coordinator.control_address in node.output().splitlines()[-1]
