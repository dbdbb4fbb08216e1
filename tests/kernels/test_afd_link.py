"""Whole AFD layers over slots and flags: threads and processes, on a CPU and on GPUs.

On a machine with one GPU all processes share it, with more they spread over two.
"""

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from step3rt.errors import InvalidArgument, Unavailable
from step3rt.model.placement import place
from step3rt.ops.afd_link import (
    AfdShape,
    AttentionSlots,
    FfnSlots,
    LaneErrors,
    LaneState,
    LinkError,
    StopWord,
)
from step3rt.ops.afd_reference import HostFlag
from step3rt.ops.afd_slots import (
    AFD_LANE,
    AFD_PEER,
    AFD_TRACE_ROW,
    FLAG_BYTES,
    Role,
    Section,
    local_ids,
)
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from step3rt.ops.stream import Stream
from tests.kernels.afd_party import (
    NUM_EXPERTS,
    PARTIES,
    FfnParty,
    Limits,
    RemoteParty,
    Walk,
    compute,
)

LAYERS = [False, True, True, False]
SHAPE = AfdShape(num_lanes=2, num_sources=2, num_ranks=2, max_tokens=9, hidden_size=256, top_k=3)
CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
EPOCHS = itertools.count(1)


def device_of(kind: str, place: int = 0) -> torch.device:
    """The `place`-th process' device, of a machine's first two GPUs at most."""
    if kind == "cpu":
        return CPU
    return torch.device("cuda", place % min(torch.cuda.device_count(), 2))


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


# ---- sizes and handles --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_lanes", 0),
        ("num_sources", 33),
        ("num_ranks", 0),
        ("max_tokens", 1025),  # of 2 sources: more than the experts take
        ("hidden_size", 200),
        ("top_k", 8),
    ],
)
def test_sizes_that_cannot_be_linked_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{field}={value}.*cannot be linked"):
        replace(SHAPE, **{field: value})


def test_no_two_sections_of_a_region_overlap() -> None:
    for role in Role:
        sections: list[Section] = []
        for lane in range(SHAPE.num_lanes):
            of_role = SHAPE.ffn_sections if role is Role.FFN else SHAPE.attention_sections
            sections += [getattr(of_role(lane), name) for name in of_role(lane).__slots__]
        sections.sort(key=lambda section: section.offset)
        ends = [section.offset + section.num_bytes for section in sections]
        assert all(section.offset % 256 == 0 for section in sections)
        assert all(
            end <= following.offset for end, following in zip(ends, sections[1:], strict=False)
        )
        assert ends[-1] <= SHAPE.region_bytes(role)
    assert (AFD_PEER.itemsize, AFD_LANE.itemsize, AFD_TRACE_ROW.itemsize) == (128, 33 * 128, 64)
    assert AFD_LANE.fields is not None
    assert AFD_LANE.fields["peers"][1] == FLAG_BYTES


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_ranks_get_the_rows_and_ids_that_the_placement_gives_them(num_ranks: int) -> None:
    shape = replace(SHAPE, num_ranks=num_ranks, max_tokens=40)
    generator = torch.Generator().manual_seed(num_ranks)
    weights, chosen = torch.rand(40, NUM_EXPERTS, generator=generator).topk(3, dim=1)
    topk = (chosen.int(), weights)
    for choices, experts in ((topk, NUM_EXPERTS), (None, 0)):
        ids, shares = local_ids(shape, choices, 37, experts)
        of_placement = topk if choices else (chosen[:, :0], weights[:, :0])
        placements = place(
            *(tensor[:37] for tensor in of_placement),
            num_experts=experts,
            top_k=3,
            ep_size=num_ranks,
        )
        for rank, placement in enumerate(placements):
            first = experts * rank // num_ranks
            end = experts * (rank + 1) // num_ranks
            is_here = (ids[rank] >= 0).any(dim=1)
            assert torch.equal(is_here.nonzero()[:, 0], placement.rows)
            want = placement.expert_ids.clone()
            want[:, :3] = torch.where(want[:, :3] >= 0, want[:, :3] - first, -1)
            want[:, 3] = torch.where(want[:, 3] >= 0, end - first, -1)
            assert torch.equal(ids[rank][is_here], want)
            assert torch.equal(shares[rank][is_here], placement.expert_weights)
            assert bool((ids[rank][~is_here] == -1).all())


