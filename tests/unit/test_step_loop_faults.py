"""Instances whose peers die, lie or answer late, over the real fabric."""

import os
import signal
from typing import Any

import torch

from step3rt.instance.wire import A2fLayout, F2aLayout
from step3rt.model.placement import Placement
from tests.fixtures.plan_server import ATTENTION, FFN
from tests.fixtures.planned_cluster import ClusterMaker, Driver, Puppet, check, prompt_of

A2F = A2fLayout(max_tokens=64, hidden_size=128, num_columns=3, dtype=torch.float32)
F2A = F2aLayout(max_tokens=64, hidden_size=128, dtype=torch.float32)


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


def test_step_without_an_ffn_fails_at_once_and_says_which(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(2, starts_ffn=False)
    only = Puppet(cluster, "ffn", A2F.slot_bytes, F2A.slot_bytes)
    cluster.server.wait_ready(1, 1)
    driver = Driver(cluster, 0, {1: [5, 6, 7]}, 0)
    driver.send()
    failed = cluster.attention.next_event(timeout_s=10)
    assert failed.DESCRIPTOR.name == "StepFailed"
    assert failed.reason == "FFN rank 1 is not linked"
    only.close()


HOSTILE_FRAMES = [
    # (expert ids, layer, number of tokens, bytes of the payload; None for all)
    ([9, -1, 8], 1, 1, None),
    ([-2, -1, 8], 1, 1, None),
    ([8, -1, 8], 1, 1, None),
    ([1, -1, 3], 1, 1, None),
    ([2**31 - 1, -(2**31), 8], 1, 1, None),
    ([1, -1, 8], 4, 1, None),
    ([1, -1, 8], 1, 65, None),
    ([1, -1, 8], 1, 1, -4),
    ([1, -1, 8], 1, 0, 0),
]


def frame(expert_ids: list[int]) -> torch.Tensor:
    """One row for an FFN instance, as bytes."""
    slot = torch.zeros(A2F.payload_bytes(1), dtype=torch.uint8)
    placement = Placement(torch.tensor([0]), torch.tensor([expert_ids]), torch.ones(1, 3))
    A2F.write(slot, torch.ones(1, 128), placement)
    return slot


def test_hostile_frames_are_refused_and_the_ffn_goes_on(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1)
    rogue = Puppet(cluster, "attention", A2F.slot_bytes, F2A.slot_bytes)
    cluster.server.wait_for(lambda: len(cluster.server.live(ATTENTION, True)) == 2)
    cluster.server.publish_topology()
    ffn = rogue.wait("link_up").peer

    def answer(expert_ids: list[int], layer: int, num_tokens: int, end: int | None) -> Any:
        rogue.push(ffn, 0, 1, layer, frame(expert_ids)[:end], num_tokens)
        return rogue.wait("arrival")

    for hostile in HOSTILE_FRAMES:
        refusal = answer(*hostile)
        assert (refusal.num_tokens, refusal.payload_bytes) == (0, 0), hostile
    served = answer([1, -1, 8], 1, 1, None)
    assert (served.num_tokens, served.payload_bytes) == (1, F2A.payload_bytes(1))
    rogue.close()

    driver = Driver(cluster, 1, {1: prompt_of(10, 1)}, 0)
    while not driver.is_done(3):
        driver.send()
        driver.accept(cluster.attention.next_event())
    check([driver], cluster.model, 3)


def test_slot_of_a_failed_step_is_written_again_only_after_its_answer(
    make_cluster: ClusterMaker,
) -> None:
    """FFN rank 0 is slow, rank 1 dies: the next step must not touch rank 0's slot too early."""
    cluster = make_cluster(2, starts_ffn=False)
    slow, dying = (Puppet(cluster, "ffn", A2F.slot_bytes, F2A.slot_bytes) for _ in range(2))
    cluster.server.wait_ready(1, 2)
    attention = slow.wait("link_up").peer
    driver = Driver(cluster, 0, {1: [5, 6, 7, 8]}, 0)
    driver.send()
    stale = slow.wait("arrival")
    assert (stale.step, stale.layer, stale.num_tokens) == (1, 0, 2)
    dying.wait("arrival")
    lost = cluster.server.live(FFN)[1]
    dying.close()
    events = {cluster.attention.next_event().DESCRIPTOR.name for _ in range(2)}
    assert events == {"StepFailed", "PeerLost"}

    cluster.server.wait_for(lambda: lost.is_over)
    replacement = Puppet(cluster, "ffn", A2F.slot_bytes, F2A.slot_bytes)
    cluster.server.wait_ready(1, 2)
    cluster.server.plan(cluster.attention, 0, 2, chunks=driver.sent)
    assert replacement.wait("arrival").step == 2
    assert slow.poll("arrival", timeout_s=0.5) is None

    rows = torch.zeros(F2A.payload_bytes(2), dtype=torch.uint8)
    slow.push(attention, 0, 1, 0, rows, 2)  # the answer to the step that failed
    fresh = slow.wait("arrival")
    assert (fresh.step, fresh.layer) == (2, 0)
    for puppet in (slow, replacement):
        puppet.close()


def test_bad_answers_fail_their_step_and_nothing_else(make_cluster: ClusterMaker) -> None:
    cluster = make_cluster(1, starts_ffn=False)
    liar = Puppet(cluster, "ffn", A2F.slot_bytes, F2A.slot_bytes)
    cluster.server.wait_ready(1, 1)
    attention = liar.wait("link_up").peer
    driver = Driver(cluster, 0, {1: [5, 6, 7, 8]}, 0)
    driver.send()
    step = 1
    for num_tokens, num_rows in [(0, 0), (3, 3), (4, 3)]:
        arrival = liar.wait("arrival")
        assert (arrival.step, arrival.num_tokens) == (step, 4)
        payload = torch.zeros(F2A.payload_bytes(num_rows), dtype=torch.uint8)
        liar.push(attention, 0, step, 0, payload, num_tokens)
        failed = cluster.attention.next_event()
        assert failed.DESCRIPTOR.name == "StepFailed"
        assert failed.reason.startswith("FFN rank 0 sent a bad reply")
        step += 1
        cluster.server.plan(cluster.attention, 0, step, chunks=driver.sent)
    liar.close()
