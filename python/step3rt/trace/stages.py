"""What each stage of a layer costs, and how long GPUs stand idle, while all sequences decode.

Owns the figures of a steady state; `trace.summary` tells who is late. Lanes of one GPU share it, so
a stage has two times:

    elapsed   from its begin to its end in one lane, what other lanes do meanwhile included
    own       the GPU's time: where n lanes are at work at once, each has an n-th of it

A GPU's own times and its bubbles, when no lane of it is at work, add up to the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from step3rt.errors import Unavailable
from step3rt.trace.recording import Recording
from step3rt.trace.timeline import Rows, Timeline, layer_of

Times = npt.NDArray[np.float64]

_WORK = ("attention", "head", "a2f", "ffn", "f2a")


@dataclass(frozen=True, slots=True)
class StageTime:
    """Mean microseconds of one layer and micro-batch; of `head`, of one step and micro-batch."""

    own_us: float
    elapsed_us: float


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Figures over the time in which every lane of every attention instance has all its rows.

    Attributes:
        seconds: length of that time.
        num_steps: steps of a lane in it, the mean over lanes.
        stages: of `attention` (sums added, norms, attention, router), `head` (LM head, sampling,
            inputs of the next step), `a2f` (rows stored to the FFN instances), `ffn`, and `f2a`
            (sums added up and stored back).
        transfer_us: both ways of one layer, from the begin of the stores to their arrival.
        shares: of all GPUs' time, what each stage owns; `wait` is the rest, in which no lane is at
            work.
        wait_us: by role, mean wait of a lane in one layer.
        bubbles: by GPU, the share of the time in which no lane of it is at work; a GPU is named
            after its instances.
        step_ms: f64[S], from the end of a lane's last layer to that of its next step, by the
            device's own clock.
    """

    seconds: float
    num_steps: float
    stages: dict[str, StageTime]
    transfer_us: float
    shares: dict[str, float]
    wait_us: dict[str, float]
    bubbles: dict[str, float]
    step_ms: Times


def steady_state(timeline: Timeline, max_steps: int) -> SteadyState:
    """The figures of the last `max_steps` steps with all rows, or of as many as there are.

    Raises:
        Unavailable: there is no time in which all lanes have all their rows.
    """
    begin, end = _window(timeline, max_steps)
    own: dict[str, list[Times]] = {stage: [] for stage in _WORK}
    elapsed: dict[str, list[Times]] = {stage: [] for stage in _WORK}
    owned = dict.fromkeys(_WORK, 0.0)
    bubbles = {}
    for name, recordings in _by_gpu(timeline.recordings).items():
        work = {stage: _clipped(_spans(recordings, stage), begin, end) for stage in _WORK}
        clock = _SharedClock(np.concatenate(list(work.values())))
        bubbles[name] = round(1 - clock.busy_ns / (end - begin), 4)
        for stage, spans in work.items():
            # One that the edge of the window cuts is at work in it, but says no length.
            whole = spans[(spans[:, 0] > begin) & (spans[:, 1] < end)]
            own[stage].append(clock.own_ns(whole))
            owned[stage] += float(clock.own_ns(spans).sum()) / (end - begin)
            elapsed[stage].append(whole[:, 1] - whole[:, 0])
    stages = {
        stage: StageTime(_mean_us(own[stage]), _mean_us(elapsed[stage]))
        for stage in _WORK
        if any(len(each) for each in own[stage])
    }
    if "head" in stages and "attention" in stages:
        # The attention of a step's first layer lies in the span of the head.
        head = _less(stages["head"], stages["attention"])
        moved = owned["head"] * (1 - head.own_us / max(stages["head"].own_us, 1e-9))
        owned["head"] -= moved
        owned["attention"] += moved
        stages["head"] = head
    shares = {stage: share / len(bubbles) for stage, share in owned.items()}
    shares["wait"] = 1 - sum(shares.values())
    lanes = [lane for each in timeline.recordings for lane in each.lanes if _is_source(each)]
    num_layers = timeline.recordings[0].shape.num_layers
    num_frames = np.mean([_within(lane, begin, end).sum() for lane in lanes])
    return SteadyState(
        seconds=(end - begin) / 1e9,
        num_steps=round(float(num_frames) / num_layers, 1),
        stages=stages,
        transfer_us=_transfer_us(timeline, begin, end),
        shares={stage: round(share, 4) for stage, share in shares.items()},
        wait_us={role: _wait_us(timeline, role, begin, end) for role in ("attention", "ffn")},
        bubbles=bubbles,
        step_ms=np.concatenate([_step_ms(lane, num_layers, begin, end) for lane in lanes]),
    )