@pytest.mark.parametrize("kind", DEVICES)
def test_handles_of_other_shapes_roles_and_places_are_refused(kind: str) -> None:
    device = device_of(kind)
    stop = StopWord(device)
    with (
        AttentionSlots(SHAPE, 0, device, stop) as source,
        FfnSlots(SHAPE, 1, device, stop) as rank,
        FfnSlots(replace(SHAPE, max_tokens=8), 1, device, stop) as other,
    ):
        for handle in (other.handle, source.handle, rank.handle[:20], b""):
            with pytest.raises(InvalidArgument, match="expected"):
                source.connect(1, handle, epoch=1)
        with pytest.raises(InvalidArgument, match="expected"):
            source.connect(0, rank.handle, epoch=1)
        with pytest.raises(InvalidArgument, match="not one of 2"):
            source.connect(2, rank.handle, epoch=1)
        source.connect(1, rank.handle, epoch=7)
        for epoch in (7, 6, 0, 1 << 24):
            with pytest.raises(InvalidArgument, match="Epoch"):
                source.connect(1, rank.handle, epoch)
        with pytest.raises(InvalidArgument, match="not linked"):
            rank.set_active(0, True)


def test_memory_that_is_gone_or_something_else_now_is_not_mapped() -> None:
    stop = StopWord(CPU)
    with AttentionSlots(SHAPE, 0, CPU, stop) as source:
        with FfnSlots(SHAPE, 0, CPU, stop) as closed:
            handle = closed.handle
        with pytest.raises(Unavailable, match="cannot be mapped"):
            source.connect(0, handle, epoch=1)
        with FfnSlots(SHAPE, 0, CPU, stop) as rank:
            wrong_token = rank.handle[:-1] + bytes([rank.handle[-1] ^ 1])
            with pytest.raises(Unavailable, match="something else"):
                source.connect(0, wrong_token, epoch=1)


# ---- one lane, call by call: all in one stream, so that it runs on one GPU, too ------------------


class Bench:
    """Sources and one rank in this process, whose calls are made one after the other."""

    def __init__(
        self,
        kind: str,
        num_sources: int = 2,
        wait_limit_ns: int = 300_000_000,
        idle_limit_ns: int = 0,
    ) -> None:
        self.device = device_of(kind)
        self.shape = AfdShape(1, num_sources, 1, 5, 256, 3)
        self.stop = StopWord(self.device)
        limits = (wait_limit_ns, 0, idle_limit_ns)
        self.rank = FfnSlots(self.shape, 0, self.device, self.stop, *limits)
        self.sources = [
            AttentionSlots(self.shape, index, self.device, self.stop, wait_limit_ns)
            for index in range(num_sources)
        ]
        for index in range(num_sources):
            self.link(index)

    def link(self, index: int) -> None:
        epoch = next(EPOCHS)
        source = self.sources[index]
        self.rank.connect(index, source.handle, epoch)
        source.connect(0, self.rank.handle, epoch)

    def rows(self, value: float) -> QuantizedRows:
        rows = torch.full((5, self.shape.hidden_size), value, device=self.device)
        return QuantizedRows(*quantize_groups(rows))

    def send(self, index: int, value: float, num_rows: int = 2, *, is_first: bool = True) -> None:
        count = torch.tensor([num_rows], dtype=torch.int32, device=self.device)
        source = self.sources[index]
        source.send(0, self.rows(value), None, count, 0, is_first_layer=is_first)

    def compute(self, *, is_first: bool = True) -> None:
        """The rank's layer: half of each row, as `compute` has it for a home."""
        self.rank.wait(0, is_first)
        self.rank.push(0, compute(self.rank.tokens(0), 0, 1, 0))

    def receive(self, index: int, *, is_first: bool = True) -> list[float]:
        """Waits; returns the first value of each of the rows that came back."""
        source = self.sources[index]
        source.wait(0, is_first_layer=is_first)
        is_present = source.present(0).bool()
        return source.sums(0)[0][is_present][:, 0].tolist()

    def finish(self) -> None:
        """Waits until all calls have ended on the device."""
        if self.device.type != "cpu":
            torch.cuda.synchronize()

    def state(self) -> LaneState:
        """The rank's."""
        self.finish()
        return self.rank.state(0)

    def errors(self) -> tuple[LaneErrors, list[LaneErrors]]:
        """The rank's, and the sources'."""
        self.finish()
        return self.rank.errors()[0], [source.errors()[0] for source in self.sources]

    def close(self) -> None:
        self.stop.set()
        self.finish()
        for slots in (self.rank, *self.sources):
            slots.close()


