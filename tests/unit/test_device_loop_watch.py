"""When a device attention instance looks for a lane's end, and what it puts off meanwhile."""

import time
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from step3rt.instance.device_loop import (
    CLOSE_LOOK_S,
    LOOK_S,
    DeviceLane,
    DeviceStepLoop,
    FlightStep,
)
from step3rt.instance.node import Outcome

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
