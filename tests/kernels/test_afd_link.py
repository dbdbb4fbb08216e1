"""Whole AFD layers over slots and flags: threads and processes, on a CPU and on GPUs."""

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from step3rt.ops.afd_host_lane import HostFlag
from step3rt.ops.afd_link import AfdShape, LinkError
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from tests.kernels.afd_cases import CPU, DEVICES, EPOCHS, SHAPE, device_of
from tests.kernels.afd_party import PARTIES, FfnParty, Limits, RemoteParty, Walk

LAYERS = [False, True, True, False]


class LocalParty:
    """A party in threads of this process, with the interface of a remote one."""

    def __init__(self, role: str, device: torch.device) -> None:
        self.party = PARTIES[role](device)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future[Any] | None = None

    def start(self, call: str, *arguments: Any) -> None:
        self._pending = self._pool.submit(getattr(self.party, call), *arguments)

    def answer(self) -> Any:
        assert self._pending is not None
        return self._pending.result(timeout=60)

    def do(self, call: str, *arguments: Any) -> Any:
        self.start(call, *arguments)
        return self.answer()

    def end(self) -> None:
        self.party.close()
        self._pool.shutdown()


class Cluster:
    """Sources and ranks of one shape, all linked to each other."""

    def __init__(
        self, make: Callable[[str, int], Any], shape: AfdShape, limits: Limits | None = None
    ) -> None:
        self.shape = shape
        self.limits = limits or Limits()
        self.sources = [make("source", index) for index in range(shape.num_sources)]
        self.ranks = [make("ffn", shape.num_sources + index) for index in range(shape.num_ranks)]
        for index, party in enumerate([*self.sources, *self.ranks]):
            place = index if index < shape.num_sources else index - shape.num_sources
            party.handle = party.do("open", shape, place, self.limits)

    def link(self, sources: list[int] | None = None) -> None:
        chosen = range(self.shape.num_sources) if sources is None else sources
        for source in chosen:
            epoch = next(EPOCHS)
            for party in self.ranks:
                party.do("connect", source, self.sources[source].handle, epoch)
            for rank, party in enumerate(self.ranks):
                self.sources[source].do("connect", rank, party.handle, epoch)

    def serve(self, is_moe: list[bool] = LAYERS) -> None:
        for party in self.ranks:
            party.do("serve", is_moe)

    def walk(self, rows: dict[int, list[int]], is_moe: list[bool] = LAYERS) -> dict[int, Any]:
        """Lets each source walk all lanes; returns what they found."""
        self.start(rows, is_moe)
        return {source: self.sources[source].answer() for source in rows}

    def start(self, rows: dict[int, list[int]], is_moe: list[bool] = LAYERS) -> None:
        for source, counts in rows.items():
            walks = [Walk(lane, counts, is_moe) for lane in range(self.shape.num_lanes)]
            self.sources[source].start("run", walks)

    def steps(self) -> list[list[list[int]]]:
        """Sources of each step, by rank and lane, once all have ended; the last one is stopped."""
        for party in self.ranks:
            party.do("halt")
        return [party.do("participants") for party in self.ranks]


def assert_whole(found: dict[int, Any], rows: dict[int, list[int]], shape: AfdShape) -> None:
    for source, result in found.items():
        assert result["faults"] == 0
        assert all(errors.is_ok for errors in result["errors"])
        assert result["layers"] == [len(rows[source]) * len(LAYERS)] * shape.num_lanes


@pytest.fixture
def local() -> Iterator[Callable[[str, int], LocalParty]]:
    torch.set_num_threads(1)
    parties: list[LocalParty] = []

    def make(role: str, _: int) -> LocalParty:
        parties.append(LocalParty(role, CPU))
        return parties[-1]

    yield make
    for party in parties:
        party.party.stop.set()
    for party in parties:
        party.end()


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, list[RemoteParty]]]:
    started: dict[str, list[RemoteParty]] = {}
    yield started
    for parties in started.values():
        for party in parties:
            if party.is_alive:
                party.kill()


