"""Clusters of the device pipeline for the end-to-end tests, and what they generate."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from step3rt import Client, LocalCluster
from tests.e2e.clusters import running_cluster, snapshot, wait_until
from tests.e2e.commands import Running
from tests.fixtures.device_reference import DECIDED, leads, reference_decoder
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
    attention: int,
    ffn: int,
    devices: Sequence[str] = ("cpu",),
    placement: str = "disaggregated",
) -> Iterator[LocalCluster]:
    with running_cluster(
        NANO, devices=devices, placement=placement, attention=attention, ffn=ffn, **SETTINGS
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


def generate_through_a_kill(cluster: LocalCluster, pid: int, role: str) -> Texts:
    """As `generate`; once every stream has begun, a process of `role` is killed and replaced."""
    with Client(cluster.address) as client:
        streams = [
            client.generate(prompt, temperature=0, max_tokens=KILLED_TOKENS, ignore_eos=True)
            for prompt in prompts()
        ]
        begun = [next(stream) for stream in streams]
        killed_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        cluster.forget(pid)
        if role != "attention":
            # Whoever lacks experts knows within a second.
            wait_until(lambda: not snapshot(cluster.control_address)["is_serving"], "notice", 30)
            assert time.monotonic() - killed_s < 1.0
        cluster.start_instance(role)
        outputs = [stream.result() for stream in streams]
    assert all(event.position == 0 for event in begun)
    found = [output.outputs[0] for output in outputs]
    assert [(one.finish_reason, len(one.token_ids)) for one in found] == [
        ("length", KILLED_TOKENS)
    ] * len(found)
    return [(prompt, one.token_ids) for prompt, one in zip(prompts(), found, strict=True)]


def setting_flags(settings: Mapping[str, object]) -> list[str]:
    """The flags of `step3rt serve` that give them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
