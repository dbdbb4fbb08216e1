"""Recordings of a simulated pipeline with known times, on clocks that are apart."""

import json
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from step3rt.errors import InvalidArgument
from step3rt.trace import perfetto
from step3rt.trace.recording import ROW, Recording, Shape, load_all
from step3rt.trace.summary import describe, summarise
from step3rt.trace.timeline import build

US = 1_000
LAYERS = 5


@dataclass
class Pipeline:
    """Every source asks every rank in every layer; lanes do not disturb each other.

    Times in us: `attention` and `ffn` of each instance's layer, `way` of a transfer at least.
    `clocks_ns`: by instance, what its clock shows at time 0.
    """

    attention: list[float]
    ffn: list[float]
    way: float = 5.0
    num_lanes: int = 2
    num_steps: int = 6
    num_rows: int = 8
    seed: int = 3
    clocks_ns: dict[str, int] = field(default_factory=dict)

    def record(self) -> list[Recording]:
        draw = random.Random(self.seed)
        rows: dict[str, list[list[tuple[int, ...]]]] = {}
        for role, each in (("attention", self.attention), ("ffn", self.ffn)):
            for rank in range(len(each)):
                rows[f"{role} {rank}"] = [[] for _ in range(self.num_lanes)]
        everyone = (1 << len(self.attention)) - 1
        for lane in range(self.num_lanes):
            ready = [100.0 * (lane + 1)] * len(self.attention)
            free = [1.0] * len(self.ffn)
            for frame in range(LAYERS * self.num_steps):
                begins = [at + self.time_of(self.attention, a) for a, at in enumerate(ready)]
                sent = [begin + 2.0 for begin in begins]
                answered = []
                for rank in range(len(self.ffn)):
                    arrived = max(sent) + self.way + draw.random()
                    push = max(arrived, free[rank]) + self.time_of(self.ffn, rank)
                    wait_end = max(arrived, free[rank])
                    row = (frame, push, push + 3.0, free[rank], wait_end, everyone)
                    rows[f"ffn {rank}"][lane].append(row)
                    free[rank] = push + 3.0
                    answered.append(push + 3.0)
                for source, begin in enumerate(begins):
                    end = max(answered) + self.way + draw.random()
                    row = (frame, begin, sent[source], sent[source], end, 1 << source)
                    rows[f"attention {source}"][lane].append(row)
                    ready[source] = end
        return [self._recording(name, lanes) for name, lanes in rows.items()]

    def time_of(self, times: list[float], index: int) -> float:
        return times[index]

    def _recording(self, name: str, lanes: list[list[tuple[int, ...]]]) -> Recording:
        role, rank = name.split()
        clock = self.clocks_ns.get(name, 0)
        shape = Shape(role, int(rank), LAYERS, len(self.attention), len(self.ffn))
        found = []
        for lane in lanes:
            ring = np.zeros(len(lane), dtype=ROW)
            for place, (frame, *times, participants) in enumerate(lane):
                numbers = [round(time * US) + clock for time in times]
                ring[place] = (frame, *numbers, participants, self.num_rows, 0)
            found.append(ring)
        return Recording.of_rings(shape, found)


CLOCKS = {
    "attention 0": 10**15,
    "attention 1": 10**15 + 777_000,
    "ffn 0": 5_000,
    "ffn 1": 9 * 10**14,
}


def test_clocks_that_are_apart_are_brought_together() -> None:
    together = build(Pipeline([20, 20], [30, 30]).record())
    apart = build(Pipeline([20, 20], [30, 30], clocks_ns=CLOCKS).record())
    for one, other in zip(together.recordings, apart.recordings, strict=True):
        for left, right in zip(one.lanes, other.lanes, strict=True):
            for name in ("send_begin", "wait_end"):
                error = left[name].astype(np.int64) - right[name].astype(np.int64)
                assert abs(error).max() < 1 * US  # half of what the ways differ by
    assert min(int(rows["send_begin"][0]) for rows in apart.recordings[0].lanes) < 200 * US


def test_a_clock_that_is_faster_is_brought_back_too() -> None:
    pipeline = Pipeline([20], [30, 30], num_lanes=1, num_steps=1200, clocks_ns=CLOCKS)
    recordings = pipeline.record()
    together = build(recordings)
    for recording, drift in ((recordings[1], 5e-5), (recordings[2], -2e-5)):
        for rows in recording.lanes:
            first = int(rows["wait_begin"][0])
            for name in ("send_begin", "send_end", "wait_begin", "wait_end"):
                times = rows[name].astype(np.int64)
                rows[name] = times + ((times - first) * drift).astype(np.int64)
    # By the end the clocks of the ranks are 20 us and 8 us away from where they began.
    for one, other in zip(together.recordings, build(recordings).recordings, strict=True):
        error = one.lanes[0]["wait_end"].astype(np.int64) - other.lanes[0]["wait_end"]
        assert abs(error).max() < 1 * US


