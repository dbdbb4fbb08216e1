"""The extension module as Python sees it: real processes, a real coordinator, real links.

Sessions of the test process run on another thread than the main one: there they leave SIGINT to
pytest. Whatever must die is a process of its own.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from step3rt import _core
from step3rt.client import Client
from step3rt.errors import ConfigError, InvalidArgument, Unavailable

from tests.fixtures.core_processes import (
    MODEL,
    PATIENCE_S,
    SLOT_BYTES,
    Coordinator,
    Processes,
    join_cluster,
    next_events,
    node_options,
    receive,
    start_coordinator,
    wait_until,
)

_FABRICS = pytest.mark.parametrize("fabric", ["shm", "tcp"])


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as running:
        yield running


@pytest.fixture
def coordinator(processes: Processes, tmp_path: Path) -> Coordinator:
    return start_coordinator(processes, tmp_path)


@pytest.fixture
def loop() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls a function on a thread that plays the instance's loop."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda work: executor.submit(work).result(PATIENCE_S)


def _echo(pipe: Connection, options: str) -> None:
    """An FFN instance that answers every payload with its bytes reversed."""
    session = join_cluster(options)
    pipe.send(session.instance_id)
    while True:
        for event in session.poll(1.0):
            if event.kind == "arrival":
                arrived = session.receive_slot(event.peer, event.lane)[: event.payload_bytes]
                answer = session.send_slot(event.peer, event.lane)
                answer[: event.payload_bytes] = bytes(arrived)[::-1]
                session.push(
                    event.peer,
                    event.lane,
                    event.step,
                    event.layer,
                    event.num_tokens,
                    event.payload_bytes,
                )
            elif event.kind in ("drain", "session_lost"):
                session.close()
                return


def _linked_session(
    coordinator: Coordinator, pipe: Connection
) -> tuple[_core.NodeSession, _core.LinkUp]:
    """An attention instance and its link to the instance at the pipe's other end."""
    ffn = receive(pipe)
    session = join_cluster(coordinator.options("attention"), num_kv_blocks=16)
    [link] = next_events(session)
    assert isinstance(link, _core.LinkUp)
    assert (link.peer, link.role_rank) == (ffn, 0)
    return session, link


