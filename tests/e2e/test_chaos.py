"""Instances die, freeze, leave and return at random while clients come and go at random."""

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from step3rt import Client, LocalCluster, SamplingParams
from tests.e2e.clusters import (
    assert_all_blocks_return,
    is_running,
    running_cluster,
    snapshot,
    wait_until,
)
from tests.fixtures.checkpoint import Checkpoint

PROMPTS = [[5 + number] * (30 * number + 1) for number in range(8)]
MAX_TOKENS = 120
# Sampled, for a token that is sampled again after a recovery must come out the same.
PARAMS = SamplingParams(temperature=1.0, seed=9, max_tokens=MAX_TOKENS, ignore_eos=True)
DURATION_S = 60.0
NUM_CLIENTS = 8


@dataclass(slots=True)
class Visitor:
    """One client that asks, reads, checks and sometimes leaves early, until time is up."""

    address: str
    expected: list[list[int]]
    seed: int
    num_complete: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self, until_s: float) -> None:
        """Asks for one stream after the other."""
        choices = random.Random(self.seed)
        with Client(self.address) as client:
            while time.monotonic() < until_s and not self.failures:
                number = choices.randrange(len(PROMPTS))
                leaves_after = choices.choice(
                    [None, None, choices.randrange(PARAMS.max_tokens or 1)]
                )
                try:
                    self._read(client, number, leaves_after)
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")

    def _read(self, client: Client, number: int, leaves_after: int | None) -> None:
        tokens: list[int] = []
        with client.generate(PROMPTS[number], PARAMS) as stream:
            for event in stream:
                assert event.position == len(tokens), "a gap or a duplicate"
                tokens += event.token_ids
                if leaves_after is not None and len(tokens) >= leaves_after:
                    return
        assert tokens == self.expected[number], f"wrong tokens for prompt {number}"
        self.num_complete += 1


def strike(cluster: LocalCluster, choices: random.Random) -> str:
    """Does something to an instance that is ready, and sees to its return."""
    ready = [item for item in cluster.instances() if item["state"] == "ready"]
    if not ready:
        return "nobody is ready"
    victim = choices.choice(ready)
    pid = int(str(victim["pid"]))
    action = choices.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
    os.kill(pid, action)
    if action == signal.SIGSTOP:
        time.sleep(choices.uniform(0.1, 4))
        os.kill(pid, signal.SIGCONT)
    else:
        wait_until(lambda: not is_running(pid), "the end of an instance", 60)
        cluster.forget(pid)
        cluster.start_instance(str(victim["role"]))
    return f"{action.name} {victim['role']} {victim['role_rank']}"


@pytest.mark.slow
@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_every_stream_is_whole_and_right_whoever_dies_meanwhile(
    tiny_checkpoint: Checkpoint, tmp_path: Path, fabric: str
) -> None:
    choices = random.Random(fabric)
    history = []
    with running_cluster(
        tiny_checkpoint.directory, attention=2, ffn=2, fabric=fabric, kv_blocks=16,
        lease_ms=1500, recovery_timeout_ms=120_000, log_dir=tmp_path,
    ) as cluster:  # fmt: skip
        with Client(cluster.address) as client:
            expected = [
                client.generate(prompt, PARAMS).result().outputs[0].token_ids for prompt in PROMPTS
            ]
        until_s = time.monotonic() + DURATION_S
        clients = [Visitor(cluster.address, expected, seed) for seed in range(NUM_CLIENTS)]
        threads = [threading.Thread(target=item.run, args=(until_s,)) for item in clients]
        for thread in threads:
            thread.start()
        while time.monotonic() < until_s:
            time.sleep(choices.uniform(1, 4))
            history.append(strike(cluster, choices))
        for thread in threads:
            thread.join(180)
        assert not any(thread.is_alive() for thread in threads), history
        assert [item.failures for item in clients] == [[]] * NUM_CLIENTS, history
        assert sum(item.num_complete for item in clients) > NUM_CLIENTS, history
        wait_until(lambda: snapshot(cluster.control_address)["is_serving"], "recovery")
        assert_all_blocks_return(cluster)
