"""When the lanes of a device FFN instance wait for rows, and when they rest for a new link."""

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from step3rt.instance.device_ffn import DeviceFfnLoop
from step3rt.instance.device_links import DEVICE_FABRIC
from step3rt.instance.device_share import DeviceShare
from step3rt.instance.node import Outcome
from step3rt.model.device_ffn import FfnLane
from step3rt.ops.afd_host_lane import Pause
from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, StopWord
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from step3rt.ops.stream import Event, Stream

CPU = torch.device("cpu")
SHAPE = AfdShape(
    num_lanes=1, num_sources=1, num_ranks=1, max_tokens=2, hidden_size=128, top_k=1
)  # fmt: skip
PEER = 10
"""The instance of source 0; source a is instance a above it."""

SECOND_NS = 1_000_000_000


def link_up(source: AttentionSlots) -> Any:
    return SimpleNamespace(
        kind="link_up",
        peer=PEER + source.index,
        role_rank=source.index,
        fabric=DEVICE_FABRIC,
        reason="a test",
        epoch=1,
        device_offer=source.handle,
    )


def arrival(source: AttentionSlots) -> Any:
    return SimpleNamespace(kind="arrival", peer=PEER + source.index, lane=0, step=0, layer=0)


class Session:
    """Brings events, one list for each time that the loop comes round, and notes answers."""

    def __init__(self, rounds: list[Callable[[], list[Any]]]) -> None:
        self._rounds = itertools.chain(rounds, itertools.repeat(list))
        self.answers: list[int] = []

    def poll(self, _timeout_s: float) -> list[Any]:
        return next(self._rounds)()

    def push(self, peer: int, *_frame: int) -> None:
        self.answers.append(peer)

    def set_status(self, _text: str) -> None:
        pass


class Lane:
    """A lane whose steps are over at once."""

    def __init__(self) -> None:
        self.num_replays = 0
        self._stream = Stream(CPU)

    def replay(self) -> Event:
        self.num_replays += 1
        return self._stream.record()


def test_a_lane_begins_and_greetings_are_answered_once_the_other_role_has_loaded() -> None:
    stop, share, lane = StopWord(CPU), DeviceShare(is_colocated=True), Lane()
    source, rank = AttentionSlots(SHAPE, 0, CPU, stop), FfnSlots(SHAPE, 0, CPU, stop)
    link, greeting = link_up(source), arrival(source)

    def while_loading() -> list[Any]:
        assert (session.answers, lane.num_replays) == ([], 0)
        turn.__exit__(None, None, None)
        return []

    def afterwards() -> list[Any]:
        assert session.answers == [PEER]
        assert lane.num_replays > 0
        return [SimpleNamespace(kind="drain")]

    session = Session([lambda: [link], lambda: [greeting], while_loading, afterwards])
    with share.turn(session, "ffn"):
        pass
    turn = share.turn(session, "attention")
    turn.__enter__()
    loop = DeviceFfnLoop(cast("Any", session), rank, stop, [cast("FfnLane", lane)], share)
    assert loop.run() is Outcome.DRAINED
    for slots in (source, rank):
        slots.close()


class OpenSession:
    """Brings events as they are told, and notes answers and resets."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: list[int] = []
        self.resets: list[int] = []

    def tell(self, *events: Any) -> None:
        for event in events:
            self._events.put(event)

    def poll(self, timeout_s: float) -> list[Any]:
        try:
            return [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []

    def push(self, peer: int, *_frame: int) -> None:
        self.answers.append(peer)

    def reset_link(self, peer: int, _reason: str) -> None:
        self.resets.append(peer)


class StepLane:
    """A lane whose steps have two layers, and experts that answer with zeros."""

    def __init__(self, slots: FfnSlots, lane: int) -> None:
        shape = slots.shape
        self._slots, self._lane, self._stream = slots, lane, Stream(CPU)
        self._sums = torch.zeros(shape.num_rows, shape.hidden_size, dtype=torch.bfloat16)
        slots.run_on(self._stream)

    def replay(self) -> Event:
        self._stream.run(self._step)
        return self._stream.record()

    def _step(self) -> None:
        for layer in (0, 1):
            self._slots.wait(self._lane, layer == 0)
            self._slots.push(self._lane, self._sums)


class Rank:
    """An FFN rank whose loop runs in a thread."""

    def __init__(self, shape: AfdShape, index: int) -> None:
        stop, self.session = StopWord(CPU), OpenSession()
        self.slots = FfnSlots(shape, index, CPU, stop, wait_limit_ns=5 * SECOND_NS)
        lanes = [cast("FfnLane", StepLane(self.slots, lane)) for lane in range(shape.num_lanes)]
        self._loop = DeviceFfnLoop(
            cast("Any", self.session), self.slots, stop, lanes, DeviceShare()
        )
        self._thread = threading.Thread(target=self._loop.run, daemon=True)
        self._thread.start()

    def is_in_step(self, lane: int) -> bool:
        return self.slots.state(lane).participants != 0

    def is_held(self, lane: int) -> bool:
        return bool(self.slots._paused[lane])

    def end(self) -> None:
        self.session.tell(SimpleNamespace(kind="session_lost", reason="the test is over"))
        self._thread.join()
        self._loop.stop()
        self.slots.close()


class Source:
    """An attention instance, whose lanes the test walks by hand."""

    def __init__(self, shape: AfdShape, index: int) -> None:
        self.stop = StopWord(CPU)
        self.slots = AttentionSlots(shape, index, CPU, self.stop, 20 * SECOND_NS)
        self._rows = QuantizedRows.empty(1, shape.hidden_size, CPU)

    def link(self, ranks: list[Rank]) -> None:
        for rank in ranks:
            self.slots.connect(rank.slots.index, rank.slots.handle, 1)

    def send(self, lane: int, *, is_first: bool) -> None:
        count = torch.ones(1, dtype=torch.int32)
        self.slots.send(lane, self._rows, None, count, 0, is_first_layer=is_first)

    def begin_at(self, rank: int, lane: int) -> None:
        """Sends a step's first rows, and of the other ranks lets this one alone know so far."""
        self.send(lane, is_first=True)
        host = self.slots._lanes[lane]
        admission = host._await(0, host._admission, host.state.peers[0].sent, Pause())
        host._publish(rank, admission)

    def finish(self, lane: int) -> None:
        """Lets every rank know of the step, and ends it."""
        self.slots.wait(lane, is_first_layer=True)
        self.send(lane, is_first=False)
        self.slots.wait(lane, is_first_layer=False)


