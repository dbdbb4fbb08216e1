"""When a device attention instance looks for a lane's end, and what it puts off meanwhile."""

import time
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from step3rt.instance.device_loop import (
    APART_NS,
    CLOSE_LOOK_S,
    LOOK_S,
    MOVE_NS,
    MOVE_STEPS,
    DeviceLane,
    DeviceStepLoop,
    FlightStep,
)
from step3rt.instance.node import Outcome
from step3rt.ops.afd_ffn import DEFAULT_JOIN_WINDOW_NS

MS = 1_000_000
NOW_NS = 10**12


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: NOW_NS)


NOTHING = cast(Any, None)


def lane(index: int, ends_in_ms: float | None, step_ms: int = 40) -> DeviceLane:
    """A lane whose steps take `step_ms`, the one in flight until then; None: it has none."""
    found = DeviceLane(index, NOTHING, NOTHING, [])
    found.last_step_ns = step_ms * MS
    if ends_in_ms is not None:
        found.in_flight = deque([FlightStep(NOTHING, None, None, None)])
        found.last_end_ns = NOW_NS + round(ends_in_ms * MS) - found.last_step_ns
    return found


@pytest.mark.parametrize(
    ("own_ms", "other_ms", "waits"),
    [
        (20, 2, True),  # the other lane's end is near
        (20, -0.5, True),  # it is a little late
        (20, -5, False),  # nobody knows when it ends
        (20, 10, False),
        (20, None, False),
        (2, 2.5, False),  # its own next step is in a hurry, too
        (-5, 2, False),  # it may end at once
    ],
)
def test_a_launch_waits_for_another_lanes_end_while_it_can(
    own_ms: float, other_ms: float | None, waits: bool
) -> None:
    lanes = [lane(0, own_ms), lane(1, other_ms)]
    loop = cast(Any, DeviceStepLoop.__new__(DeviceStepLoop))
    loop._lanes = lanes
    assert loop._has_to_watch(lanes[0]) is waits


def test_a_launch_that_takes_long_waits_for_an_end_that_is_further_away() -> None:
    lanes = [lane(0, 20), lane(1, 4)]
    loop = cast(Any, DeviceStepLoop.__new__(DeviceStepLoop))
    loop._lanes = lanes
    assert not loop._has_to_watch(lanes[0])
    lanes[0].last_launch_ns = 4 * MS
    assert loop._has_to_watch(lanes[0])


@pytest.mark.parametrize(
    ("ends_in_ms", "step_ms", "look_s"),
    [
        (None, 40, LOOK_S),
        (10, 40, LOOK_S),
        (2, 40, CLOSE_LOOK_S),
        (0.3, 40, 0.0),
        (-0.3, 40, 0.0),
        (-0.5, 40, CLOSE_LOOK_S),
        (-2, 40, LOOK_S),
        (0.3, 4, CLOSE_LOOK_S),  # an eighth of 4 ms is too much of a core
        (0.1, 4, 0.0),
    ],
)
def test_looks_come_closer_until_the_end_is_due(
    ends_in_ms: float | None, step_ms: int, look_s: float
) -> None:
    assert lane(0, ends_in_ms, step_ms).look_s(NOW_NS) == look_s


def test_a_step_that_began_late_ends_late() -> None:
    found = lane(0, -30)
    assert not found.is_near_end(NOW_NS)
    found.in_flight[0].launched_ns = NOW_NS - 38 * MS
    assert found.ends_in_ns(NOW_NS) == 2 * MS
    assert found.is_near_end(NOW_NS)


def test_an_end_is_looked_for_between_a_plan_and_its_launch_and_between_two_launches() -> None:
    """Plans of both lanes come at once: each launch is behind and before a look at all lanes."""
    happened: list[str] = []
    plans = [SimpleNamespace(kind="step_plan", lane=index, step=1) for index in (0, 1)]
    rounds = iter([plans, [SimpleNamespace(kind="session_lost", reason="")]])
    session = SimpleNamespace(
        settings=SimpleNamespace(max_tokens_per_micro_batch=2, max_steps_in_flight=2),
        poll=lambda _timeout_s: next(rounds),
    )
    links = SimpleNamespace(settle=lambda: happened.append("settle"))
    lanes = [lane(0, None), lane(1, None)]
    loop = cast(Any, DeviceStepLoop(cast(Any, session), NOTHING, cast(Any, links), lanes))

    def launch(which: DeviceLane) -> None:
        happened.append(f"launch {which.index}")
        which.queued.clear()

    loop._launch_queued = launch
    loop.collect = lambda: happened.append("look")
    assert loop.run() is Outcome.LOST
    assert happened == ["look", "settle", "launch 0", "look", "launch 1", "look"]