@pytest.fixture
def remote(
    processes: dict[str, list[RemoteParty]],
) -> Iterator[Callable[[str], Callable[[str, int], RemoteParty]]]:
    """Makers of parties in processes of their own, which serve one test after another."""
    used: list[RemoteParty] = []

    def on(kind: str) -> Callable[[str, int], RemoteParty]:
        def make(role: str, place: int) -> RemoteParty:
            device = device_of(kind, place)
            idle = processes.setdefault(str(device), [])
            party = next((p for p in idle if p.is_alive and p not in used), None)
            if party is None:
                party = RemoteParty(device)
                idle.append(party)
            party.role = role
            used.append(party)
            return party

        return make

    yield on
    for party in used:
        if party.is_alive:
            party.do("close")


@pytest.mark.parametrize("num_lanes", [1, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_sources", [1, 2, 3])
def test_every_row_comes_back_from_the_ranks_that_compute_it(
    local: Callable[[str, int], LocalParty], num_sources: int, num_ranks: int, num_lanes: int
) -> None:
    shape = AfdShape(num_lanes, num_sources, num_ranks, 9, 256, 3)
    cluster = Cluster(local, shape)
    cluster.link()
    cluster.serve()
    uneven = [[3, 0, 9, 1], [9, 9], [0, 0, 5]]
    rows = {source: uneven[source] for source in range(num_sources)}
    assert_whole(cluster.walk(rows), rows, shape)
    by_rank = cluster.steps()
    for of_rank in by_rank[1:]:
        for lane, steps in enumerate(of_rank):
            assert steps[:-1] == by_rank[0][lane][: len(steps) - 1]
    for steps in by_rank[0]:
        for source, counts in rows.items():
            assert sum(step >> source & 1 for step in steps) == len(counts)


@pytest.mark.parametrize("join_s", [0.0, 0.2])
def test_ranks_agree_on_who_takes_part_however_sources_come(
    local: Callable[[str, int], LocalParty], join_s: float
) -> None:
    # Ranks that decided for themselves would wait for each other here before long.
    shape = AfdShape(1, 3, 3, 4, 128, 2)
    cluster = Cluster(local, shape, Limits(join_s=join_s))
    cluster.link()
    cluster.serve([True, False])
    counts = {source: [1 + source] * 12 for source in range(3)}
    for result in cluster.walk(counts, [True, False]).values():
        assert (result["faults"], result["layers"]) == (0, [24])
    steps = [of_rank[0][:-1] for of_rank in cluster.steps()]
    assert steps[0] == steps[1] == steps[2]
    if join_s:
        assert 7 in steps[0]


def test_a_late_source_joins_at_the_next_step(local: Callable[[str, int], LocalParty]) -> None:
    cluster = Cluster(local, SHAPE, Limits(join_s=0.5))
    cluster.link([0])
    cluster.serve()
    rows = {0: [4] * 60, 1: [5] * 3}
    cluster.start({0: rows[0]})
    while not all(cluster.ranks[0].do("participants")):
        time.sleep(0.01)
    cluster.link([1])
    cluster.start({1: rows[1]})
    assert_whole({s: cluster.sources[s].answer() for s in (0, 1)}, rows, SHAPE)
    for of_rank in cluster.steps():
        for steps in of_rank:
            assert steps[0] == 1
            assert 3 in steps


def test_a_source_that_only_one_rank_misses_takes_no_other_source_along(
    local: Callable[[str, int], LocalParty],
) -> None:
    # Rank 1 waits its limit out for source 1, and source 0 with it: rank 0 must bear with source 0.
    shape = AfdShape(1, 2, 2, 9, 256, 3)
    cluster = Cluster(local, shape)
    for rank, party in enumerate(cluster.ranks):
        party.handle = party.do("open", shape, rank, Limits(wait_s=0.8 + 0.4 * rank, join_s=1.0))
    cluster.link()
    cluster.serve()
    rows = {0: [3], 1: [3]}
    found = cluster.walk(rows)
    assert_whole(found, rows, shape)
    slots = cluster.sources[1].party.slots
    hidden = QuantizedRows(*quantize_groups(torch.ones(2, 256)))
    count = torch.tensor([2], dtype=torch.int32)
    cluster.start({0: [4]})
    slots.send(0, hidden, None, count, 0, is_first_layer=True)
    slots.wait(0, is_first_layer=True)
    host = slots._lanes[0]
    host.ranks[1] = replace(host.ranks[1], peer_flag=HostFlag(torch.zeros(16, dtype=torch.uint8)))
    slots.send(0, hidden, None, count, 0, is_first_layer=False)
    assert_whole({0: cluster.sources[0].answer()}, {0: [4]}, shape)
    for party in cluster.ranks:
        assert party.do("errors")[0].peers == (LinkError.OK, LinkError.TIMED_OUT)


@pytest.mark.parametrize("kind", DEVICES)
def test_processes_exchange_whole_layers(remote: Any, kind: str) -> None:
    cluster = Cluster(remote(kind), SHAPE)
    cluster.link()
    cluster.serve()
    rows = {0: [3, 0, 9, 1, 9, 2], 1: [9, 1, 0]}
    assert_whole(cluster.walk(rows), rows, SHAPE)
    steps = cluster.steps()
    assert [lane[:-1] for lane in steps[0]] == [lane[:-1] for lane in steps[1]]


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("kind", DEVICES)
def test_a_source_killed_in_a_step_costs_the_others_no_row(
    remote: Any, kind: str, is_told: bool
) -> None:
    limits = Limits(wait_s=20.0 if is_told else 3.0)
    cluster = Cluster(remote(kind), SHAPE, replace(limits, wait_s=30.0))
    for rank, party in enumerate(cluster.ranks):
        party.handle = party.do("open", SHAPE, rank, limits)
    cluster.link()
    cluster.serve()
    rows = {0: [7] * 30, 1: [5] * 1000}
    cluster.start(rows)
    time.sleep(0.3)
    cluster.sources[1].kill()
    if is_told:
        for party in cluster.ranks:
            party.do("set_active", 1, False)
    assert_whole({0: cluster.sources[0].answer()}, rows, SHAPE)
    lost = {error.peers[1] for party in cluster.ranks for error in party.do("errors")}
    assert lost <= ({LinkError.OK} if is_told else {LinkError.OK, LinkError.TIMED_OUT})

    cluster.sources[1] = remote(kind)("source", 1)
    cluster.sources[1].handle = cluster.sources[1].do("open", SHAPE, 1, limits)
    cluster.link([1])
    again = {0: [2, 3], 1: [4, 5]}
    assert_whole(cluster.walk(again), again, SHAPE)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_killed_rank_is_an_error_in_time_and_a_new_one_can_be_linked(
    remote: Any, kind: str
) -> None:
    cluster = Cluster(remote(kind), SHAPE, Limits(wait_s=1.0))
    cluster.link()
    cluster.serve()
    cluster.start({0: [7] * 1000, 1: [5] * 1000})
    time.sleep(0.3)
    cluster.ranks[1].kill()
    started = time.monotonic()
    for source in cluster.sources:
        result = source.answer()
        assert result["faults"] == 0
        assert all(error.lane is LinkError.TIMED_OUT for error in result["errors"])
    assert time.monotonic() - started < 8.0

    cluster.ranks[1] = remote(kind)("ffn", 3)
    cluster.ranks[1].handle = cluster.ranks[1].do("open", SHAPE, 1, cluster.limits)
    cluster.ranks[1].do("serve", LAYERS)
    for source in cluster.sources:
        source.do("reset")
    cluster.link()
    rows = {0: [2, 3], 1: [4, 5]}
    assert_whole(cluster.walk(rows), rows, SHAPE)


def test_the_stop_word_ends_a_wait_for_anybody_at_once() -> None:
    party = FfnParty(CPU)
    party.open(SHAPE, 0, Limits())
    party.serve(LAYERS)
    time.sleep(0.05)
    started = time.monotonic()
    errors = party.halt()
    assert time.monotonic() - started < 2.0
    assert [error.lane for error in errors] == [LinkError.STOPPED] * SHAPE.num_lanes
    party.close()