@pytest.fixture
def cluster() -> Iterator[Callable[[AfdShape], tuple[list[Source], list[Rank]]]]:
    with contextlib.ExitStack() as ends:

        def make(shape: AfdShape) -> tuple[list[Source], list[Rank]]:
            ranks = [Rank(shape, index) for index in range(shape.num_ranks)]
            sources = [Source(shape, index) for index in range(shape.num_sources)]
            for source in sources:
                ends.callback(source.slots.close)
                source.link(ranks)
            for rank in ranks:
                ends.callback(rank.end)
                rank.session.tell(link_up(sources[0].slots), arrival(sources[0].slots))
                until(lambda rank=rank: rank.session.answers == [PEER])
            return sources, ranks

        yield make


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.001)


def test_ranks_that_rest_at_once_for_a_new_source_do_not_wait_for_each_other(
    cluster: Callable[[AfdShape], tuple[list[Source], list[Rank]]],
) -> None:
    """Each is in a step, of another lane, that the other one has not begun when it is to rest."""
    (old, new), ranks = cluster(AfdShape(2, 2, 3, 1, 128, 1))
    for rank, lane in ((1, 0), (2, 1)):
        old.begin_at(rank, lane)
        until(lambda rank=rank, lane=lane: ranks[rank].is_in_step(lane))
    for rank in ranks[1:]:
        rank.session.tell(link_up(new.slots), arrival(new.slots))
    until(lambda: ranks[1].is_held(0) and ranks[2].is_held(1))
    assert not ranks[1].is_held(1), "it would not begin the step that the other rank is in"
    with ThreadPoolExecutor() as pool:
        list(pool.map(old.finish, (0, 1)))
    assert all(errors.is_ok for end in (old, *ranks) for errors in end.slots.errors())
    for rank in ranks[1:]:
        until(lambda rank=rank: rank.session.answers == [PEER, PEER + 1])
        assert rank.session.resets == []


def test_a_rank_that_rests_for_a_new_source_still_hears_that_an_old_one_is_gone(
    cluster: Callable[[AfdShape], tuple[list[Source], list[Rank]]],
) -> None:
    (old, new), (rank,) = cluster(AfdShape(2, 2, 1, 1, 128, 1))
    old.send(0, is_first=True)
    until(lambda: rank.is_in_step(0))
    rank.session.tell(link_up(new.slots), arrival(new.slots))
    until(lambda: rank.is_held(0) and rank.is_held(1))
    assert rank.session.answers == [PEER], "it is in a step still"
    rank.session.tell(SimpleNamespace(kind="link_down", peer=PEER, reason="it died"))
    until(lambda: rank.session.answers == [PEER, PEER + 1])
    assert rank.slots.errors()[0].peers == (0, 0), "nobody waited for it until the limit"
    new.send(0, is_first=True)
    new.finish(0)
    assert all(errors.is_ok for errors in new.slots.errors())


def test_a_rank_rests_for_nobody_when_the_new_source_is_gone_again(
    cluster: Callable[[AfdShape], tuple[list[Source], list[Rank]]],
) -> None:
    (old, new), (rank,) = cluster(AfdShape(2, 2, 1, 1, 128, 1))
    old.send(0, is_first=True)
    until(lambda: rank.is_in_step(0))
    rank.session.tell(link_up(new.slots))
    until(lambda: rank.is_held(1))
    rank.session.tell(SimpleNamespace(kind="link_down", peer=PEER + 1, reason="it died"))
    until(lambda: not rank.is_held(0) and not rank.is_held(1))
    for lane in (0, 1):
        if lane:
            old.send(lane, is_first=True)
        old.finish(lane)
    assert all(errors.is_ok for errors in old.slots.errors())
