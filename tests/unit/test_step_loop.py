"""Instances as processes over the real fabric, driven by plans that the test writes."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step3rt import _core
from step3rt.instance.wire import A2fLayout, F2aLayout, slot_tensor
from step3rt.model.batch import Batch, Chunk
from step3rt.model.monolithic import MonolithicModel, compute_ffn
from step3rt.model.placement import Placement
from step3rt.model.step3 import compute_logits, forward
from step3rt.ops.quantize import dequantize_groups, quantize_groups

from tests.fixtures.checkpoint import Checkpoint
from tests.fixtures.plan_server import ATTENTION, FFN, PlanServer, Session


@dataclass
class Cluster:
    """A plan server and its processes."""

    server: PlanServer
    model: Path
    processes: list[Any] = field(default_factory=list)

    def start(self, role: str) -> Any:
        process = self.server.start(role, self.model, "--kv-blocks", "40")
        self.processes.append(process)
        return process

    @property
    def attention(self) -> Session:
        return self.server.live(ATTENTION)[0]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.server.close()


ClusterMaker = Callable[..., Cluster]


@pytest.fixture
def make_cluster(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Iterator[ClusterMaker]:
    clusters: list[Cluster] = []

    def make(ffn: int, **settings: Any) -> Cluster:
        server = PlanServer(tmp_path, ep_size=ffn, **settings)
        cluster = Cluster(server, tiny_checkpoint.directory)
        clusters.append(cluster)
        for role in ["attention"] + ["ffn"] * ffn:
            cluster.start(role)
        server.wait_ready(1, ffn)
        return cluster

    yield make
    for cluster in clusters:
        cluster.close()


@dataclass
class Driver:
    """Decodes sequences on one lane, a plan at a time; each has one block per 64 tokens."""

    cluster: Cluster
    lane: int
    prompts: dict[int, list[int]]
    first_block: int
    step: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    num_computed: dict[int, int] = field(default_factory=dict)

    def joined(self) -> list[dict[str, Any]]:
        return [
            {
                "sequence_id": sequence_id,
                "token_ids": prompt,
                "num_prompt_tokens": len(prompt),
                "sampling": {"top_p": 1.0, "top_logprobs": 2},
            }
            for sequence_id, prompt in self.prompts.items()
        ]

    def chunks(self, chunk_tokens: int) -> list[dict[str, Any]]:
        chunks = []
        for index, (sequence_id, prompt) in enumerate(self.prompts.items()):
            known = len(prompt) + len(self.tokens.get(sequence_id, []))
            computed = self.num_computed.get(sequence_id, 0)
            new = min(chunk_tokens, known - computed)
            first_block = self.first_block + 5 * index
            blocks = range(-(-computed // 64), -(-(computed + new) // 64))
            chunks.append(
                {
                    "sequence_id": sequence_id,
                    "num_computed_tokens": computed,
                    "num_new_tokens": new,
                    "new_block_ids": [first_block + block for block in blocks],
                    "samples": computed + new == known,
                }
            )
        return chunks

    def send(self, chunk_tokens: int = 20) -> None:
        self.step += 1
        self.cluster.server.plan(
            self.cluster.attention,
            self.lane,
            self.step,
            joined=self.joined() if self.step == 1 else [],
            chunks=self.chunks(chunk_tokens),
        )
        self.sent = self.chunks(chunk_tokens)

    def accept(self, output: Any) -> None:
        assert output.DESCRIPTOR.name == "StepOutput", output
        assert (output.lane, output.step) == (self.lane, self.step)
        assert [one.sequence_id for one in output.outputs] == list(self.prompts)
        for chunk, one in zip(self.sent, output.outputs, strict=True):
            assert not one.is_corrupt
            assert one.HasField("token_id") == chunk["samples"]
            self.num_computed[one.sequence_id] = (
                chunk["num_computed_tokens"] + chunk["num_new_tokens"]
            )
            if chunk["samples"]:
                self.tokens.setdefault(one.sequence_id, []).append(one.token_id)
                self.logprobs.setdefault(one.sequence_id, []).append(one.logprob.logprob)

    def is_done(self, num_tokens: int) -> bool:
        return all(len(self.tokens.get(one, [])) >= num_tokens for one in self.prompts)


def check(drivers: list[Driver], model: Path, num_tokens: int) -> None:
    """The cluster's tokens and logprobs are those of one process."""
    monolithic = MonolithicModel.load(model)
    for driver in drivers:
        for sequence_id, prompt in driver.prompts.items():
            expected, logits = monolithic.generate_greedy(prompt, num_tokens)
            assert driver.tokens[sequence_id][:num_tokens] == expected
            logprobs = torch.log_softmax(logits, dim=-1).max(dim=-1).values.tolist()
            found = driver.logprobs[sequence_id][:num_tokens]
            assert np.abs(np.array(found) - logprobs).max() < 1e-5


