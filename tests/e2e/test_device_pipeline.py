"""The device pipeline over real processes and the real coordinator, on the CPU."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pytest
import torch

from step3rt import Client, LocalCluster
from step3rt.errors import Unavailable
from tests.e2e.clusters import (
    assert_all_blocks_return,
    pid_of,
    running_cluster,
    snapshot,
    wait_until,
)
from tests.e2e.commands import Commands, Running
from tests.fixtures.device_reference import DECIDED, assert_agrees, leads, reference_decoder
from tests.kernels.decoder_inputs import NANO, windows

NUM_TOKENS = 16
KILLED_TOKENS = 36
SETTINGS: dict[str, Any] = {
    "lanes": 2,
    "dtype": "bfloat16",
    "precision": "production",
    "max_tokens_per_micro_batch": 64,
    "max_model_len": 192,
}
Texts = list[tuple[list[int], list[int]]]


def prompts() -> list[list[int]]:
    """Beginnings of held-out texts; one is computed in two chunks of 64 tokens at most."""
    lengths = (9, 30, 80, 5, 17, 44)
    return [window[:length] for window, length in zip(windows(), lengths, strict=False)]


@contextmanager
def device_cluster(
    attention: int, ffn: int, devices: Sequence[str] = ("cpu",)
) -> Iterator[LocalCluster]:
    with running_cluster(
        NANO, devices=devices, attention=attention, ffn=ffn, **SETTINGS
    ) as cluster:
        links = [link for item in cluster.instances() for link in item["links"]]
        assert [link["fabric"] for link in links] == ["cuda_ipc"] * attention * ffn
        yield cluster


def generate(cluster: LocalCluster | Running, num_tokens: int = NUM_TOKENS) -> Texts:
    """All prompts at once, greedily, once the cluster serves."""
    wait_until(lambda: snapshot(cluster.control_address)["is_serving"], "serving")
    with Client(cluster.address) as client, ThreadPoolExecutor(len(prompts())) as pool:
        streams = [
            client.generate(prompt, temperature=0, max_tokens=num_tokens, ignore_eos=True)
            for prompt in prompts()
        ]
        outputs = list(pool.map(lambda stream: stream.result(), streams))
    found = [output.outputs[0].token_ids for output in outputs]
    assert [len(token_ids) for token_ids in found] == [num_tokens] * len(found)
    return list(zip(prompts(), found, strict=True))


def assert_same_while_decided(one: Texts, other: Texts) -> None:
    """Two runs give the same tokens up to the first of each text that rounding may have chosen."""
    model = reference_decoder()
    num_same = 0
    for (prompt, first), (_, second) in zip(one, other, strict=True):
        _, lead = leads(model, prompt, first)
        count = len(list(takewhile(lambda value: value > DECIDED, lead.tolist())))
        assert first[:count] == second[:count]
        num_same += len(list(takewhile(bool, (a == b for a, b in zip(first, second, strict=True)))))
    assert num_same > len(one) * 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
        coordinator = commands.serve(NANO, *flags)
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
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    flags += [f"--{name}={value}" for name, value in addresses.items()]
    second = smallest.commands.serve(NANO, *flags)
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


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("attention", "ffn"), [(1, 1), (2, 2), (1, 3)])
def test_gpus_give_the_same_tokens(attention: int, ffn: int, smallest: Smallest) -> None:
    num_devices = attention + ffn
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"{num_devices} GPUs are needed")
    devices = [f"cuda:{index}" for index in range(num_devices)]
    with device_cluster(attention, ffn, devices) as cluster:
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
    killed = pid_of(four, role)
    with Client(four.address) as client:
        streams = [
            client.generate(prompt, temperature=0, max_tokens=KILLED_TOKENS, ignore_eos=True)
            for prompt in prompts()
        ]
        begun = [next(stream) for stream in streams]
        killed_s = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        four.forget(killed)
        if role == "ffn":
            # Whoever lacks experts knows within a second.
            wait_until(lambda: not snapshot(four.control_address)["is_serving"], "notice", 30)
            assert time.monotonic() - killed_s < 1.0
        four.start_instance(role)
        outputs = [stream.result() for stream in streams]
    assert all(event.position == 0 for event in begun)
    found = [output.outputs[0] for output in outputs]
    assert [(one.finish_reason, len(one.token_ids)) for one in found] == [
        ("length", KILLED_TOKENS)
    ] * 6
    texts = [(prompt, one.token_ids) for prompt, one in zip(prompts(), found, strict=True)]
    assert_agrees(reference_decoder(), texts)
    wait_until(
        lambda: sum(item["state"] == "ready" for item in four.instances()) == 4, "the return"
    )
    assert len(pids & {item["pid"] for item in four.instances()}) == 3, "the others lived on"
    assert_all_blocks_return(four)
