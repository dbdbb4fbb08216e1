"""When a device attention instance puts off a launch to look for another lane's end."""

import time
from collections import deque
from typing import Any, cast

import pytest

from step3rt.instance.device_loop import DeviceLane, DeviceStepLoop

MS = 1_000_000
NOW_NS = 10**12


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: NOW_NS)


def lane(index: int, ends_in_ms: float | None) -> DeviceLane:
    """A lane whose steps take 40 ms, the one in flight until then; None: it has none."""
    nothing = cast(Any, None)
    found = DeviceLane(index, nothing, nothing, [])
    found.last_step_ns = 40 * MS
    if ends_in_ms is not None:
        found.in_flight = deque([nothing])
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
    ],
)
def test_a_launch_waits_for_another_lanes_end_while_it_can(
    own_ms: float, other_ms: float | None, waits: bool
) -> None:
    lanes = [lane(0, own_ms), lane(1, other_ms)]
    loop = cast(Any, DeviceStepLoop.__new__(DeviceStepLoop))
    loop._lanes = lanes
    assert loop._has_to_watch(lanes[0]) is waits
