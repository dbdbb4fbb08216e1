"""Plans that reach an instance before it has answered the last one, over the real fabric."""

from collections import deque
from typing import Any

import torch

from step3rt.instance.wire import A2fLayout, F2aLayout
from step3rt.model.monolithic import MonolithicModel
from tests.fixtures.planned_cluster import Cluster, ClusterMaker, Puppet, prompt_of

NUM_LAYERS, HIDDEN_SIZE = 4, 128
A2F = A2fLayout(max_tokens=64, hidden_size=HIDDEN_SIZE, num_columns=3, dtype=torch.float32)
F2A = F2aLayout(max_tokens=64, hidden_size=HIDDEN_SIZE, dtype=torch.float32)


def join(sequence_id: int, prompt: list[int]) -> dict[str, Any]:
    return {
        "sequence_id": sequence_id,
        "token_ids": prompt,
        "num_prompt_tokens": len(prompt),
        "sampling": {"top_p": 1.0},
    }


def chunk(
    sequence_id: int, first: int, num_new: int, *new_block_ids: int, samples: bool = True
) -> dict[str, Any]:
    return {
        "sequence_id": sequence_id,
        "num_computed_tokens": first,
        "num_new_tokens": num_new,
        "new_block_ids": new_block_ids,
        "samples": samples,
    }


def plan(cluster: Cluster, step: int, lane: int = 0, **fields: Any) -> None:
    cluster.server.plan(cluster.attention, lane, step, **fields)


def puppet_cluster(make_cluster: ClusterMaker, **settings: Any) -> tuple[Cluster, Puppet]:
    """An attention instance whose FFN instance is played by the test."""
    cluster = make_cluster(1, starts_ffn=False, **settings)
    puppet = Puppet(cluster, "ffn", A2F.slot_bytes, F2A.slot_bytes)
    cluster.server.wait_ready(1, 1)
    return cluster, puppet


def answer(cluster: Cluster, puppet: Puppet, step: int, rows: torch.Tensor) -> None:
    """Answers every layer of a step with the same rows."""
    for layer in range(NUM_LAYERS):
        arrival = puppet.wait("arrival")
        assert (arrival.step, arrival.layer) == (step, layer)
        payload = rows.contiguous().view(torch.uint8).flatten()
        puppet.push(cluster.attention.instance_id, 0, step, layer, payload, rows.shape[0])


