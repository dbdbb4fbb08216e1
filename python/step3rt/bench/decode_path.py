"""Where steps get their jitter: the same steps at each point between the device and the client.

Owns the matching of what the device, the instance, the coordinator and the client noted of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from step3rt.bench.decode_client import TokenTimes
from step3rt.trace.step_times import Rows

Times = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LaneStep:
    """One line of the coordinator's log: a lane's step that is done."""

    instance: int
    lane: int
    at_ns: int
    num_tokens: int
    compute_ns: int
    wait_ns: int
    total_ns: int
    step: int = 0


@dataclass(frozen=True, slots=True)
class _Points:
    """Of a lane's steps in their order, f64[S] each, milliseconds; NaN where it is not known.

    `device`: the step's length; `seen_after`: what passed since the look before.
    """

    device: Times
    seen_after: Times
    seen: Times
    reported: Times
    launch: Times
    coordinator: Times
    first_token: Times
    last_token: Times


def path_report(
    lanes: Sequence[Sequence[LaneStep]],
    steps: Sequence[LaneStep],
    hosts: Sequence[Rows],
    streams: Sequence[TokenTimes],
) -> dict[str, Any]:
    """The result's `path`: `jitter_ms` of the time from step to step at each point of its way.

    `after_ms` is how long a step took to a point from the one before. Between two processes it is
    counted from the fastest step's, as the coordinator's clock began when it did.

    Args:
        lanes: the measured steps, lane by lane.
        steps: all steps of the log.
        hosts: what the attention instances noted; none of those that note nothing.
        streams: what the client noted.
    """
    known = {
        (int(row["lane"]), int(row["step"]), int(row["took"])): row
        for rows in hosts
        for row in rows
    }
    spans = _token_spans(steps, streams)
    points = [_points(lane, known, spans) for lane in lanes]
    report: dict[str, Any] = {}
    _add(report, "device", [each.device[1:] for each in points])
    _add(report, "seen", _gaps([each.seen for each in points]))
    _add_after(report, "seen", [each.seen_after for each in points])
    _add(report, "reported", _gaps([each.reported for each in points]))
    _add_after(report, "reported", [each.reported - each.seen for each in points])
    _add(report, "coordinator", _gaps([each.coordinator for each in points]))
    way = _above_fastest([each.coordinator - each.reported for each in points])
    _add_after(report, "coordinator", way)
    _add(report, "first_token", _gaps([each.first_token for each in points]))
    way = _above_fastest([each.first_token - each.coordinator for each in points])
    _add_after(report, "first_token", way)
    _add(report, "last_token", _gaps([each.last_token for each in points]))
    _add_after(report, "last_token", [each.last_token - each.first_token for each in points])
    if "reported" in report:
        report["launch_ms"] = _quantiles(np.concatenate([each.launch for each in points]))
        report["lanes_apart_ms"] = _lanes_apart([each.seen for each in points])
    return {name: value for name, value in report.items() if value}


def client_tpot_ms(
    lanes: Sequence[Sequence[LaneStep]],
    steps: Sequence[LaneStep],
    streams: Sequence[TokenTimes],
) -> Times:
    """f64[T]: the time from token to token as the client sees it, over the measured steps."""
    measured = {
        (lane[0].instance, lane[0].lane): (lane[0].at_ns, lane[-1].at_ns) for lane in lanes if lane
    }
    found = [np.zeros(0)]
    for key, at_ns, first, times in _matched(steps, streams):
        begin, end = measured.get(key, (0, 0))
        chosen = (at_ns >= begin) & (at_ns <= end)
        found.append(np.diff(times[chosen[first : first + len(times)]]) / 1e6)
    return np.concatenate(found)


def jitter_ms(gaps: Sequence[Times]) -> dict[str, float]:
    """p99 - p50 of all lanes' times from step to step, as they are and about each lane's trend."""
    known = [each[~np.isnan(each)] for each in gaps]
    known = [each for each in known if len(each)]
    if not known:
        return {}
    rest = []
    for each in known:
        at = np.arange(len(each))
        line = np.polyfit(at, each, 1) if len(each) > 1 else np.array([0.0, each[0]])
        rest.append(each - np.polyval(line, at))
    raw, about = (np.quantile(np.concatenate(each), [0.5, 0.99]) for each in (known, rest))
    return {
        "jitter_ms": round(float(raw[1] - raw[0]), 3),
        "jitter_about_trend_ms": round(float(about[1] - about[0]), 3),
    }


def _matched(
    steps: Sequence[LaneStep], streams: Sequence[TokenTimes]
) -> list[tuple[tuple[int, int], Ints, int, Ints]]:
    """Of each stream: its lane, that lane's i64[S] times, the first one's place, its own times.

    The coordinator says how long a stream took, to the nanosecond, from one step of its lane to
    another: no other two are as far apart.
    """
    by_lane: dict[tuple[int, int], list[int]] = {}
    for step in steps:
        if step.num_tokens:
            by_lane.setdefault((step.instance, step.lane), []).append(step.at_ns)
    lanes = {key: np.array(at_ns, dtype=np.int64) for key, at_ns in by_lane.items()}
    found = []
    for stream in streams:
        times = np.array(stream.at_ns, dtype=np.int64)
        if len(times) < 2:
            continue
        for key, at_ns in lanes.items():
            apart = at_ns[len(times) - 1 :] - at_ns[: len(at_ns) - len(times) + 1]
            firsts = np.flatnonzero(apart == stream.decode_ns)
            if len(firsts) == 1:
                found.append((key, at_ns, int(firsts[0]), times))
                break
    return found


def _token_spans(
    steps: Sequence[LaneStep], streams: Sequence[TokenTimes]
) -> dict[tuple[int, int, int], tuple[int, int]]:
    """When a client had the first and the last token of a step, by instance, lane and `at_ns`."""
    spans: dict[tuple[int, int], tuple[Ints, Ints, Ints]] = {}
    for key, at_ns, first, times in _matched(steps, streams):
        if key not in spans:
            never = np.iinfo(np.int64).max
            spans[key] = (at_ns, np.full(len(at_ns), never), np.zeros(len(at_ns), dtype=np.int64))
        place = slice(first, first + len(times))
        _, firsts, lasts = spans[key]
        firsts[place] = np.minimum(firsts[place], times)
        lasts[place] = np.maximum(lasts[place], times)
    return {
        (*key, int(at)): (int(first), int(last))
        for key, columns in spans.items()
        for at, first, last in zip(*columns, strict=True)
        if last
    }


def _points(
    lane: Sequence[LaneStep],
    known: Mapping[tuple[int, int, int], np.void],
    spans: Mapping[tuple[int, int, int], tuple[int, int]],
) -> _Points:
    nan = float("nan")
    table = []
    for step in lane:
        row = known.get((step.lane, step.step, step.total_ns))
        host = [nan] * 5
        if row is not None:
            looked, seen = int(row["looked"]), int(row["seen"])
            host = [
                float(row["device"]) or nan,
                float(seen - looked) if looked else nan,
                float(seen),
                float(row["reported"]),
                float(row["launch_end"] - row["launch_begin"]),
            ]
        span = spans.get((step.instance, step.lane, step.at_ns), (nan, nan))
        table.append([*host, float(step.at_ns), *span])
    return _Points(*(np.array(table, dtype=np.float64).T / 1e6))


def _add(report: dict[str, Any], name: str, gaps: Sequence[Times]) -> None:
    report[name] = jitter_ms(gaps)


def _add_after(report: dict[str, Any], name: str, delays: Sequence[Times]) -> None:
    values = _quantiles(np.concatenate(delays)) if delays else {}
    if values:
        report[name]["after_ms"] = values


def _gaps(times: Sequence[Times]) -> list[Times]:
    return [np.diff(each) for each in times]


def _above_fastest(delays: Sequence[Times]) -> list[Times]:
    known = np.concatenate(delays) if delays else np.zeros(0)
    known = known[~np.isnan(known)]
    return [each - known.min() for each in delays] if len(known) else []


def _lanes_apart(ends: Sequence[Times]) -> dict[str, float]:
    """From the end of a lane's step to the nearest end of another lane's."""
    apart = [np.zeros(0)]
    for index, own in enumerate(ends):
        others = [each for other, each in enumerate(ends) if other != index]
        if not others:
            continue
        at = np.sort(np.concatenate(others))
        at = at[~np.isnan(at)]
        own = own[~np.isnan(own)]
        if not len(at):
            continue
        place = np.searchsorted(at, own).clip(1, len(at) - 1) if len(at) > 1 else np.zeros(1, int)
        apart.append(np.minimum(abs(own - at[place]), abs(own - at[place - 1])))
    return _quantiles(np.concatenate(apart), {"p1": 0.01, "p50": 0.5, "max": 1.0})


def _quantiles(values: Times, shares: Mapping[str, float] | None = None) -> dict[str, float]:
    values = values[~np.isnan(values)]
    shares = shares or {"p50": 0.5, "p99": 0.99, "max": 1.0}
    if not len(values):
        return {}
    found = np.quantile(values, list(shares.values()))
    return dict(zip(shares, found.round(3).tolist(), strict=True))