@pytest.fixture(params=DEVICES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def test_a_layer_goes_there_and_back(bench: Bench) -> None:
    bench.send(0, 4.0, 3)
    bench.send(1, 6.0, 1)
    bench.compute()
    assert bench.receive(0) == [2.0] * 3
    assert bench.receive(1) == [3.0]
    bench.send(0, 8.0, 0, is_first=False)
    bench.send(1, 10.0, 5, is_first=False)
    bench.compute(is_first=False)
    assert bench.receive(0, is_first=False) == []
    assert bench.receive(1, is_first=False) == [5.0] * 5
    state = bench.state()
    assert (state.participants, state.joined, state.steps, state.frames) == (3, 3, 1, 2)
    assert [(peer.sent, peer.received) for peer in state.peers] == [(2, 2), (2, 2)]
    of_rank, of_sources = bench.errors()
    assert of_rank.is_ok
    assert all(errors.is_ok for errors in of_sources)


def test_a_source_that_comes_early_for_the_next_step_disturbs_nothing(bench: Bench) -> None:
    bench.send(0, 4.0)
    bench.rank.wait(0, True)
    bench.send(1, 6.0, 5)  # while the rank is in a step of source 0 alone
    tokens = bench.rank.tokens(0)
    assert (tokens.topk_ids[:, -1] >= 0).nonzero()[:, 0].tolist() == [0, 1]
    assert bool((tokens.topk_weights[2:] == 0).all())
    bench.rank.push(0, compute(tokens, 0, 1, 0))
    assert bench.receive(0) == [2.0] * 2
    bench.send(0, 8.0, is_first=False)
    bench.compute(is_first=False)
    assert bench.receive(0, is_first=False) == [4.0] * 2
    assert bench.state().peers[1].sent == 0
    bench.compute()  # the next step finds source 1's frame where it was
    assert bench.state().participants == 2
    assert bench.receive(1) == [3.0] * 5


def test_sources_of_the_last_steps_hold_the_join_window_open() -> None:
    device = CPU
    for window_ns, joined in ((0, 2), (5_000_000_000, 3)):
        bench = Bench(device.type)
        bench.rank.close()
        bench.rank = FfnSlots(bench.shape, 0, device, bench.stop, 1_000_000_000, window_ns)
        for index in (0, 1):
            bench.link(index)
        bench.send(0, 2.0)
        bench.compute()  # nobody is expected in the first step
        assert bench.receive(0) == [1.0] * 2
        bench.send(1, 4.0)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            computed = pool.submit(bench.compute)
            time.sleep(0.05)
            bench.send(0, 6.0)
            computed.result(timeout=20)
        assert bench.state().joined == joined
        bench.close()


def test_a_paused_rank_begins_no_step_and_loses_nothing(bench: Bench) -> None:
    bench.send(0, 4.0)
    bench.rank.pause()
    bench.compute()
    assert bench.state().steps == 0
    assert bool((bench.rank.tokens(0).topk_ids == -1).all())
    bench.rank.resume()
    bench.compute()
    assert bench.receive(0) == [2.0] * 2


@pytest.mark.parametrize("kind", DEVICES)
def test_an_idle_rank_with_a_limit_ends_its_step_and_takes_who_comes_later(kind: str) -> None:
    bench = Bench(kind, idle_limit_ns=20_000_000)
    for _ in range(2):
        begin_s = time.monotonic()
        bench.compute()  # nobody comes: a wait without a limit would not end
        assert bench.state().steps == 0
        assert 0.02 <= time.monotonic() - begin_s < 5.0
    assert bool((bench.rank.tokens(0).topk_ids == -1).all())
    assert bench.errors()[0].is_ok
    bench.send(0, 4.0)
    bench.compute()
    assert bench.receive(0) == [2.0] * 2
    assert bench.state().steps == 1
    bench.close()


def test_a_link_that_is_made_anew_keeps_the_peers_memory_mapped(bench: Bench) -> None:
    """To map memory of a GPU may take one that is idle; after a lane's error it need not be."""
    source = bench.sources[0]
    before = source._mapped[0][1]
    source.reset()
    bench.rank.reset()
    bench.link(0)
    assert source._mapped[0][1] is before
    bench.send(0, 4.0)
    bench.compute()
    assert bench.receive(0) == [2.0] * 2
    other = FfnSlots(bench.shape, 0, bench.device, bench.stop)
    source.reset()
    source.connect(0, other.handle, next(EPOCHS))
    assert source._mapped[0][1] is not before
    other.close()


@pytest.mark.parametrize("kind", DEVICES)
def test_an_end_that_knows_its_streams_waits_for_no_other_ones(kind: str) -> None:
    """Another end of this process may be parked in a wait without a limit meanwhile."""
    bench = Bench(kind, num_sources=1)
    own, parked = Stream(bench.device), Stream(bench.device)
    bench.sources[0].run_on(own)
    bench.rank.run_on(parked)
    bench.send(0, 4.0)
    bench.compute()  # loads the kernels
    assert bench.receive(0) == [2.0] * 2
    parked.run(lambda: bench.rank.wait(0, True))
    ended = parked.record()
    bench.sources[0].reset()
    bench.sources[0].connect(0, bench.rank.handle, next(EPOCHS))
    assert not ended.is_done()
    bench.stop.set()
    ended.wait()
    for stream in (own, parked):
        stream.close()
    bench.close()


def test_a_source_that_is_given_up_leaves_and_comes_back_under_a_new_epoch(bench: Bench) -> None:
    bench.send(0, 4.0)
    bench.send(1, 6.0)
    bench.compute()
    assert (bench.receive(0), bench.receive(1)) == ([2.0] * 2, [3.0] * 2)
    bench.rank.set_active(1, False)
    bench.send(0, 8.0, is_first=False)
    bench.compute(is_first=False)
    assert bench.receive(0, is_first=False) == [4.0] * 2
    assert bench.state().participants == 1
    assert bench.errors()[0].is_ok
    bench.sources[1].reset()
    bench.link(1)
    bench.send(1, 10.0)
    bench.compute()
    assert bench.receive(1) == [5.0] * 2


def test_a_silent_source_is_lost_in_time_and_the_others_go_on(bench: Bench) -> None:
    bench.send(0, 4.0)
    bench.send(1, 6.0)
    bench.compute()
    bench.receive(0)
    bench.send(0, 8.0, is_first=False)
    bench.finish()
    started = time.monotonic()
    bench.compute(is_first=False)
    assert bench.receive(0, is_first=False) == [4.0] * 2
    assert 0.25 < time.monotonic() - started < 5.0
    errors = bench.errors()[0]
    assert (errors.lane, errors.peers) == (LinkError.OK, (LinkError.OK, LinkError.TIMED_OUT))


def test_a_silent_rank_ends_a_sources_lane_in_time(bench: Bench) -> None:
    bench.send(0, 4.0)
    started = time.monotonic()
    bench.receive(0)
    assert 0.25 < time.monotonic() - started < 5.0
    errors = bench.errors()[1][0]
    assert (errors.lane, errors.peers) == (LinkError.TIMED_OUT, (LinkError.TIMED_OUT,))
    bench.send(0, 4.0)  # sends nothing
    bench.receive(0)  # and waits for nothing
    bench.finish()
    assert bench.sources[0].state(0).peers[0].sent == 1


def test_after_a_reset_all_starts_anew(bench: Bench) -> None:
    bench.send(0, 4.0)
    bench.receive(0)
    bench.sources[0].reset()
    assert bench.errors()[1][0].is_ok
    bench.send(0, 4.0)
    assert bench.errors()[1][0].lane is LinkError.NOT_LINKED
    bench.sources[0].reset()
    bench.rank.reset()
    bench.link(0)
    bench.send(0, 6.0)
    bench.compute()
    assert bench.receive(0) == [3.0] * 2


def test_frames_of_another_layer_epoch_or_length_are_refused(bench: Bench) -> None:
    def peer_error(source: int) -> LinkError:
        return bench.errors()[0].peers[source]

    bench.send(0, 4.0, is_first=False)  # in the middle of a step that never began
    bench.send(1, 6.0)
    bench.compute()
    assert bench.receive(1) == [3.0] * 2
    assert peer_error(0) is LinkError.WRONG_SEQUENCE
    bench.send(1, 8.0)  # begins a step in the middle of one
    bench.compute(is_first=False)
    assert peer_error(1) is LinkError.WRONG_SEQUENCE

    for slots in (bench.rank, *bench.sources):
        slots.reset()
    bench.link(1)
    late, early = next(EPOCHS), next(EPOCHS)
    bench.rank.connect(0, bench.sources[0].handle, late)
    bench.sources[0].connect(0, bench.rank.handle, early)
    bench.send(0, 4.0)
    bench.send(1, 6.0)
    bench.compute()
    assert peer_error(0) is LinkError.WRONG_SEQUENCE
    assert bench.receive(1) == [3.0] * 2

    bench.send(1, 6.0, 6)  # more than the rows at hand
    assert bench.errors()[1][1].lane is LinkError.WRONG_LENGTH


def test_frames_of_an_older_epoch_are_not_taken_for_new_ones(bench: Bench) -> None:
    bench.send(0, 4.0)  # published, never awaited
    bench.rank.connect(0, bench.sources[0].handle, next(EPOCHS))
    bench.send(1, 6.0)
    bench.compute()
    assert bench.receive(1) == [3.0] * 2
    state = bench.state()
    assert (state.joined, state.peers[0].received) == (2, 0)
    assert bench.errors()[0].is_ok


def test_after_the_stop_word_the_experts_have_nothing_to_do(bench: Bench) -> None:
    bench.send(0, 4.0)
    bench.rank.wait(0, True)
    bench.stop.set()
    bench.rank.wait(0, False)
    started = time.monotonic()
    bench.receive(0)
    assert time.monotonic() - started < 2.0
    assert bool((bench.rank.tokens(0).topk_ids == -1).all())
    assert bool((bench.rank.tokens(0).topk_weights == 0).all())
    assert bench.errors()[0].lane is LinkError.STOPPED
    assert bench.errors()[1][0].lane is LinkError.STOPPED


def test_both_ends_note_when_a_frame_was_sent_and_awaited(bench: Bench) -> None:
    rows = [torch.zeros(2, 8, dtype=torch.int64, device=bench.device) for _ in range(2)]
    bench.rank.set_trace(0, rows[0])
    bench.sources[0].set_trace(0, rows[1])
    for index in range(3):
        bench.send(0, 4.0, is_first=index == 0)
        bench.compute(is_first=index == 0)
        bench.receive(0, is_first=index == 0)
    for trace in rows:
        found = trace.cpu().numpy().view(AFD_TRACE_ROW).reshape(-1)
        assert found["frame"].tolist() == [2, 1]  # two rows, used in turn
        assert (found["send_begin"] <= found["send_end"]).all()
        assert (found["wait_begin"] <= found["wait_end"]).all()
        assert (found["participants"] == 1).all()
        assert (found["num_rows"] == 2).all()
    ours, theirs = (trace.cpu().numpy().view(AFD_TRACE_ROW)[0] for trace in rows[::-1])
    assert ours["send_begin"] <= theirs["wait_end"] <= theirs["send_end"] <= ours["wait_end"]
    with pytest.raises(ValueError, match="`rows` has shape"):
        bench.rank.set_trace(0, rows[0][:, :4])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_captured_step_replays_with_the_next_sequence_numbers() -> None:
    bench = Bench("cuda", num_sources=1)
    rows = bench.rows(4.0)
    count = torch.tensor([3], dtype=torch.int32, device=bench.device)
    source = bench.sources[0]

    def step() -> None:
        for layer in range(3):
            is_first = layer == 0
            source.send(0, rows, None, count, 0, is_first_layer=is_first)
            bench.compute(is_first=is_first)
            source.wait(0, is_first_layer=is_first)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    for replay, num_rows in enumerate((5, 0, 2)):
        count.fill_(num_rows)
        source.sums(0).zero_()
        torch.cuda.synchronize()
        graph.replay()
        state = bench.state()
        assert (state.steps, state.frames) == (replay + 2, 3 * (replay + 2))
        assert state.peers[0].sent == state.peers[0].received == 3 * (replay + 2)
        assert bool((source.sums(0)[0, :num_rows] == 2.0).all())
        assert bool((source.sums(0)[0, num_rows:] == 0.0).all())
        assert source.present(0).tolist() == [1] * num_rows + [0] * (5 - num_rows)
        assert bench.errors()[0].is_ok
    del graph
    bench.close()


def test_arguments_that_do_not_fit_are_refused(bench: Bench) -> None:
    source, count = bench.sources[0], torch.ones(1, dtype=torch.int32, device=bench.device)
    with pytest.raises(ValueError, match="neither experts nor choices"):
        source.send(0, bench.rows(1.0), None, count, 7, is_first_layer=True)
    wide = QuantizedRows.empty(6, 256, bench.device)
    with pytest.raises(ValueError, match="6 rows for 0 experts"):
        source.send(0, wide, None, count, 0, is_first_layer=True)
    narrow = QuantizedRows.empty(2, 128, bench.device)
    with pytest.raises(ValueError, match="`values` has shape"):
        source.send(0, narrow, None, count, 0, is_first_layer=True)
    with pytest.raises(ValueError, match="`sums` has shape"):
        bench.rank.push(0, torch.zeros(3, 256, dtype=torch.bfloat16, device=bench.device))


# ---- several instances at once ------------------------------------------------------------------


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