class _SharedClock:
    """One GPU's time, cut up among the spans that are at work at once."""

    def __init__(self, spans: Times) -> None:
        """`spans`: f64[N, 2], begins and ends in nanoseconds."""
        self._at, place = np.unique(spans, return_inverse=True)
        change = np.zeros(len(self._at), dtype=np.int64)
        place = place.reshape(spans.shape)
        np.add.at(change, place[:, 0], 1)
        np.add.at(change, place[:, 1], -1)
        active = np.cumsum(change)[:-1]
        length = np.diff(self._at)
        self.busy_ns = float(length[active > 0].sum())
        shares = np.where(active > 0, length / np.maximum(active, 1), 0.0)
        self._elapsed = np.concatenate([[0.0], np.cumsum(shares)]) if len(self._at) else self._at

    def own_ns(self, spans: Times) -> Times:
        """Each span's part of the time, of spans that the clock was made of."""
        places = np.searchsorted(self._at, spans)
        found: Times = self._elapsed[places[:, 1]] - self._elapsed[places[:, 0]]
        return found


def _window(timeline: Timeline, max_steps: int) -> tuple[float, float]:
    full = []
    for recording in timeline.recordings:
        if not _is_source(recording):
            continue
        for lane, rows in enumerate(recording.lanes):
            if not len(rows):
                raise Unavailable(
                    f"Lane {lane} of {recording.name} has recorded nothing. Its steps were not "
                    "among the last. Measure more steps"
                )
            full.append(rows[rows["num_rows"] == rows["num_rows"].max()])
    # Lanes neither begin nor end together: steps are counted from when the first one ends.
    end = min(float(rows["wait_end"][-1]) for rows in full)
    max_rows = max_steps * timeline.recordings[0].shape.num_layers
    kept = [rows[rows["wait_end"] <= end][-max_rows:] for rows in full]
    begin = max((float(rows["send_begin"][0]) if len(rows) else end) for rows in kept)
    if begin >= end:
        raise Unavailable(
            "No two lanes have all their rows at the same time in what was recorded. Stages are "
            "those of a steady state. Measure more steps"
        )
    return begin, end


def _is_source(recording: Recording) -> bool:
    return recording.shape.role == "attention"


def _by_gpu(recordings: Sequence[Recording]) -> dict[str, list[Recording]]:
    """Recordings of one GPU together; an instance that computes on a CPU is by itself."""
    groups: dict[str, list[Recording]] = {}
    for each in recordings:
        device = each.shape.device
        groups.setdefault(device if device.startswith("cuda") else each.name, []).append(each)
    return {" + ".join(each.name for each in group): group for group in groups.values()}


def _spans(recordings: Sequence[Recording], stage: str) -> Times:
    """f64[N, 2]: begins and ends of a stage in all lanes of one GPU."""
    found = [np.zeros((0, 2))]
    for recording in recordings:
        for rows in recording.lanes:
            if _is_source(recording):
                found.append(_source_spans(rows, recording.shape.num_layers, stage))
            elif stage == "ffn":
                found.append(_columns(rows, "wait_end", "send_begin"))
            elif stage == "f2a":
                found.append(_columns(rows, "send_begin", "send_end"))
    return np.concatenate(found)


