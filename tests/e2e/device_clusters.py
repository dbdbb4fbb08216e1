"""Clusters of the device pipeline for the end-to-end tests, and what they generate."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from step3rt import Client, LocalCluster
from tests.e2e.clusters import running_cluster, snapshot, wait_until
from tests.e2e.commands import Running
from tests.fixtures.device_reference import DECIDED, leads, reference_decoder
from tests.kernels.decoder_inputs import NANO, windows

NUM_TOKENS = 16
KILLED_TOKENS = 36
NOTICE_LIMIT_S = 1.0
"""Within which a cluster knows of a death."""

CPU_LEASE_MS = 40_000
"""So long that the end of a connection alone tells of a death within the limit."""

ENDED_WITHIN_S = 60.0
"""Within which a killed process ends, whose kernels may be waiting for ever."""

SETTINGS: dict[str, Any] = {
    "lanes": 2,
    "dtype": "bfloat16",
    "precision": "production",
    "max_tokens_per_micro_batch": 64,
    "max_model_len": 192,
}
Texts = list[tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True)
class Topology:
    """How many instances of each role, and where: one GPU for each process, or the CPU for all.

    With `shares_gpu` processes take turns on one GPU, some milliseconds each. Nothing is measured
    there, but kernels, links and graphs are those of many GPUs.
    """

    attention: int
    ffn: int
    placement: str = "disaggregated"
    kind: str = "cuda"
    shares_gpu: bool = False

    def __str__(self) -> str:
        """Returns the id of a test's parameter."""
        if self.shares_gpu:
            return f"one-gpu-{self.attention}a{self.ffn}f"
        if self.placement == "colocated":
            return f"{self.kind}-colocated{self.attention}"
        return f"{self.kind}-{self.attention}a{self.ffn}f"

    @property
    def is_colocated(self) -> bool:
        """Whether a process has an instance of either role."""
        return self.placement == "colocated"

    @property
    def num_processes(self) -> int:
        """Of instances."""
        return self.attention if self.is_colocated else self.attention + self.ffn

    @property
    def devices(self) -> list[str]:
        """Of the processes; skips the test where there are too few GPUs."""
        if self.kind == "cpu":
            return ["cpu"]
        num_gpus = 1 if self.shares_gpu else self.num_processes
        if torch.cuda.device_count() < num_gpus:
            pytest.skip(f"{num_gpus} GPUs are needed")
        return [f"cuda:{index}" for index in range(num_gpus)]


ON_CPU = Topology(1, 1, kind="cpu")
ON_GPUS = [Topology(1, 1), Topology(2, 2), Topology(1, 3), Topology(4, 4, "colocated")]
ON_ONE_GPU = [Topology(*counts, shares_gpu=True) for counts in ((1, 1), (2, 2), (1, 3))]
ON_SHARED_OR_OWN_GPUS = [
    *(pytest.param(each, id=str(each), marks=pytest.mark.gpu) for each in ON_ONE_GPU),
    *(pytest.param(each, id=str(each), marks=pytest.mark.multi_gpu) for each in ON_GPUS),
]
# On the CPU, test_device_pipeline.py kills instances of 2A2F in every run.
TOPOLOGIES = [
    pytest.param(ON_CPU, id=str(ON_CPU), marks=pytest.mark.slow),
    *ON_SHARED_OR_OWN_GPUS,
]


@dataclass(frozen=True, slots=True)
class Death:
    """What followed a SIGKILL, in seconds after it.

    Attributes:
        freed_s: the kernel has taken the process's memory, which it does before it closes sockets.
        noticed_s: the coordinator counts the process's instances out.
        ended_s: the process has ended, the driver's cleaning up included.
    """

    freed_s: float
    noticed_s: float
    ended_s: float


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
    **settings: Any,
) -> Iterator[LocalCluster]:
    """A cluster of nano that serves; `settings` come before `SETTINGS`."""
    counts = {"attention": attention, "ffn": ffn}
    if "cpu" in devices:
        settings = {"lease_ms": CPU_LEASE_MS, **settings}
    with running_cluster(
        NANO, devices=devices, placement=placement, **counts, **{**SETTINGS, **settings}
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


def assert_in_time(cluster: LocalCluster, death: Death, known_s: float) -> None:
    """That a death was known `known_s` after it, as soon as it must be.

    On a CPU that others use, the kernel may take seconds for the memory of a process of torch; that
    time does not count.
    """
    unheard_s = death.freed_s if "cpu" in cluster._devices else 0.0
    assert known_s - unheard_s < NOTICE_LIMIT_S


def kill(cluster: LocalCluster, pid: int) -> Death:
    """Kills a process of instances as the kernel's memory killer does, until it has ended."""
    freed_s: float | None = None
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)

    def is_noticed() -> bool:
        nonlocal freed_s
        if freed_s is None and not has_memory(pid):
            freed_s = time.monotonic() - killed_s
        return pid not in [item["pid"] for item in snapshot(cluster.control_address)["instances"]]

    def has_ended() -> bool:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is not None

    # Not after the process has ended: on a GPU the driver may take seconds to clean up.
    wait_until(is_noticed, "notice of the death", 30)
    noticed_s = time.monotonic() - killed_s
    wait_until(has_ended, "the end of the process", ENDED_WITHIN_S)
    cluster.forget(pid)
    return Death(freed_s or noticed_s, noticed_s, time.monotonic() - killed_s)


def has_memory(pid: int) -> bool:
    """Whether a process that was killed and not waited for has memory yet."""
    return Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0] != "0"


def generate_through_a_kill(
    cluster: LocalCluster, pid: int, role: str, num_tokens: int = KILLED_TOKENS
) -> tuple[Texts, Death]:
    """As `generate`; once every stream has begun, a process of `role` is killed and replaced."""
    with Client(cluster.address) as client, ThreadPoolExecutor(len(prompts())) as pool:
        streams = [
            client.generate(prompt, temperature=0, max_tokens=num_tokens, ignore_eos=True)
            for prompt in prompts()
        ]
        begun = [next(stream) for stream in streams]
        results = [pool.submit(stream.result) for stream in streams]
        death = kill(cluster, pid)
        is_serving = snapshot(cluster.control_address)["is_serving"]
        num_open = sum(not result.done() for result in results)
        cluster.start_instance(role)
        outputs = [result.result() for result in results]
    assert_in_time(cluster, death, death.noticed_s)
    if role != "attention":
        # Whoever lacks experts cannot go on.
        assert not is_serving
        assert num_open, "nothing was left to compute"
    assert all(event.position == 0 for event in begun)
    found = [output.outputs[0] for output in outputs]
    assert [(one.finish_reason, len(one.token_ids)) for one in found] == [
        ("length", num_tokens)
    ] * len(found)
    texts = [(prompt, one.token_ids) for prompt, one in zip(prompts(), found, strict=True)]
    return texts, death


def setting_flags(settings: Mapping[str, object]) -> list[str]:
    """The flags of `step3rt serve` that give them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
