"""What one lane of AFD links does, call by call."""

import concurrent.futures
import time
from collections.abc import Iterator

import pytest
import torch

from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, LinkError, StopWord
from step3rt.ops.afd_slots import AFD_TRACE_ROW
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from step3rt.ops.stream import Stream
from tests.kernels.afd_bench import Bench
from tests.kernels.afd_cases import CPU, DEVICES, EPOCHS, HAS_GPU, device_of
from tests.kernels.afd_party import compute


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
def test_a_paused_lane_keeps_no_other_lane_from_its_step(kind: str) -> None:
    device, shape = device_of(kind), AfdShape(2, 1, 1, 5, 256, 3)
    stop = StopWord(device)
    rank, source = FfnSlots(shape, 0, device, stop), AttentionSlots(shape, 0, device, stop)
    rank.connect(0, source.handle, 1)
    source.connect(0, rank.handle, 1)
    rows = QuantizedRows.empty(5, 256, device)
    count = torch.ones(1, dtype=torch.int32, device=device)
    rank.pause(1)
    for lane in (0, 1):
        source.send(lane, rows, None, count, 0, is_first_layer=True)
        rank.wait(lane, True)
    assert [steps_of(rank, lane) for lane in (0, 1)] == [1, 0]
    rank.resume()
    rank.wait(1, True)
    assert steps_of(rank, 1) == 1
    for slots in (rank, source):
        slots.close()


def steps_of(rank: FfnSlots, lane: int) -> int:
    if rank.device.type != "cpu":
        torch.cuda.synchronize()
    return rank.state(lane).steps


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