def _source_spans(rows: Rows, num_layers: int, stage: str) -> Times:
    if stage == "a2f":
        return _columns(rows, "send_begin", "send_end")
    if stage not in ("attention", "head") or len(rows) < 2:
        return np.zeros((0, 2))
    between = np.stack([rows["wait_end"][:-1], rows["send_begin"][1:]], axis=1).astype(np.float64)
    is_first = layer_of(rows, num_layers)[1:] == 0
    chosen: Times = between[is_first if stage == "head" else ~is_first]
    return chosen


def _columns(rows: Rows, begin: str, end: str) -> Times:
    return np.stack([rows[begin], rows[end]], axis=1).astype(np.float64)


def _clipped(spans: Times, begin: float, end: float) -> Times:
    clipped = np.clip(spans, begin, end)
    return clipped[clipped[:, 1] > clipped[:, 0]]


def _within(rows: Rows, begin: float, end: float) -> npt.NDArray[np.bool_]:
    times = rows["send_end"].astype(np.float64)
    return (times >= begin) & (times <= end)


def _step_ms(rows: Rows, num_layers: int, begin: float, end: float) -> Times:
    kept = rows[_within(rows, begin, end)]
    ends = kept["wait_end"][layer_of(kept, num_layers) == num_layers - 1]
    times: Times = np.diff(ends.astype(np.float64)) / 1e6
    return times


def _less(step: StageTime, layer: StageTime) -> StageTime:
    """A head without the attention of the first layer, taken to be as long as others are."""
    own_us = max(0.0, round(step.own_us - layer.own_us, 2))
    return StageTime(own_us, max(own_us, round(step.elapsed_us - layer.elapsed_us, 2)))


def _mean_us(parts: Sequence[Times]) -> float:
    times = np.concatenate(parts)
    return round(float(times.mean()) / 1e3, 2) if len(times) else 0.0


def _wait_us(timeline: Timeline, role: str, begin: float, end: float) -> float:
    waits = []
    for recording in timeline.recordings:
        if recording.shape.role != role:
            continue
        for rows in recording.lanes:
            # A source's wait is launched behind its send; a rank's, behind its last push.
            spans = _columns(
                rows, "send_end" if _is_source(recording) else "wait_begin", "wait_end"
            )
            spans = spans[(spans[:, 0] >= begin) & (spans[:, 1] <= end)]
            waits.append(spans[:, 1] - spans[:, 0])
    return _mean_us(waits) if waits else 0.0


def _transfer_us(timeline: Timeline, begin: float, end: float) -> float:
    """Mean way there and mean way back, of those frames that another instance waited for.

    What is sent to a rank that is still at work arrives unseen; and only the last of several
    sources, or of several ranks, ends a wait.
    """
    there: dict[tuple[int, int, int], tuple[float, float]] = {}
    back: dict[tuple[int, int, int], tuple[float, float]] = {}
    for exchange in timeline.exchanges:
        sent, served = exchange.attention, exchange.ffn
        kept = _within(sent, begin, end)
        sent, served = sent[kept], served[kept]
        times = {
            name: (sent[name].astype(np.float64), served[name].astype(np.float64))
            for name in ("send_begin", "send_end", "wait_begin", "wait_end")
        }
        was_waiting = times["wait_begin"][1] < times["send_begin"][0]
        ways = np.where(was_waiting, times["wait_end"][1] - times["send_begin"][0], np.nan)
        for frame, at, way in zip(
            served["frame"].tolist(), times["send_end"][0], ways, strict=True
        ):
            key = exchange.lane, exchange.rank, frame
            there[key] = max(there.get(key, (at, way)), (at, way))
        ways = times["wait_end"][0] - times["send_begin"][1]
        for frame, at, way in zip(sent["frame"].tolist(), times["send_end"][1], ways, strict=True):
            key = exchange.lane, exchange.source, frame
            back[key] = max(back.get(key, (at, way)), (at, way))
    total = 0.0
    for ways_of in (there, back):
        known = np.array([way for _, way in ways_of.values() if not np.isnan(way)])
        total += float(known.mean()) / 1e3 if len(known) else 0.0
    return round(total, 2)