def prompt_of(length: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 256, length).tolist()
    return tokens


@pytest.mark.parametrize(("ffn", "fabric"), [(1, "tcp"), (3, "shm")])
def test_lanes_in_flight_together_decode_as_one_process_does(
    make_cluster: ClusterMaker, ffn: int, fabric: str
) -> None:
    cluster = make_cluster(ffn, fabric=fabric, num_lanes=3)
    drivers = [
        Driver(cluster, 0, {1: prompt_of(70, 1), 2: prompt_of(3, 2)}, 0),
        Driver(cluster, 1, {3: prompt_of(1, 3)}, 10),
        Driver(cluster, 2, {4: prompt_of(21, 4), 5: prompt_of(64, 5), 6: prompt_of(9, 6)}, 15),
    ]
    for driver in drivers:
        driver.send()
    while not all(driver.is_done(8) for driver in drivers):
        output = cluster.attention.next_event()
        drivers[output.lane].accept(output)
        drivers[output.lane].send()
        timing = output.timing
        assert 0 < timing.compute_ns <= timing.total_ns
        assert timing.wait_ns <= timing.total_ns
    check(drivers, cluster.model, 8)
    links = cluster.attention.links_ready.links
    assert {link.fabric for link in links} == {fabric}


def test_killed_ffn_fails_the_step_and_the_plan_can_be_sent_again(
    make_cluster: ClusterMaker,
) -> None:
    cluster = make_cluster(2)
    driver = Driver(cluster, 1, {1: prompt_of(30, 1)}, 0)
    for _ in range(3):
        driver.send()
        driver.accept(cluster.attention.next_event())

    victim = cluster.server.live(FFN)[1]
    os.kill(victim.pid, signal.SIGKILL)
    while True:  # steps succeed until the link is found dead
        driver.send()
        event = cluster.attention.next_event(timeout_s=5)
        if event.DESCRIPTOR.name == "StepOutput":
            driver.accept(event)
            continue
        break
    seen = {event.DESCRIPTOR.name, cluster.attention.next_event(timeout_s=5).DESCRIPTOR.name}
    assert seen == {"StepFailed", "PeerLost"}

    cluster.server.wait_for(lambda: victim.is_over)
    cluster.start("ffn")
    cluster.server.wait_ready(1, 2)
    driver.step += 1
    cluster.server.plan(cluster.attention, 1, driver.step, chunks=driver.sent)
    driver.accept(cluster.attention.next_event())
    while not driver.is_done(6):
        driver.send()
        driver.accept(cluster.attention.next_event())
    check([driver], cluster.model, 6)


