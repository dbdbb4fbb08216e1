"""Where the time of a step goes, who is late, and what waits for whom.

Owns the figures; a picture of the same is `trace.perfetto`'s.
"""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from step3rt.trace.recording import Recording
from step3rt.trace.timeline import Exchange, Rows, Timeline, layer_of

Times = npt.NDArray[np.float64]


def summarise(timeline: Timeline) -> dict[str, Any]:
    """Means per layer in microseconds, shares of the lanes' time, and the stragglers.

    Returns:
        `instances`: per instance, `stages_us` of one layer and lane and `shares` of a lane's time.
        `transfer_us`: medians of the ways there and back, which no instance spends by itself.
        `last_rank` and `last_source`: how often each was the last that others waited for.
        `straggler`: the instance that is last most often, beyond its fair share; None if none is.
    """
    instances = {each.name: _instance(each) for each in timeline.recordings}
    last_rank, last_source = _last_ranks(timeline.exchanges), _last_sources(timeline.exchanges)
    return {
        "instances": instances,
        "transfer_us": _transfers(timeline.exchanges),
        "last_rank": last_rank,
        "last_source": last_source,
        "straggler": _straggler(last_rank, last_source),
    }


def describe(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = []
    for name, values in summary["instances"].items():
        stages = values["stages_us"].items()
        parts = [f"{stage} {us:.1f} us ({values['shares'][stage]:.0%})" for stage, us in stages]
        had_work = any(values["shares"].values())
        lines.append(f"{name}: {', '.join(parts) if had_work else 'had no work'}")
    ways = summary["transfer_us"]
    lines.append(f"transfer: there {ways['a2f']:.1f} us, back {ways['f2a']:.1f} us (medians)")
    if summary["straggler"] is None:
        lines.append("Nobody is late much more often than the others.")
    else:
        name, share = summary["straggler"]["name"], summary["straggler"]["share"]
        lines.append(f"{name} is the last that others wait for in {share:.0%} of the layers.")
    waits = {name: values["shares"]["wait"] for name, values in summary["instances"].items()}
    name = max(waits, key=lambda each: waits[each])
    lines.append(f"The largest bubble is {name}'s: each lane waits {waits[name]:.0%} of its time.")
    return "\n".join(lines)


def stage_times(recording: Recording) -> dict[str, Times]:
    """Every layer's time in each stage, in nanoseconds, over all lanes.

    An attention instance's `attention` is from the last layer's sums to this layer's rows; between
    steps, from the last layer to the first, it is `step`: head, sampling and embedding. An FFN
    instance's `ffn` is from the rows to the first sum that is sent back.
    """
    parts: dict[str, list[Times]] = {}

    def add(stage: str, times: Times) -> None:
        parts.setdefault(stage, []).append(times)

    for rows in recording.lanes:
        if recording.shape.role == "ffn":
            add("wait", _between(rows, "wait_begin", "wait_end"))
            add("ffn", _between(rows, "wait_end", "send_begin"))
            add("send", _between(rows, "send_begin", "send_end"))
            continue
        before = _less(rows["send_begin"][1:], rows["wait_end"][:-1])
        is_first = layer_of(rows, recording.shape.num_layers)[1:] == 0
        add("attention", before[~is_first])
        add("step", before[is_first])
        add("send", _between(rows, "send_begin", "send_end"))
        add("wait", _between(rows, "send_end", "wait_end"))
    return {stage: np.concatenate(times) for stage, times in parts.items()}


def _instance(recording: Recording) -> dict[str, Any]:
    times = stage_times(recording)
    total = sum(float(each.sum()) for each in times.values())
    return {
        "stages_us": {
            stage: round(float(each.mean()) / 1e3, 2) if len(each) else 0.0
            for stage, each in times.items()
        },
        "shares": {
            stage: round(float(each.sum()) / total, 4) if total else 0.0
            for stage, each in times.items()
        },
    }


def _transfers(exchanges: list[Exchange]) -> dict[str, float]:
    """A rank that was waiting saw the rows when they had come; one that was not says nothing."""
    there, back = [], []
    for exchange in exchanges:
        a, f = exchange.attention, exchange.ffn
        waited = f["wait_begin"] < a["send_begin"]
        there.append(_less(f["wait_end"], a["send_end"])[waited])
        back.append(_less(a["wait_end"], f["send_end"]))
    medians = {}
    for name, parts in (("a2f", there), ("f2a", back)):
        ways = np.concatenate(parts)
        medians[name] = round(float(np.median(ways)) / 1e3, 2) if len(ways) else 0.0
    return medians


def _last_ranks(exchanges: list[Exchange]) -> dict[str, float]:
    """Of all layers of all sources, how often each rank was the last to answer."""
    ends: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for exchange in exchanges:
        for frame, end in zip(
            exchange.attention["frame"].tolist(), exchange.ffn["send_end"].tolist(), strict=True
        ):
            key = exchange.lane, exchange.source, frame
            ends.setdefault(key, []).append((end, exchange.rank))
    return _shares("ffn", ends.values(), {each.rank for each in exchanges})


def _last_sources(exchanges: list[Exchange]) -> dict[str, float]:
    """Of all layers that rank 0 computed, how often each source was the last to send."""
    ends: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for exchange in exchanges:
        if exchange.rank != 0:
            continue
        for frame, end in zip(
            exchange.ffn["frame"].tolist(), exchange.attention["send_end"].tolist(), strict=True
        ):
            ends.setdefault((exchange.lane, frame), []).append((end, exchange.source))
    had_work = {each.source for each in exchanges if len(each.attention)}
    return _shares("attention", ends.values(), had_work)


def _shares(role: str, ends: Any, members: set[int]) -> dict[str, float]:
    counts = Counter(max(each)[1] for each in ends if len(each) == len(members))
    total = max(1, counts.total())
    return {f"{role} {member}": round(counts[member] / total, 4) for member in sorted(members)}


def _straggler(*groups: dict[str, float]) -> dict[str, Any] | None:
    """Who is last at least half as often again as if all were alike."""
    candidates = [
        (share * len(group), share, name)
        for group in groups
        for name, share in group.items()
        if len(group) > 1 and share * len(group) >= 1.5
    ]
    if not candidates:
        return None
    _, share, name = max(candidates)
    return {"name": name, "share": share}


def _between(rows: Rows, begin: str, end: str) -> Times:
    return _less(rows[end], rows[begin])


def _less(later: npt.NDArray[np.uint64], earlier: npt.NDArray[np.uint64]) -> Times:
    difference: Times = later.astype(np.float64) - earlier.astype(np.float64)
    return difference
