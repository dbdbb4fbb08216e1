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

    `offsets_ns`: by instance name, what was subtracted from its clock. `exchanges`: what was
    matched, by lane, source and rank.
    """

    recordings: list[Recording]
    exchanges: list[Exchange]
    offsets_ns: dict[str, int]


def build(recordings: list[Recording]) -> Timeline:
    """Matches frames and aligns clocks.

    Two clocks are apart by half of the difference between the fastest way there and the fastest way
    back, since the fastest ways take equally long.

    Raises:
        InvalidArgument: two instances that are linked have no common frame.
    """
    attention = [each for each in recordings if each.shape.role == "attention"]
    ffn = [each for each in recordings if each.shape.role == "ffn"]
    offsets: dict[str, int] = {attention[0].name: 0}
    for each in ffn:
        offsets[each.name] = _apart_ns(attention[0], each)
    for source in attention[1:]:
        offsets[source.name] = offsets[ffn[0].name] - _apart_ns(source, ffn[0])
    begin = min(_first_ns(each) - offsets[each.name] for each in recordings)
    moved = [_moved(each, offsets[each.name] + begin) for each in recordings]
    exchanges = [
        exchange
        for source in moved[: len(attention)]
        for rank in moved[len(attention) :]
        for exchange in _exchanges(source, rank)
    ]
    return Timeline(moved, exchanges, {name: offset + begin for name, offset in offsets.items()})


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


def _apart_ns(source: Recording, rank: Recording) -> int:
    """The rank's clock less the source's."""
    there, back = [], []
    for exchange in _exchanges(source, rank):
        if len(exchange.attention):
            a, f = _times(exchange.attention), _times(exchange.ffn)
            there.append((f["wait_end"] - a["send_end"]).min())
            back.append((a["wait_end"] - f["send_end"]).min())
    if not there:
        raise InvalidArgument(
            f"{source.name} and {rank.name} have recorded no common layer. Their recordings are of "
            "different runs, or too short. Record again, with more --trace-steps"
        )
    return (int(min(there)) - int(min(back))) // 2


def _times(rows: Rows) -> dict[str, npt.NDArray[np.int64]]:
    return {name: rows[name].astype(np.int64) for name in TIMES}


def _first_ns(recording: Recording) -> int:
    firsts = [int(rows[name][0]) for rows in recording.lanes if len(rows) for name in TIMES]
    return min(firsts)


def _moved(recording: Recording, offset_ns: int) -> Recording:
    lanes = []
    for rows in recording.lanes:
        moved = rows.copy()
        for name, times in _times(rows).items():
            moved[name] = times - offset_ns
        lanes.append(moved)
    return Recording(recording.shape, lanes, recording.group_rows)
