"""The figures of a decode bench by the coordinator's log: throughput, TPOT and jitter."""

import json
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from step3rt.bench.decode_load import DecodeLoad
from step3rt.bench.decode_path import LaneStep
from step3rt.errors import Unavailable
from step3rt.timing import percentile

_STEP_LINE = "step done"


def read_steps(lines: Sequence[str]) -> list[LaneStep]:
    """The lane steps in a coordinator's log with JSON lines, as they were done."""
    steps = []
    for line in lines:
        if _STEP_LINE not in line:
            continue
        values = json.loads(line)["fields"]
        if values.get("message") == _STEP_LINE:
            steps.append(LaneStep(*(int(values[name]) for name in LaneStep.__slots__)))
    return steps


def summarise(
    steps: Sequence[LaneStep], load: DecodeLoad, num_lanes: int, num_layers: int
) -> dict[str, Any]:
    """The figures over the window in which every sequence decodes.

    TPOT is the time from one step of a lane to its next, once for each token of it.

    Raises:
        Unavailable: some lane has fewer such steps than `load.steps`.
    """
    lanes = measured_lanes(steps, load, num_lanes)
    gaps_ms = [
        ((after.at_ns - before.at_ns) / 1e6, after.num_tokens)
        for lane in lanes
        for before, after in pairwise(lane)
    ]
    weighted = [gap for gap, num_tokens in gaps_ms for _ in range(num_tokens)]
    # Each lane's own rate: lanes do not begin and end together.
    tokens_per_s = sum(
        sum(step.num_tokens for step in lane[1:]) * 1e9 / (lane[-1].at_ns - lane[0].at_ns)
        for lane in lanes
    )
    measured = [step for lane in lanes for step in lane[1:]]
    step_ms = quantiles([gap for gap, _ in gaps_ms])
    about_trend = quantiles([gap for lane in lanes for gap in _about_trend_ms(lane)])
    return {
        "steps": load.steps,
        "warmup_steps": load.warmup_steps,
        "tokens_per_s": round(tokens_per_s, 1),
        "tpot_ms": quantiles(weighted),
        "step_ms": step_ms,
        "jitter_ms": round(step_ms["p99"] - step_ms["p50"], 3),
        "jitter_about_trend_ms": round(about_trend["p99"] - about_trend["p50"], 3),
        "stages": {
            "attention": {"us": _per_layer_us(measured, "compute_ns", num_layers)},
            "wait": {"us": _per_layer_us(measured, "wait_ns", num_layers)},
            "lane_step": {"us": _per_layer_us(measured, "total_ns", num_layers)},
        },
    }


def measured_lanes(
    steps: Sequence[LaneStep], load: DecodeLoad, num_lanes: int
) -> list[list[LaneStep]]:
    """Lane by lane, the steps that are measured, behind the one from which they are timed.

    Raises:
        Unavailable: some lane has fewer such steps than `load.steps`.
    """
    lanes = [lane[load.warmup_steps :][: load.steps + 1] for lane in _full_steps(steps, load)]
    if len(lanes) < num_lanes or any(len(lane) <= load.steps for lane in lanes):
        lengths = [len(lane) for lane in lanes]
        raise Unavailable(
            f"Only {lengths} steps of {num_lanes} lanes had all their sequences. {load.steps} are "
            "needed after the warm-up. Measure fewer sequences, or more steps"
        )
    return lanes


def _about_trend_ms(lane: Sequence[LaneStep]) -> list[float]:
    """A lane's times from step to step, less the straight line on which contexts lengthen them."""
    gaps = [(after.at_ns - before.at_ns) / 1e6 for before, after in pairwise(lane)]
    if len(gaps) < 2:
        return [0.0] * len(gaps)
    slope, start = statistics.linear_regression(range(len(gaps)), gaps)
    return [gap - start - slope * index for index, gap in enumerate(gaps)]


def _full_steps(steps: Sequence[LaneStep], load: DecodeLoad) -> list[list[LaneStep]]:
    """Per lane, its steps from when all sequences of all lanes decode until the first one ends."""
    sequences: dict[tuple[int, int], int] = {}
    for step in steps:
        key = step.instance, step.lane
        sequences[key] = max(sequences.get(key, 0), step.num_tokens)
    if sum(sequences.values()) < load.batch:
        return []
    is_full = {key: False for key in sequences}
    lanes: dict[tuple[int, int], list[LaneStep]] = {key: [] for key in sequences}
    for step in steps:
        key = step.instance, step.lane
        is_full[key] = step.num_tokens == sequences[key]
        if all(is_full.values()):
            lanes[key].append(step)
        elif any(lanes.values()):
            break
    return list(lanes.values())


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum, to a thousandth."""
    shares = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}
    return {name: round(value or 0.0, 3) for name, value in shares.items()}


def _per_layer_us(steps: Sequence[LaneStep], name: str, num_layers: int) -> float:
    return round(statistics.fmean(getattr(step, name) for step in steps) / num_layers / 1e3, 2)