def test_steps_planned_ahead_decode_as_one_process_does(make_cluster: ClusterMaker) -> None:
    """Two lanes, three steps of each planned ahead of their answers; nobody says a token."""
    cluster = make_cluster(2, num_lanes=2, max_steps_in_flight=3)
    prompts = {0: prompt_of(30, 1), 1: prompt_of(1, 2)}
    tokens: dict[int, list[int]] = {0: [], 1: []}
    planned = {lane: deque([20, 10] if lane == 0 else [1]) for lane in prompts}
    computed, steps = {0: 0, 1: 0}, {0: 0, 1: 0}

    def send(lane: int) -> None:
        num_new = planned[lane].popleft() if planned[lane] else 1
        first = computed[lane]
        computed[lane] += num_new
        blocks = range(-(-first // 64), -(-computed[lane] // 64))
        plan(
            cluster,
            steps[lane],
            lane,
            joined=[join(lane, prompts[lane])] if first == 0 else [],
            chunks=[
                chunk(
                    lane,
                    first,
                    num_new,
                    *(5 * lane + block for block in blocks),
                    samples=computed[lane] >= len(prompts[lane]),
                )
            ],
        )
        steps[lane] += 1

    for lane in prompts:
        for _ in range(3):
            send(lane)
    answered = {0: 0, 1: 0}
    while min(map(len, tokens.values())) < 8:
        output = cluster.attention.next_event()
        lane = output.lane
        assert (output.DESCRIPTOR.name, output.step) == ("StepOutput", answered[lane])
        answered[lane] += 1
        [one] = output.outputs
        if one.HasField("token_id"):
            tokens[lane].append(one.token_id)
        send(lane)
    monolithic = MonolithicModel.load(cluster.model)
    for lane, prompt in prompts.items():
        num_tokens = len(tokens[lane])
        assert tokens[lane] == monolithic.generate_greedy(prompt, num_tokens)[0]


def test_more_plans_than_agreed_are_an_internal_error(make_cluster: ClusterMaker) -> None:
    cluster, puppet = puppet_cluster(make_cluster)
    [attention] = cluster.processes
    for step in range(3):
        joined = [join(1, [5])] if step == 0 else []
        plan(cluster, step, joined=joined, chunks=[chunk(1, step, 1, *([0] * (step == 0)))])
    assert attention.wait(20) != 0
    puppet.close()


def test_a_failed_step_fails_what_was_planned_on_it_and_nothing_else(
    make_cluster: ClusterMaker,
) -> None:
    cluster, puppet = puppet_cluster(make_cluster, max_steps_in_flight=3)
    plan(cluster, 0, joined=[join(1, [5, 6, 7])], chunks=[chunk(1, 0, 2, 0, samples=False)])
    plan(cluster, 1, joined=[join(2, [8])], chunks=[chunk(1, 2, 1), chunk(2, 0, 1, 1)])
    plan(cluster, 2, joined=[join(3, [9, 4])], chunks=[chunk(3, 0, 2, 2)])
    arrival = puppet.wait("arrival")
    assert (arrival.step, arrival.num_tokens) == (0, 2)
    puppet.push(cluster.attention.instance_id, 0, 0, 0, torch.zeros(0, dtype=torch.uint8), 0)

    failed = [cluster.attention.next_event() for _ in range(2)]
    assert [(one.DESCRIPTOR.name, one.step) for one in failed] == [
        ("StepFailed", 0),
        ("StepFailed", 1),
    ]
    assert failed[0].reason.startswith("FFN rank 0 sent a bad reply")
    assert "sequence 1 starts at token 2, and 0 are computed" in failed[1].reason
    answer(cluster, puppet, 2, torch.zeros(2, HIDDEN_SIZE))
    done = cluster.attention.next_event()
    assert (done.DESCRIPTOR.name, done.step) == ("StepOutput", 2)

    # The chunks are planned again without their deltas, which have taken effect.
    plan(cluster, 3, chunks=[chunk(1, 0, 3), chunk(2, 0, 1)])
    plan(cluster, 4, left=[3], chunks=[chunk(1, 3, 1), chunk(2, 1, 1)])
    answer(cluster, puppet, 3, torch.zeros(4, HIDDEN_SIZE))
    answer(cluster, puppet, 4, torch.zeros(2, HIDDEN_SIZE))
    for step in (3, 4):
        done = cluster.attention.next_event()
        assert (done.DESCRIPTOR.name, done.step) == ("StepOutput", step)
        assert [one.sequence_id for one in done.outputs] == [1, 2]
    puppet.close()


def test_a_plan_that_does_not_follow_without_a_failure_is_an_internal_error(
    make_cluster: ClusterMaker,
) -> None:
    cluster, puppet = puppet_cluster(make_cluster)
    [attention] = cluster.processes
    plan(cluster, 0, joined=[join(1, [5, 6])], chunks=[chunk(1, 0, 1, 0, samples=False)])
    plan(cluster, 1, chunks=[chunk(1, 0, 2)])
    answer(cluster, puppet, 0, torch.zeros(1, HIDDEN_SIZE))
    assert attention.wait(20) != 0
    puppet.close()


def test_a_sequence_that_turns_corrupt_leaves_the_steps_planned_ahead_whole(
    make_cluster: ClusterMaker,
) -> None:
    cluster, puppet = puppet_cluster(make_cluster)
    joined = [join(1, [5]), join(2, [6])]
    plan(cluster, 0, joined=joined, chunks=[chunk(1, 0, 1, 0), chunk(2, 0, 1, 1)])
    plan(cluster, 1, chunks=[chunk(1, 1, 1), chunk(2, 1, 1)])
    rows = torch.zeros(2, HIDDEN_SIZE)
    rows[0, 3] = float("nan")
    answer(cluster, puppet, 0, rows)
    answer(cluster, puppet, 1, torch.zeros(2, HIDDEN_SIZE))
    for step in (0, 1):
        done = cluster.attention.next_event()
        assert (done.DESCRIPTOR.name, done.step) == ("StepOutput", step)
        corrupt, sound = done.outputs
        assert corrupt.is_corrupt
        assert not sound.is_corrupt
        assert sound.HasField("token_id")
    plan(cluster, 2, left=[1], chunks=[chunk(2, 2, 1)])
    answer(cluster, puppet, 2, torch.zeros(1, HIDDEN_SIZE))
    assert len(cluster.attention.next_event().outputs) == 1
    puppet.close()