def loop_of(lanes: list[DeviceLane]) -> Any:
    """A loop that launches nothing."""
    settings = SimpleNamespace(max_tokens_per_micro_batch=2, max_steps_in_flight=3)
    session, links = SimpleNamespace(settings=settings), SimpleNamespace(is_ready=True)
    return DeviceStepLoop(cast(Any, session), NOTHING, cast(Any, links), lanes)


def comes(loop: Any, index: int, step: int = 1000) -> int:
    """A plan for a lane's next step; returns until when that is held back, 0 if it is not."""
    loop._queue(SimpleNamespace(lane=index, step=step))
    return int(loop._lanes[index].held_until_ns)


@pytest.mark.parametrize(
    ("ends_in_ms", "index", "is_moved"),
    [
        ((20, 21), 1, True),
        ((20, 19), 1, True),
        ((1, 39), 1, True),  # the end that comes next, a step later
        ((39, 1), 1, True),
        ((20, 21), 0, False),  # only one of two moves
        ((20, 24), 1, False),
        ((None, 21), 1, False),
        ((20, None), 1, False),  # it does not run
        ((10, 20, 11), 2, True),
        ((10, 11, 20), 2, False),
    ],
)
def test_a_lane_that_ends_with_another_is_moved_away(
    ends_in_ms: tuple[float | None, ...], index: int, is_moved: bool
) -> None:
    lanes = [lane(at, each) for at, each in enumerate(ends_in_ms)]
    lanes[index].last_launch_ns = 2 * MS
    held_until_ns = comes(loop_of(lanes), index)
    if is_moved:
        # The launch takes its time as well, and looks come every half a millisecond.
        own_ms = ends_in_ms[index]
        assert own_ms is not None
        assert held_until_ns == NOW_NS + own_ms * MS + MOVE_NS - 2 * MS
    else:
        assert held_until_ns == 0


def test_a_moved_lane_is_apart_and_its_ffn_ranks_wait_for_it() -> None:
    assert MOVE_NS > 2 * APART_NS
    assert MOVE_NS + LOOK_S * 1e9 + 1 * MS < DEFAULT_JOIN_WINDOW_NS


def test_a_lane_moves_once_in_so_many_steps_and_never_while_it_fills_or_is_fast() -> None:
    lanes = [lane(0, 20), lane(1, 21)]
    loop = loop_of(lanes)
    assert comes(loop, 1, step=3) == 0
    assert comes(loop, 1, step=200) > 0
    lanes[1].held_until_ns = 0
    lanes[1].queued.clear()
    assert comes(loop, 1, step=199 + MOVE_STEPS) == 0
    assert comes(loop, 1, step=200 + MOVE_STEPS) > 0
    fast = [lane(0, 5, step_ms=10), lane(1, 5, step_ms=10)]
    assert comes(loop_of(fast), 1) == 0


def test_what_is_held_back_is_launched_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes = [lane(0, 20), lane(1, 21)]
    loop, applied = loop_of(lanes), list[Any]()

    def apply(plan: Any) -> Any:
        applied.append(plan)
        return SimpleNamespace(sequences=[], must_wait=False)

    lanes[1].table = cast(Any, SimpleNamespace(apply=apply))
    loop._collect = lambda _lane: None
    held_until_ns = comes(loop, 1)
    loop._launch_queued(lanes[1])
    assert not applied
    monkeypatch.setattr(time, "perf_counter_ns", lambda: held_until_ns)
    loop._launch_queued(lanes[1])
    assert len(applied) == 1
    assert not lanes[1].queued