def test_instances_of_one_device_have_one_clock() -> None:
    recordings = Pipeline([20, 20], [30, 30], num_lanes=1).record()
    on_one = [replace(each, shape=replace(each.shape, device="cpu")) for each in recordings]
    for before, after in zip(recordings, build(on_one).recordings, strict=True):
        apart = before.lanes[0]["wait_end"] - after.lanes[0]["wait_end"]
        assert (apart == 1 * US).all()  # when the first wait began; that is time 0


def test_the_summary_says_where_the_time_goes() -> None:
    summary = summarise(build(Pipeline([20, 20], [30, 30], clocks_ns=CLOCKS).record()))
    attention, ffn = summary["instances"]["attention 0"], summary["instances"]["ffn 1"]
    assert attention["stages_us"]["attention"] == pytest.approx(20, abs=0.1)
    assert attention["stages_us"]["send"] == pytest.approx(2, abs=0.1)
    # The way there, 30 of the experts, 3 of their push, and the way back.
    assert attention["stages_us"]["wait"] == pytest.approx(5.5 + 33 + 5.7, abs=1)
    assert ffn["stages_us"]["ffn"] == pytest.approx(30, abs=0.1)
    assert sum(attention["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert summary["transfer_us"]["a2f"] == pytest.approx(5.5, abs=0.7)
    assert summary["transfer_us"]["f2a"] == pytest.approx(5.5, abs=0.7)
    assert summary["straggler"] is None or summary["straggler"]["share"] < 0.8


@pytest.mark.parametrize(
    ("attention", "ffn", "name"),
    [([20, 20], [30, 45], "ffn 1"), ([35, 20], [30, 30], "attention 0")],
)
def test_the_summary_names_who_is_late(attention: list[float], ffn: list[float], name: str) -> None:
    summary = summarise(build(Pipeline(attention, ffn, clocks_ns=CLOCKS).record()))
    assert summary["straggler"] == {"name": name, "share": pytest.approx(1, abs=0.05)}
    assert f"{name} is the last that others wait for" in describe(summary)


def test_a_ring_is_put_in_order_and_its_torn_rows_left_out() -> None:
    (recording, *_) = Pipeline([20], [30], num_lanes=1).record()
    rows = recording.lanes[0]
    ring = np.zeros(12, dtype=ROW)
    for row in rows:
        ring[int(row["frame"]) % 12] = row
    newest = int(rows["frame"][-1])
    torn = ring[(newest + 1) % 12]
    torn["frame"], torn["send_begin"] = newest + 1, int(rows["wait_end"][-1]) + 5
    torn["send_end"] = int(torn["send_begin"]) + 1  # sent, not yet answered
    found = Recording.of_rings(recording.shape, [ring]).lanes[0]
    assert found["frame"].tolist() == list(range(newest - 10, newest + 1))


def test_recordings_that_began_and_ended_apart_are_matched_from_their_ends() -> None:
    recordings = Pipeline([20], [30], num_lanes=1, clocks_ns=CLOCKS).record()
    recordings[1] = Recording(recordings[1].shape, [recordings[1].lanes[0][7:]])
    (exchange,) = build(recordings).exchanges
    assert exchange.attention["frame"].tolist() == exchange.ffn["frame"].tolist()
    assert len(exchange.ffn) == LAYERS * 6 - 7


def test_a_source_that_sat_steps_out_is_matched_to_those_it_was_in() -> None:
    source, rank = Pipeline([20], [30], num_lanes=1).record()
    rows = rank.lanes[0].copy()
    others = np.zeros(LAYERS, dtype=ROW)  # a step of somebody else's, before the last two
    for place in range(LAYERS):
        others[place] = rows[20]
    others["participants"] = 2
    rows = np.concatenate([rows[:20], others, rows[20:]])
    rows["frame"] = np.arange(len(rows))
    (exchange,) = build([source, Recording(rank.shape, [rows])]).exchanges
    assert len(exchange.ffn) == len(source.lanes[0])
    assert (exchange.ffn["wait_end"] > exchange.attention["send_end"]).all()


def saved(directory: Path) -> Path:
    for recording in Pipeline([20, 20], [30, 45], clocks_ns=CLOCKS).record():
        recording.save(directory)
    return directory


def test_recordings_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = Pipeline([20, 20], [30, 45], clocks_ns=CLOCKS).record()
    read = load_all(saved(tmp_path))
    assert [each.name for each in read] == ["attention 0", "attention 1", "ffn 0", "ffn 1"]
    for one, other in zip(written, read, strict=True):
        assert one.shape == other.shape
        for left, right in zip(one.lanes, other.lanes, strict=True):
            assert np.array_equal(left, right)


def test_files_that_are_no_recordings_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "ffn-1.npz").unlink()
    with pytest.raises(InvalidArgument, match="its deployment is"):
        load_all(tmp_path)
    (tmp_path / "ffn-1.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InvalidArgument, match="is not a recording"):
        load_all(tmp_path)
    np.savez(tmp_path / "ffn-1.npz", meta=np.array([{}], dtype=object))
    with pytest.raises(InvalidArgument, match="is not a recording"):
        load_all(tmp_path)
    with pytest.raises(InvalidArgument, match="holds no recordings, or does not exist"):
        load_all(tmp_path / "nothing")


def test_recordings_of_another_run_are_told_from_missing_ones(tmp_path: Path) -> None:
    saved(tmp_path)  # of 2A2F
    for recording in Pipeline([20], [30], num_lanes=1).record():
        recording.save(tmp_path)
    with pytest.raises(InvalidArgument, match="Remove what other runs have left"):
        load_all(tmp_path)


def test_a_source_that_had_no_work_is_in_nobodys_way(tmp_path: Path) -> None:
    # One request at a time: the second attention instance never sent a row.
    source, first, second = Pipeline([20], [30, 45], clocks_ns=CLOCKS).record()
    idle = replace(source.shape, rank=1)
    recordings = [
        source,
        Recording(idle, [rows[:0] for rows in source.lanes]),
        *(replace(each, shape=replace(each.shape, num_sources=2)) for each in (first, second)),
    ]
    timeline = build(recordings)
    summary = summarise(timeline)
    assert summary["last_source"] == {"attention 0": 1.0}
    assert summary["straggler"]["name"] == "ffn 1"
    assert "attention 1: had no work" in describe(summary)
    assert perfetto.write(timeline, tmp_path / "out.pftrace") > 0
    with pytest.raises(InvalidArgument, match="No attention instance has recorded"):
        build(recordings[1:])


def test_a_perfetto_trace_has_every_layer_and_arrows_both_ways(tmp_path: Path) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

    out = tmp_path / "out.pftrace"
    timeline = build(Pipeline([20, 20], [30, 45], clocks_ns=CLOCKS).record())
    num_slices = perfetto.write(timeline, out)
    trace = Trace.FromString(out.read_bytes())
    names = [packet.track_descriptor.name for packet in trace.packet]
    assert names.count("lane 1") == 4
    events = [packet.track_event for packet in trace.packet if packet.HasField("track_event")]
    begins = [each for each in events if each.type == TrackEvent.TYPE_SLICE_BEGIN]
    assert len(begins) == num_slices == len(events) // 2
    frames = LAYERS * 6 * 2  # of both lanes
    assert sum(each.name == "ffn" for each in begins) == 2 * frames
    flows = [flow for each in begins for flow in each.flow_ids]
    # There for each of 2 x 2 pairs, and back but for a lane's last layer, which starts nothing.
    assert len(set(flows)) == 4 * (2 * frames - 2)
    assert all(flows.count(flow) == 2 for flow in set(flows))
    for uuid in {each.track_uuid for each in events}:
        on_track = [packet for packet in trace.packet if packet.track_event.track_uuid == uuid]
        times = [packet.timestamp for packet in on_track if packet.HasField("track_event")]
        assert times == sorted(times), "slices of a track do not overlap"


def test_both_ends_of_an_arrow_are_of_one_layer_after_a_step_that_was_cut_short(
    tmp_path: Path,
) -> None:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

    # Two layers of a step were answered when its source died: the rank counts on from there, and
    # the source that took the place from 0.
    source, rank = Pipeline([20], [30], num_lanes=1).record()
    rank.lanes[0]["frame"] += 2
    out = tmp_path / "out.pftrace"
    perfetto.write(build([source, rank]), out)
    arrows: dict[int, list[tuple[str, int]]] = {}
    for packet in Trace.FromString(out.read_bytes()).packet:
        event = packet.track_event
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            [layer] = [note.uint_value for note in event.debug_annotations if note.name == "layer"]
            for flow in event.flow_ids:
                arrows.setdefault(flow, []).append((event.name, layer))
    there = [dict(ends) for ends in arrows.values() if "ffn" in dict(ends)]
    back = [dict(ends) for ends in arrows.values() if "ffn" not in dict(ends)]
    assert len(there) == LAYERS * 6
    assert all(ends["send"] == ends["ffn"] for ends in there)
    for ends in back:
        [(name, layer)] = [(name, layer) for name, layer in ends.items() if name != "send"]
        assert layer == (ends["send"] + 1) % LAYERS
        assert (name == "attention") == (layer != 0)


def test_the_command_prints_and_converts(tmp_path: Path) -> None:
    directory, out = saved(tmp_path / "recordings"), tmp_path / "out.pftrace"

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "step3rt", "trace", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    summary = run("summary", str(directory), "--json")
    assert json.loads(summary.stdout)["straggler"]["name"] == "ffn 1"
    assert "ffn 1 is the last" in run("summary", str(directory)).stdout
    assert "ui.perfetto.dev" in run("convert", str(directory), str(out)).stdout
    assert out.stat().st_size > 10_000
    missing = run("summary", str(tmp_path / "nothing"))
    assert (missing.returncode, missing.stdout) == (2, "")
    unwritable = run("convert", str(directory), str(tmp_path / "nowhere" / "out.pftrace"))
    assert unwritable.returncode == 2
    assert "cannot be written: No such file or directory" in unwritable.stderr
    assert "Traceback" not in unwritable.stderr


def test_the_format_is_the_one_that_instances_write() -> None:
    from step3rt.ops.afd_slots import AFD_TRACE_ROW

    assert ROW == AFD_TRACE_ROW