def test_step_without_its_ffn_fails_at_once_and_says_which(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    cluster.server.settings["ep_size"] = 2
    cluster.start("attention")
    cluster.server.wait_for(lambda: len(cluster.server.live(ATTENTION, True)) == 2)
    cluster.server.publish_topology()
    second = cluster.server.live(ATTENTION)[1]
    cluster.server.wait_for(lambda: second.links_ready is not None)
    driver = Driver(cluster, 0, {1: [5, 6, 7]}, 0)
    cluster.server.plan(second, 0, 1, joined=driver.joined(), chunks=driver.chunks(20))
    failed = second.next_event(timeout_s=10)
    assert failed.DESCRIPTOR.name == "StepFailed"
    assert failed.reason == "FFN rank 1 is not linked"


def test_drained_instances_leave_with_code_0(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    driver = Driver(cluster, 0, {1: prompt_of(60, 1)}, 0)
    driver.send(60)
    cluster.server.send(cluster.attention, drain={})
    driver.accept(cluster.attention.next_event())  # what is in flight is finished
    attention, ffn = cluster.processes
    assert attention.wait(10) == 0
    ffn.send_signal(signal.SIGTERM)
    assert ffn.wait(10) == 0


def test_lost_session_is_replaced_and_sequences_are_forgotten(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    driver = Driver(cluster, 0, {1: prompt_of(10, 1)}, 0)
    driver.send()
    driver.accept(cluster.attention.next_event())
    first_sessions = [cluster.attention, cluster.server.live(FFN)[0]]
    for session in first_sessions:
        session.commands.put(None)
    cluster.server.wait_for(lambda: all(session.is_over for session in first_sessions))
    cluster.server.wait_ready(1, 1)
    assert cluster.attention not in first_sessions
    assert cluster.attention.pid == first_sessions[0].pid

    again = Driver(cluster, 0, {1: prompt_of(10, 1)}, 7)
    while not again.is_done(3):
        again.send()
        again.accept(cluster.attention.next_event())
    check([again], cluster.model, 3)


def test_production_precision_rounds_what_travels_and_nothing_else(
    make_cluster: ClusterMaker,
) -> None:
    """FP8 to the FFN instance, BF16 back, FP8 K and V: equal to the same roundings in place."""
    cluster = make_cluster(1, a2f_dtype="fp8", f2a_dtype="bfloat16", kv_dtype="fp8")
    driver = Driver(cluster, 0, {1: prompt_of(40, 1)}, 0)
    while not driver.is_done(4):
        driver.send(64)
        driver.accept(cluster.attention.next_event())

    model = MonolithicModel.load(cluster.model, kv_dtype=torch.float8_e4m3fn)
    kv = model.new_cache(64)
    new_tokens, position = prompt_of(40, 1), 0
    for token, logprob in zip(driver.tokens[1], driver.logprobs[1], strict=True):
        rows = range(len(new_tokens))
        batch = Batch.build(
            [Chunk(new_tokens, position, [0], rows[-1:])], model.config, 64, torch.float32
        )
        with torch.inference_mode():
            layers = forward(batch, model.config, model.attention, kv)
            try:
                request = next(layers)
                while True:
                    hidden = dequantize_groups(*quantize_groups(request.hidden), torch.float32)
                    output = compute_ffn(replace(request, hidden=hidden), model.config, model.ffn)
                    request = layers.send(output.bfloat16())
            except StopIteration as end:
                logprobs = torch.log_softmax(compute_logits(end.value, model.attention)[0], dim=0)
        assert int(logprobs.argmax()) == token
        assert float(logprobs[token]) == pytest.approx(logprob, abs=1e-5)
        position += len(new_tokens)
        new_tokens = [token]


@dataclass
class Rogue:
    """An attention instance of the test's own, which may push anything."""

    session: Any
    ffn: int

    def push(self, payload: torch.Tensor, layer: int, num_tokens: int, num_bytes: int) -> Any:
        slot = slot_tensor(self.session.send_slot(self.ffn, 0))
        slot[: payload.numel()] = payload
        self.session.push(self.ffn, 0, 1, layer, num_tokens, num_bytes)
        return self.poll("arrival")

    def poll(self, kind: str) -> Any:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for event in self.session.poll(0.5):
                if event.kind == kind:
                    return event
        raise TimeoutError(kind)


def test_hostile_frames_are_refused_and_the_ffn_goes_on(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    layout = A2fLayout(64, 128, 3, torch.float32)
    reply = F2aLayout(64, 128, torch.float32)

    def frame(expert_ids: list[int]) -> torch.Tensor:
        slot = torch.zeros(layout.payload_bytes(1), dtype=torch.uint8)
        placement = Placement(torch.tensor([0]), torch.tensor([expert_ids]), torch.ones(1, 3))
        layout.write(slot, torch.ones(1, 128), placement)
        return slot

    def attack() -> list[tuple[int, int]]:
        session = _core.NodeSession(json.dumps(rogue_options(cluster)))
        session.bind(layout.slot_bytes, reply.slot_bytes)
        session.ready(1)
        cluster.server.wait_for(lambda: len(cluster.server.live(ATTENTION, True)) == 2)
        cluster.server.publish_topology()
        rogue = Rogue(session, Rogue(session, 0).poll("link_up").peer)
        good, size = frame([1, -1, 8]), layout.payload_bytes(1)
        answers = [
            rogue.push(good, 1, 1, size),
            rogue.push(frame([9, -1, 8]), 1, 1, size),
            rogue.push(frame([-2, -1, 8]), 1, 1, size),
            rogue.push(frame([8, -1, 8]), 1, 1, size),
            rogue.push(frame([1, -1, 3]), 1, 1, size),
            rogue.push(frame([2**31 - 1, -(2**31), 8]), 1, 1, size),
            rogue.push(good, 4, 1, size),
            rogue.push(good, 1, 65, size),
            rogue.push(good, 1, 1, size - 4),
            rogue.push(good, 1, 0, 0),
            rogue.push(good, 1, 1, size),
        ]
        session.close()
        return [(answer.num_tokens, answer.payload_bytes) for answer in answers]

    with ThreadPoolExecutor(1) as threads:  # `ready` on the main thread would take over signals
        answers = threads.submit(attack).result(timeout=60)
    served = (1, reply.payload_bytes(1))
    assert answers == [served, *[(0, 0)] * 9, served]

    driver = Driver(cluster, 1, {1: prompt_of(10, 1)}, 0)
    while not driver.is_done(3):
        driver.send()
        driver.accept(cluster.attention.next_event())
    check([driver], cluster.model, 3)


def rogue_options(cluster: Cluster) -> dict[str, Any]:
    return {
        "coordinator": cluster.server.address,
        "role": "attention",
        "data_host": "127.0.0.1",
        "connect_timeout_s": 10.0,
        "spin_us": 0,
        "model_fingerprint": "",
        "model": {
            "name": "rogue",
            "vocab_size": 256,
            "max_model_len": 1024,
            "num_layers": 4,
            "hidden_size": 128,
            "num_experts": 8,
            "num_experts_per_token": 2,
            "eos_token_ids": [],
            "bos_token_id": 0,
        },
    }
