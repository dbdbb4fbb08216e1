"""Streams and graphs on the CPU keep the promises of those on a GPU."""

import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from step3rt.ops.graph import StepGraph
from step3rt.ops.stream import MAX_QUEUED, Stream

CPU = torch.device("cpu")
PATIENCE_S = 30.0


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = Stream(CPU)
    yield made
    made.close()


def wait_for(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE_S)


def fill(values: torch.Tensor, value: float) -> None:
    values.fill_(value)


def adds_one(values: torch.Tensor) -> Callable[[], None]:
    def launch() -> None:
        values.add_(1)

    return launch


def test_work_runs_in_order_and_an_event_is_done_with_what_was_given_before(
    stream: Stream,
) -> None:
    gate, seen = threading.Event(), list[int]()
    stream.run(lambda: wait_for(gate))
    for index in range(5):
        stream.run(functools.partial(seen.append, index))
    event = stream.record()
    assert not event.is_done()
    assert seen == []
    gate.set()
    event.wait()
    assert event.is_done()
    assert seen == [0, 1, 2, 3, 4]


def test_timed_events_say_how_long_the_work_between_them_took(stream: Stream) -> None:
    before = stream.record(is_timed=True)
    stream.run(lambda: time.sleep(0.02))
    after = stream.record(is_timed=True)
    after.wait()
    assert 0.02e9 <= after.elapsed_ns(before) < 20e9
    assert before.elapsed_ns(after) == -after.elapsed_ns(before)


def test_a_stream_that_is_parked_holds_up_neither_the_caller_nor_the_others() -> None:
    gate = threading.Event()
    parked, free = Stream(CPU), Stream(CPU)
    values = torch.zeros(3)
    parked.run(lambda: wait_for(gate))
    last = parked.record()
    graph = StepGraph.capture(CPU, adds_one(values), free)
    for _ in range(4):
        graph.replay()
    free.synchronize()
    assert values.tolist() == [4.0, 4.0, 4.0]
    assert not last.is_done()
    gate.set()
    last.wait()
    for one in (parked, free):
        one.close()


def test_two_streams_that_wait_for_each_other_meet() -> None:
    first, second = Stream(CPU), Stream(CPU)
    barrier = threading.Barrier(2)

    def meet() -> None:
        barrier.wait(PATIENCE_S)

    for one in (first, second):
        one.run(meet)
    for one in (first, second):
        one.synchronize()
        one.close()


def test_an_error_stops_the_stream_and_reaches_whoever_asks_next(stream: Stream) -> None:
    seen = list[str]()

    def fail() -> None:
        raise ValueError("a peer is gone")

    gate = threading.Event()
    stream.run(lambda: wait_for(gate))
    stream.run(fail)
    stream.run(lambda: seen.append("after"))
    event = stream.record()
    gate.set()
    for ask in (event.wait, event.is_done, stream.record, lambda: stream.run(fail)):
        with pytest.raises(ValueError, match="a peer is gone"):
            ask()
    assert seen == []


def test_a_block_of_a_stream_follows_what_it_was_given(stream: Stream) -> None:
    gate, seen = threading.Event(), list[str]()
    stream.run(lambda: wait_for(gate))
    stream.run(lambda: seen.append("given"))
    threading.Timer(0.01, gate.set).start()
    with stream:
        seen.append("block")
    assert seen == ["given", "block"]


def test_a_closed_stream_finishes_its_work_and_takes_no_more() -> None:
    stream, seen = Stream(CPU), list[int]()
    stream.run(lambda: seen.append(1))
    event = stream.record()
    stream.close()
    stream.close()
    event.wait()
    assert seen == [1]
    with pytest.raises(RuntimeError, match="is closed"):
        stream.run(lambda: None)


def test_the_thread_of_a_stream_that_nobody_closed_ends_with_it() -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "step3rt-stream"}

    before = threads()
    stream = Stream(CPU)
    stream.synchronize()
    (made,) = threads() - before
    del stream
    gc.collect()
    made.join(PATIENCE_S)
    assert not made.is_alive()


def test_whoever_fills_a_stream_waits_for_room(stream: Stream) -> None:
    gate, has_given_all = threading.Event(), threading.Event()
    stream.run(lambda: wait_for(gate))
    total = MAX_QUEUED + 8

    def give() -> None:
        for _ in range(total):
            stream.run(lambda: None)
        has_given_all.set()

    giver = threading.Thread(target=give)
    giver.start()
    assert not has_given_all.wait(0.2)
    gate.set()
    giver.join(PATIENCE_S)
    assert has_given_all.is_set()


def test_a_graph_without_a_stream_replays_in_the_callers_thread() -> None:
    threads = list[threading.Thread]()
    graph = StepGraph.capture(CPU, lambda: threads.append(threading.current_thread()))
    assert threads == []  # capturing computes nothing
    graph.replay()
    graph.replay()
    assert threads == [threading.current_thread()] * 2


@pytest.mark.gpu
def test_a_graph_of_a_gpu_replays_on_its_stream_while_another_is_parked() -> None:
    device = torch.device("cuda", 0)
    parked, free = Stream(device), Stream(device)
    values = torch.zeros(3, device=device)
    parked.run(lambda: torch.cuda._sleep(10_000_000_000))  # type: ignore[no-untyped-call]
    last = parked.record()
    graph = StepGraph.capture(device, adds_one(values), free)
    free.run(lambda: fill(values, 0.0))
    for _ in range(4):
        graph.replay()
    free.synchronize()
    assert not last.is_done()
    assert values.tolist() == [4.0, 4.0, 4.0]
    last.wait()
