"""One timeline of all instances of a deployment: whose frame answers whose, and on one clock.

Owns the matching of frames and the alignment of clocks; draws and sums nothing.

An FFN instance's frame serves all sources that took part in it. So the frames of source a are, in
their order, the frames of rank f that a took part in. Both recordings end when the instances were
idle: they are matched from their ends.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from step3rt.errors import InvalidArgument
from step3rt.trace.recording import TIMES, Recording

Rows = npt.NDArray[np.void]

_MAX_PARTS = 8
_FRAMES_OF_PART = 500
"""Among so many frames one goes there, and one back, about as fast as any."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Matched frames of a source and a rank on one lane; row i of both is the same layer.

    `attention` and `ffn`: rows of the recordings, times on the common clock.
    """

    lane: int
    source: int
    rank: int
    attention: Rows
    ffn: Rows


@dataclass(frozen=True, slots=True)
class Timeline:
    """All recordings with their times on one clock, in nanoseconds from the first event.

    `exchanges`: what was matched, by lane, source and rank.
    """

    recordings: list[Recording]
    exchanges: list[Exchange]


@dataclass(frozen=True, slots=True)
class _Apart:
    """How far a clock is ahead of another one: by `offset_ns` when it shows `at_ns`.

    `drift`: by how much more for each nanosecond that it goes on.
    """

    offset_ns: int
    at_ns: int
    drift: float

    def reversed(self) -> "_Apart":
        """The other clock, ahead of this one."""
        return _Apart(-self.offset_ns, self.at_ns - self.offset_ns, -self.drift)

    def subtracted_from(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What the other clock shows at those times of this one."""
        drifted = np.rint(self.drift * (times - self.at_ns)).astype(np.int64)
        moved: npt.NDArray[np.int64] = times - self.offset_ns - drifted
        return moved


_SAME = _Apart(0, 0, 0.0)


def build(recordings: list[Recording]) -> Timeline:
    """Matches frames and aligns clocks.

    Instances on the same device have the same clock. Two others are apart by half of the difference
    between the fastest way there and the fastest way back, since the fastest ways take equally
    long; in long recordings of GPUs by more and more, or less and less, as one of them is faster.

    One that nobody had work for has no frames, and is late for none.

    Raises:
        InvalidArgument: two instances that are linked and had work have no common frame.
    """
    busy = [each for each in recordings if any(len(rows) for rows in each.lanes)]
    attention = [each for each in busy if each.shape.role == "attention"]
    ffn = [each for each in busy if each.shape.role == "ffn"]
    if not attention or not ffn:
        role = "FFN" if attention else "attention"
        raise InvalidArgument(
            f"No {role} instance has recorded a whole layer. A timeline is of layers that were "
            "sent and answered. Record again, with more steps"
        )
    for each in ffn:
        _check_common(attention[0], each)
    for source in attention[1:]:
        _check_common(source, ffn[0])
    # By clock: how to bring what it shows to the first instance's.
    clocks = {_clock_of(attention[0]): [_SAME]}
    for each in ffn:
        if _clock_of(each) not in clocks:
            clocks[_clock_of(each)] = [_apart(attention[0], each)]
    for source in attention[1:]:
        if _clock_of(source) not in clocks:
            there = _apart(source, ffn[0]).reversed()
            clocks[_clock_of(source)] = [there, *clocks[_clock_of(ffn[0])]]
    aligned = [_moved(each, clocks.get(_clock_of(each), [_SAME])) for each in recordings]
    begin = min(first for each in aligned for first in _first_times(each))
    moved = [_moved(each, [_Apart(begin, 0, 0.0)]) for each in aligned]
    exchanges = [
        exchange
        for source in moved
        for rank in moved
        if (source.shape.role, rank.shape.role) == ("attention", "ffn")
        for exchange in _exchanges(source, rank)
    ]
    return Timeline(moved, exchanges)


def layer_of(rows: Rows, num_layers: int) -> npt.NDArray[np.int64]:
    """Returns which layer each row is."""
    return rows["frame"].astype(np.int64) % num_layers


def _exchanges(source: Recording, rank: Recording) -> list[Exchange]:
    found = []
    bit = np.uint64(1 << source.shape.rank)
    for lane, (sent, served) in enumerate(zip(source.lanes, rank.lanes, strict=True)):
        common = served[(served["participants"] & bit) != 0]
        length = min(len(sent), len(common))
        found.append(
            Exchange(
                lane,
                source.shape.rank,
                rank.shape.rank,
                sent[len(sent) - length :],
                common[len(common) - length :],
            )
        )
    return found


def _clock_of(recording: Recording) -> str:
    """Instances of a host's CPU have one clock, those of a GPU have its own."""
    return recording.shape.device or recording.name


def _check_common(source: Recording, rank: Recording) -> None:
    if not any(len(exchange.ffn) for exchange in _exchanges(source, rank)):
        raise InvalidArgument(
            f"{source.name} and {rank.name} have recorded no common layer. Their recordings are of "
            "different runs, or too short. Record again, with more --trace-steps"
        )


def _apart(source: Recording, rank: Recording) -> _Apart:
    """The rank's clock, ahead of the source's; they have common frames."""
    at, there, back = [], [], []
    for exchange in _exchanges(source, rank):
        a, f = _times(exchange.attention), _times(exchange.ffn)
        at.append(f["send_end"])
        there.append(f["wait_end"] - a["send_end"])
        back.append(a["wait_end"] - f["send_end"])
    times, ways, ways_back = (np.concatenate(each) for each in (at, there, back))
    order = np.argsort(times)
    parts = np.array_split(order, max(1, min(_MAX_PARTS, len(order) // _FRAMES_OF_PART)))
    offsets = [(int(ways[part].min()) - int(ways_back[part].min())) // 2 for part in parts]
    middles = [int(times[part[len(part) // 2]]) for part in parts]
    if len(parts) == 1:
        return _Apart(offsets[0], middles[0], 0.0)
    drift, offset = np.polyfit(
        np.array([middle - middles[0] for middle in middles], dtype=np.float64),
        np.array([offset - offsets[0] for offset in offsets], dtype=np.float64),
        1,
    )
    return _Apart(offsets[0] + round(float(offset)), middles[0], float(drift))


def _times(rows: Rows) -> dict[str, npt.NDArray[np.int64]]:
    return {name: rows[name].astype(np.int64) for name in TIMES}


def _first_times(recording: Recording) -> list[int]:
    return [int(rows[name][0]) for rows in recording.lanes if len(rows) for name in TIMES]


def _moved(recording: Recording, clocks: list[_Apart]) -> Recording:
    lanes = []
    for rows in recording.lanes:
        moved = rows.copy()
        for name, times in _times(rows).items():
            for clock in clocks:
                times = clock.subtracted_from(times)
            moved[name] = times
        lanes.append(moved)
    return Recording(recording.shape, lanes, recording.group_rows)