def test_the_stub_is_true() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "step3rt._core"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_importing_loads_no_library_beyond_the_c_runtime() -> None:
    script = (
        "import re\n"
        "def mapped():\n"
        "    with open('/proc/self/maps') as maps:\n"
        "        return set(re.findall(r'(/\\S+\\.so\\S*)', maps.read()))\n"
        "before = mapped()\n"
        "import step3rt._core\n"
        "print('\\n'.join(mapped() - before))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    libraries = {Path(line).name for line in output.splitlines() if "cpython" not in line}
    c_runtime = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt"}
    names = {name.split(".so")[0] for name in libraries}
    assert names - c_runtime == {"_core.abi3"}


def test_this_host_can_do_shared_memory_and_tcp() -> None:
    found = _core.host_capabilities()
    assert [(name, is_usable) for name, (is_usable, _why) in found.items()] == [
        ("shm", True),
        ("tcp", True),
        ("limits", True),
    ]


def test_a_session_knows_who_it_is_and_what_the_cluster_runs_with(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    first, second = (
        loop(lambda role=role: _core.NodeSession(coordinator.options(role)))
        for role in ("ffn", "attention")
    )
    assert first.instance_id != second.instance_id
    assert first.role_rank == 0
    assert second.epoch > first.epoch > 0
    settings = second.settings
    assert (settings.num_lanes, settings.max_tokens_per_micro_batch) == (2, 8)
    assert (settings.max_model_len, settings.ep_size, settings.fabric) == (256, 1, "auto")
    assert settings.compute_dtype == "float32"
    assert {item["state"] for item in coordinator.instances()} == {"loading"}
    loop(first.close)
    loop(second.close)


@_FABRICS
def test_a_pushed_payload_arrives_bit_exact_and_so_does_the_answer(
    fabric: str,
    processes: Processes,
    tmp_path: Path,
    loop: Callable[..., Any],
) -> None:
    coordinator = start_coordinator(processes, tmp_path, fabric)
    _process, pipe = processes.start(_echo, coordinator.options("ffn"))

    def attention() -> None:
        session, link = _linked_session(coordinator, pipe)
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
    _process, pipe = processes.start(_echo, coordinator.options("ffn"))

    def attention() -> tuple[memoryview, memoryview]:
        session, link = _linked_session(coordinator, pipe)
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
    process, pipe = processes.start(_echo, coordinator.options("ffn"))

    def attention() -> None:
        session, link = _linked_session(coordinator, pipe)
        process.kill()
        killed = time.monotonic()
        [down] = next_events(session)
        assert time.monotonic() - killed < 1.0
        assert (down.kind, down.peer) == ("link_down", link.peer)
        with pytest.raises(Unavailable, match="not linked"):
            session.push(link.peer, 0, 1, 0, 1, 1)
        session.close()

    loop(attention)


def test_a_killed_coordinator_ends_the_session_within_a_second(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    def instance() -> None:
        session = join_cluster(coordinator.options("ffn"))
        coordinator.process.kill()
        killed = time.monotonic()
        [lost] = next_events(session)
        assert time.monotonic() - killed < 1.0
        assert lost.kind == "session_lost"
        assert lost.reason
        with pytest.raises(Unavailable, match="session with the coordinator is over"):
            session.fail_step(0, 0, "the coordinator is gone")
        session.close()

    loop(instance)


def test_a_request_becomes_plans_and_outputs_become_its_tokens(
    coordinator: Coordinator,
    processes: Processes,
    loop: Callable[..., Any],
) -> None:
    _process, pipe = processes.start(_echo, coordinator.options("ffn"))
    plans: list[_core.StepPlan] = []
    is_done = threading.Event()

    def attention() -> None:
        session, _link = _linked_session(coordinator, pipe)
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


def test_waiting_releases_the_gil(coordinator: Coordinator, loop: Callable[..., Any]) -> None:
    session = loop(lambda: join_cluster(coordinator.options("ffn")))
    ticks = 0
    polling = threading.Thread(target=session.poll, args=(1.0,))
    polling.start()
    while polling.is_alive():
        ticks += 1
        time.sleep(0.01)
    assert ticks > 20
    loop(session.close)


def test_a_second_thread_is_refused_while_the_first_waits(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    session = loop(lambda: join_cluster(coordinator.options("ffn")))
    polling = threading.Thread(target=session.poll, args=(2.0,))
    polling.start()

    def is_refused() -> bool:
        try:
            session.set_status("from another thread")
        except RuntimeError as error:
            return "belongs to one thread" in str(error)
        return False

    wait_until(is_refused)
    polling.join()
    loop(session.close)


def test_without_a_coordinator_an_instance_gives_up_in_time() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"coordinator at {address}.*refused") as caught:
            _core.NodeSession(node_options(address, "ffn", connect_timeout_s=0.2))
        assert caught.value.is_retryable
        with pytest.raises(Unavailable, match=address):
            _core.list_instances(address, 0.2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"role": "expert"}, "unknown variant `expert`"),
        ({"coordinator": "nowhere"}, "coordinator address is not usable: `nowhere`"),
        ({"data_host": "localhost"}, "data_host is not usable: `localhost`"),
        ({"connect_timeout_s": -1.0}, "connect_timeout_s is not usable: -1 s"),
        ({"colour": "red"}, "unknown field `colour`"),
    ],
)
def test_options_that_are_not_usable_are_named(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        _core.NodeSession(node_options("127.0.0.1:1", "ffn", **changes))


def test_an_instance_of_another_model_is_refused(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    other = MODEL | {"vocab_size": 65}
    with pytest.raises(ConfigError, match=r"refused this instance.*vocab_size = 65"):
        loop(lambda: _core.NodeSession(coordinator.options("ffn", model=other)))


def test_serving_what_cannot_be_served_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        _core.serve(json.dumps({"model_path": str(tmp_path)}))
    with pytest.raises(ConfigError, match="unknown field `model`"):
        _core.serve(json.dumps({"model": str(tmp_path)}))


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused(
    timeout_s: float, coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    session = loop(lambda: join_cluster(coordinator.options("ffn")))
    with pytest.raises(ValueError, match="timeout_s"):
        loop(lambda: session.poll(timeout_s))
    loop(session.close)


@pytest.mark.parametrize(
    "arguments", [{"logprob": -1.0}, {"token_id": 3, "top": [(3, -1.0)]}, {"top": []}]
)
def test_an_output_that_contradicts_itself_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="output of sequence 7 is not consistent"):
        _core.SequenceOutput(7, **arguments)
