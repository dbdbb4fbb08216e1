"""Links and steps as an instance's loop sees them: slots, arrivals, deaths, plans and outputs."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from step3rt import _core
from step3rt.client import Client
from step3rt.errors import InvalidArgument, Unavailable
from tests.fixtures.core_processes import (
    PATIENCE_S,
    SLOT_BYTES,
    Coordinator,
    Processes,
    echo,
    linked_session,
    next_events,
    receive,
    start_coordinator,
)

_FABRICS = pytest.mark.parametrize("fabric", ["shm", "tcp"])


@_FABRICS
def test_a_pushed_payload_arrives_bit_exact_and_so_does_the_answer(
    fabric: str,
    processes: Processes,
    tmp_path: Path,
    loop: Callable[..., Any],
) -> None:
    coordinator = start_coordinator(processes, tmp_path, fabric)
    _process, pipe = processes.start(echo, coordinator.options("ffn"))

    def attention() -> None:
        session, link = linked_session(coordinator, pipe)
        assert link.fabric == fabric
        assert link.reason
        payloads = [os.urandom(size) for size in (0, 1, 4096, SLOT_BYTES)]
        for sequence, payload in enumerate(payloads, start=1):
            for lane in (0, 1):
                session.send_slot(link.peer, lane)[: len(payload)] = payload
                session.push(link.peer, lane, 40, 3, 7, len(payload))
            for arrival in sorted(next_events(session, 2), key=lambda event: event.lane):
                assert arrival.kind == "arrival"
                assert (arrival.peer, arrival.sequence) == (link.peer, sequence)
                assert (arrival.step, arrival.layer, arrival.num_tokens) == (40, 3, 7)
                assert arrival.payload_bytes == len(payload)
                answer = session.receive_slot(link.peer, arrival.lane)
                assert bytes(answer[: len(payload)]) == payload[::-1]
        session.close()

    loop(attention)


def test_slots_are_the_same_memory_every_time_and_outlive_their_session(
    coordinator: Coordinator,
    processes: Processes,
    loop: Callable[..., Any],
) -> None:
    _process, pipe = processes.start(echo, coordinator.options("ffn"))

    def attention() -> tuple[memoryview, memoryview]:
        session, link = linked_session(coordinator, pipe)
        send, receive = session.send_slot(link.peer, 0), session.receive_slot(link.peer, 0)
        assert (send.nbytes, send.format, send.ndim, send.readonly) == (SLOT_BYTES, "B", 1, False)
        assert (receive.nbytes, receive.readonly) == (SLOT_BYTES, True)
        send[5] = 77
        assert session.send_slot(link.peer, 0)[5] == 77
        assert session.send_slot(link.peer, 1)[5] == 0
        with pytest.raises(TypeError, match="read-only"):
            receive[0] = 1
        with pytest.raises(InvalidArgument, match="lane 2 does not exist"):
            session.send_slot(link.peer, 2)
        session.push(link.peer, 0, 1, 0, 1, 6)
        next_events(session)
        session.close()
        with pytest.raises(Unavailable, match="not linked"):
            session.send_slot(link.peer, 0)
        return send, receive

    send, receive = loop(attention)
    assert send[5] == 77
    assert bytes(receive[:6]) == bytes([77, 0, 0, 0, 0, 0])


@_FABRICS
def test_a_killed_peer_is_seen_within_a_second(
    fabric: str,
    processes: Processes,
    tmp_path: Path,
    loop: Callable[..., Any],
) -> None:
    coordinator = start_coordinator(processes, tmp_path, fabric)
    process, pipe = processes.start(echo, coordinator.options("ffn"))

    def attention() -> None:
        session, link = linked_session(coordinator, pipe)
        process.kill()
        killed = time.monotonic()
        [down] = next_events(session)
        assert time.monotonic() - killed < 1.0
        assert (down.kind, down.peer) == ("link_down", link.peer)
        with pytest.raises(Unavailable, match="not linked"):
            session.push(link.peer, 0, 1, 0, 1, 1)
        session.close()

    loop(attention)


def test_a_peer_that_comes_back_is_linked_again(
    coordinator: Coordinator, processes: Processes, loop: Callable[..., Any]
) -> None:
    process, pipe = processes.start(echo, coordinator.options("ffn"))

    def attention() -> None:
        session, link = linked_session(coordinator, pipe)
        process.kill()
        [down] = next_events(session)
        assert down.peer == link.peer
        _returned, new_pipe = processes.start(echo, coordinator.options("ffn"))
        [up] = next_events(session)
        assert (up.kind, up.peer, up.role_rank) == ("link_up", receive(new_pipe), 0)
        assert up.peer != link.peer
        session.push(up.peer, 0, 1, 0, 1, 1)
        [answer] = next_events(session)
        assert (answer.kind, answer.peer, answer.sequence) == ("arrival", up.peer, 1)
        session.close()

    loop(attention)


def test_a_coordinator_that_drains_asks_its_instances_to_end(
    coordinator: Coordinator, processes: Processes, loop: Callable[..., Any]
) -> None:
    process, pipe = processes.start(echo, coordinator.options("ffn"))

    def attention() -> None:
        session, _link = linked_session(coordinator, pipe)
        coordinator.process.terminate()
        while not any(event.kind == "drain" for event in session.poll(1.0)):
            pass
        session.close()

    loop(attention)
    for ending in (process, coordinator.process):
        ending.join(PATIENCE_S)
        assert ending.exitcode == 0


def test_a_request_becomes_plans_and_outputs_become_its_tokens(
    coordinator: Coordinator,
    processes: Processes,
    loop: Callable[..., Any],
) -> None:
    _process, pipe = processes.start(echo, coordinator.options("ffn"))
    plans: list[_core.StepPlan] = []
    is_done = threading.Event()

    def attention() -> None:
        session, _link = linked_session(coordinator, pipe)
        while not is_done.is_set():
            for plan in session.poll(0.05):
                assert isinstance(plan, _core.StepPlan)
                plans.append(plan)
                outputs = []
                for chunk in plan.chunks:
                    end = chunk.num_computed_tokens + chunk.num_new_tokens
                    token = 10 + end if chunk.samples else None
                    logprob = -0.5 if chunk.samples else None
                    top = [(10 + end, -0.5), (3, -1.5)] if chunk.samples else None
                    outputs.append(_core.SequenceOutput(chunk.sequence_id, token, logprob, top=top))
                session.complete_step(plan.lane, plan.step, outputs, 1, 2, 3)
        session.close()

    def request() -> list[int]:
        try:
            with Client(coordinator.address) as client:
                stream = client.generate(
                    [5, 6, 7], max_tokens=4, temperature=0.25, seed=9, logprobs=2, timeout_s=20.0
                )
                return [token for event in stream for token in event.token_ids]
        finally:
            is_done.set()

    with ThreadPoolExecutor(1) as requests:
        tokens = requests.submit(request)
        loop(attention)
        assert tokens.result(PATIENCE_S) == [13, 14, 15, 16]
    [join] = [join for plan in plans for join in plan.joined]
    assert (join.token_ids, join.num_prompt_tokens) == ([5, 6, 7], 3)
    sampling = join.sampling
    assert (sampling.temperature, sampling.seed, sampling.top_logprobs) == (0.25, 9, 2)
    assert sampling.stop_token_ids == [1]
    first = plans[0].chunks[0]
    assert first.sequence_id == join.sequence_id
    assert (first.num_computed_tokens, first.num_new_tokens, first.samples) == (0, 3, True)
    assert len(first.new_block_ids) == 1
    assert plans[0].kind == "step_plan"
