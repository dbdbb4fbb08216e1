"""Stages and bubbles of simulated pipelines with known times."""

from dataclasses import replace

import numpy as np
import pytest

from step3rt.errors import Unavailable
from step3rt.trace.recording import ROW, Recording, Shape
from step3rt.trace.stages import SteadyState, steady_state
from step3rt.trace.timeline import build
from tests.unit.test_trace import CLOCKS, LAYERS, US, Pipeline


def stages_of(recordings: list[Recording], max_steps: int = 100) -> SteadyState:
    return steady_state(build(recordings), max_steps)


def test_one_lane_owns_its_gpu_and_waits_for_the_rest() -> None:
    found = stages_of(Pipeline([20], [30], num_lanes=1, clocks_ns=CLOCKS).record())
    for stage, us in (("attention", 20), ("ffn", 30), ("a2f", 2), ("f2a", 3)):
        time = found.stages[stage]
        assert (time.own_us, time.elapsed_us) == pytest.approx((us, us), abs=0.1), stage
    # Stores and way there, stores and way back: 2 + 5.5 + 3 + 5.5.
    assert found.transfer_us == pytest.approx(16, abs=0.5)
    period_us = 20 + 30 + 16
    assert found.bubbles["attention 0"] == pytest.approx(1 - 22 / period_us, abs=0.02)
    assert found.bubbles["ffn 0"] == pytest.approx(1 - 33 / period_us, abs=0.02)
    assert found.wait_us["attention"] == pytest.approx(period_us - 22, abs=0.5)
    assert found.wait_us["ffn"] == pytest.approx(period_us - 33, abs=0.5)
    assert found.stages["head"].own_us == pytest.approx(0, abs=0.1)
    assert found.step_ms == pytest.approx(LAYERS * period_us / 1e3, rel=0.02)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-3)
    assert found.shares["wait"] == pytest.approx(sum(found.bubbles.values()) / 2, abs=1e-3)


def lane_of(
    frames: int, period_us: float, work_us: float, first_us: float, rows: int
) -> np.ndarray:
    """An attention lane that works `work_us` of every `period_us`, the sends included."""
    lane = np.zeros(frames, dtype=ROW)
    begin = first_us + period_us * np.arange(frames)
    lane["frame"] = np.arange(frames)
    lane["send_begin"] = (begin + work_us - 1) * US
    lane["send_end"] = (begin + work_us) * US
    lane["wait_begin"] = lane["send_end"]
    lane["wait_end"] = (begin + period_us) * US
    lane["participants"], lane["num_rows"] = 1, rows
    return lane


def rank_of(source: np.ndarray, ffn_us: float) -> np.ndarray:
    """What an FFN instance noted that answered `source` after `ffn_us`."""
    lane = source.copy()
    lane["wait_begin"] = source["send_begin"] - 5 * US
    lane["wait_end"] = source["send_end"] + 2 * US
    lane["send_begin"] = source["send_end"] + np.uint64((2 + ffn_us) * US)
    lane["send_end"] = source["send_end"] + np.uint64((3 + ffn_us) * US)
    return lane


SHAPES = [Shape("attention", 0, LAYERS, 1, 1), Shape("ffn", 0, LAYERS, 1, 1)]


def recordings_of(sources: list[np.ndarray], ffn_us: float) -> list[Recording]:
    ranks = [rank_of(source, ffn_us) for source in sources]
    return [Recording(SHAPES[0], sources), Recording(SHAPES[1], ranks)]


def test_lanes_that_work_at_once_share_the_gpu() -> None:
    # Both work 40 of 100 us; the second begins 20 us later: half of each is alone, half is shared.
    sources = [lane_of(50, 100, 40, first, 8) for first in (100, 120)]
    found = stages_of(recordings_of(sources, ffn_us=10))
    attention = found.stages["attention"]
    assert attention.elapsed_us == pytest.approx(39, abs=0.01)
    # The last 1 us of lane 0 is a send, and of lane 1 alone.
    assert attention.own_us == pytest.approx((20 + 19 / 2 + 19.5 / 2 + 0.25 + 19) / 2, abs=0.3)
    assert found.bubbles["attention 0"] == pytest.approx(0.4, abs=0.01)
    assert found.stages["ffn"].own_us == pytest.approx(10, abs=0.01)
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-3)


def test_instances_of_one_gpu_are_one_gpu() -> None:
    parts = recordings_of([lane_of(50, 100, 40, 100, 8)], ffn_us=30)
    devices = [replace(each, shape=replace(each.shape, device="cuda:0")) for each in parts]
    found = stages_of(devices)
    assert list(found.bubbles) == ["attention 0 + ffn 0"]
    # 40 of attention and its sends, 30 of experts and 1 of their sends.
    assert found.bubbles["attention 0 + ffn 0"] == pytest.approx(0.29, abs=0.01)
    on_cpu = [replace(each, shape=replace(each.shape, device="cpu")) for each in parts]
    assert list(stages_of(on_cpu).bubbles) == ["attention 0", "ffn 0"]


def test_steps_without_all_rows_do_not_count() -> None:
    ramp, steady, end = (
        lane_of(20, 100, work, 100, rows) for work, rows in ((20, 3), (40, 8), (25, 7))
    )
    lanes = []
    for index, part in enumerate((ramp, steady, end)):
        moved = part.copy()
        moved["frame"] += 20 * index
        for name in ("send_begin", "send_end", "wait_begin", "wait_end"):
            moved[name] += np.uint64(2000 * US * index)
        lanes.append(moved)
    source = np.concatenate(lanes)
    found = stages_of(recordings_of([source], ffn_us=10))
    assert found.stages["attention"].own_us == pytest.approx(39, abs=0.01)
    assert found.num_steps == pytest.approx(20 / LAYERS, abs=0.11)
    last_two = stages_of(recordings_of([source], ffn_us=10), max_steps=2)
    assert last_two.num_steps == pytest.approx(2, abs=0.11)


def test_steps_are_counted_from_when_the_first_lane_ends() -> None:
    # The second lane goes on for 10 steps: its last two are long after the first one's.
    sources = [lane_of(frames, 100, 40, 100, 8) for frames in (10 * LAYERS, 20 * LAYERS)]
    found = stages_of(recordings_of(sources, ffn_us=10), max_steps=2)
    assert found.num_steps == pytest.approx(2, abs=0.11)
    assert found.stages["attention"].elapsed_us == pytest.approx(39, abs=0.01)


def test_lanes_that_were_never_full_together_have_no_steady_state() -> None:
    sources = [lane_of(20, 100, 40, first, 8) for first in (100, 50_000)]
    with pytest.raises(Unavailable, match="at the same time"):
        stages_of(recordings_of(sources, ffn_us=10))
