"""Where the jitter of steps comes from, of steps whose times at each point are known."""

import random
from array import array

import numpy as np
import pytest

from step3rt.bench.decode_client import TokenTimes
from step3rt.bench.decode_path import LaneStep, client_tpot_ms, jitter_ms, path_report
from step3rt.trace.step_times import Rows, StepTimes

MS = 1_000_000
STEP_MS = 40.0
NUM_STEPS = 400
CLOCKS_APART_NS = 7 * 10**12
"""The coordinator's clock began so much later than the host's."""


def every(steps: int, late_ms: float, at: int) -> list[float]:
    """Milliseconds by which each step is late: one in `steps` of them by `late_ms`."""
    return [late_ms if step % steps == at else 0.0 for step in range(NUM_STEPS)]


class Cluster:
    """Two lanes of one instance, 10 ms apart, with two streams each."""

    def __init__(self, seen_late: list[float], told_late: list[float]) -> None:
        self.steps: list[LaneStep] = []
        times = StepTimes()
        draw = random.Random(1)  # no two spans of real steps are equally long
        ends: dict[tuple[int, int], tuple[int, int, int]] = {}
        for step in range(NUM_STEPS):
            for lane in (0, 1):
                over = CLOCKS_APART_NS + round((STEP_MS * step + 10 * lane) * MS)
                seen = over + round(seen_late[step] * MS) + lane
                told = seen + round((0.6 + told_late[step]) * MS) + draw.randrange(1000)
                took = seen - ends.get((lane, step - 1), (seen - int(STEP_MS * MS), 0, 0))[0]
                ends[lane, step] = seen, told, took
                device = int(STEP_MS * MS) if step else 0
                looks = (seen - MS // 20, seen, seen + MS // 10)
                times.add((lane, step, over, over + 2 * MS, took, device, *looks))
                at = told - CLOCKS_APART_NS
                self.steps.append(LaneStep(4, lane, at, 2, took, 0, took, step))
        self.hosts: list[Rows] = [times.rows()]
        self.streams = []
        for lane, first in ((0, 0), (0, 3), (1, 1), (1, 2)):
            told = [ends[lane, step][1] for step in range(first, NUM_STEPS - 5)]
            at = array("q", [each + (first + 1) * MS // 10 for each in told])
            self.streams.append(TokenTimes(at, told[-1] - told[0]))

    def lanes(self) -> list[list[LaneStep]]:
        """Steps in which all streams decode."""
        lanes = [[step for step in self.steps if step.lane == lane] for lane in (0, 1)]
        return [lane[10 : NUM_STEPS - 10] for lane in lanes]


def test_jitter_shows_at_the_point_where_it_begins_and_at_those_behind_it() -> None:
    cluster = Cluster(every(40, 0.3, 5), every(30, 0.5, 20))
    report = path_report(cluster.lanes(), cluster.steps, cluster.hosts, cluster.streams)
    assert list(report) == [
        "device", "seen", "reported", "coordinator", "first_token", "last_token", "launch_ms",
        "lanes_apart_ms",
    ]  # fmt: skip
    assert report["device"] == {"jitter_ms": 0.0, "jitter_about_trend_ms": 0.0}
    for name in ("seen", "reported"):
        assert report[name]["jitter_ms"] == pytest.approx(0.3, abs=0.01), name
    for name in ("coordinator", "first_token", "last_token"):
        assert report[name]["jitter_ms"] == pytest.approx(0.5, abs=0.01), name
    assert report["seen"]["after_ms"] == {"p50": 0.05, "p99": 0.05, "max": 0.05}
    assert report["reported"]["after_ms"] == {"p50": 0.1, "p99": 0.1, "max": 0.1}
    for share, late in (("p50", 0.0), ("p99", 0.5), ("max", 0.5)):
        assert report["coordinator"]["after_ms"][share] == pytest.approx(late, abs=2e-3)
    # The streams of lane 0 are 0.3 ms apart, those of lane 1 0.1 ms.
    assert report["last_token"]["after_ms"]["max"] == pytest.approx(0.3, abs=1e-3)
    assert report["launch_ms"] == {"p50": 2.0, "p99": 2.0, "max": 2.0}
    assert report["lanes_apart_ms"]["p50"] == pytest.approx(10, abs=0.01)


def test_streams_are_matched_with_their_lanes() -> None:
    late = np.random.default_rng(3).uniform(0, 0.4, NUM_STEPS).tolist()
    cluster = Cluster(late, every(1000, 0, 0))
    found = client_tpot_ms(cluster.lanes(), cluster.steps, cluster.streams)
    assert len(found) == 4 * (len(cluster.lanes()[0]) - 1)
    gaps = [np.diff([step.at_ns for step in lane]) / 1e6 for lane in cluster.lanes()]
    assert np.sort(found) == pytest.approx(np.sort(np.concatenate([*gaps, *gaps])))
    # Of a stream that broke off the coordinator says nothing.
    for stream in cluster.streams:
        stream.decode_ns = 0
    assert len(client_tpot_ms(cluster.lanes(), cluster.steps, cluster.streams)) == 0


def test_a_cluster_whose_instances_note_nothing_has_the_points_outside_them() -> None:
    cluster = Cluster(every(40, 0.3, 5), every(30, 0.5, 20))
    report = path_report(cluster.lanes(), cluster.steps, [], cluster.streams)
    assert list(report) == ["coordinator", "first_token", "last_token"]
    assert "after_ms" not in report["coordinator"]
    assert path_report(cluster.lanes(), cluster.steps, [], [])["coordinator"]["jitter_ms"] > 0


def test_jitter_about_the_trend_is_without_what_all_steps_share() -> None:
    growing = [np.arange(500) * 0.01, 3 + np.arange(500) * 0.02]
    found = jitter_ms(growing)
    assert found["jitter_ms"] > 4
    assert found["jitter_about_trend_ms"] == pytest.approx(0, abs=1e-3)
    assert jitter_ms([np.array([np.nan])]) == {}
