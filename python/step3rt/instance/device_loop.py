"""The loop of a device attention instance: plans become launches, ends of launches become reports.

Owns the order of events: a lane's steps are launched as their plans come, the next one while the
last is still computed, and reported in the same order. It waits for no device: it looks.
"""

import gc
import logging
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from step3rt import _core
from step3rt.errors import Internal
from step3rt.instance.device_links import FfnLinks
from step3rt.instance.node import IDLE_TIMEOUT_S, Outcome
from step3rt.instance.sequence_table import PlannedStep, SequenceTable
from step3rt.instance.sequences import StepNotDueError
from step3rt.instance.step_rows import corrupt_chunks, fill_step, step_outputs
from step3rt.model.device_attention import AttentionLane, PromptScores
from step3rt.model.device_inputs import HostStep
from step3rt.ops.afd_link import AttentionSlots
from step3rt.ops.stream import Event
from step3rt.trace.step_times import StepTimes

logger = logging.getLogger(__name__)

LOOK_S = 0.0005
"""Between looks at a step's end. Its tokens are reported later by that much at most; the step after
it is on the device by then."""

CLOSE_LOOK_S = 0.00005
"""The same while a step is about to end: what it is reported late by is jitter to a client. To
sleep so long takes twice as long, so in the middle of that time there is no pause at all."""

_EARLY_NS = 3_000_000
_LATE_NS = 1_000_000
"""How long before and after the time that the lane's last step took that is."""

_NO_PAUSE_NS = 400_000
_NO_PAUSE_SHARE = 32
"""For so long before and after that time there is no pause, or for this part of a step if that is
less: a core has other things to do than to look for the ends of short steps."""

_LAUNCH_MARGIN_NS = 500_000
"""A launch may take that much longer than the lane's last one."""


@dataclass(slots=True)
class FlightStep:
    """A step on its way, or over: `host` and `event` are None for a plan that computes nothing.

    `launched_ns`: when its launch began, and `launch_ns` how long that took.
    """

    planned: PlannedStep
    host: HostStep | None
    event: Event | None
    scores: PromptScores | None
    launched_ns: int = 0
    launch_ns: int = 0


@dataclass(slots=True)
class DeviceLane:
    """One lane: its sequences, the steps in flight, and the plans that wait.

    `hosts`: buffers that no step uses. `first_due_step`: plans below it may have been made before
    the coordinator knew that a step of this lane had failed. `last_event`, `last_end_ns`: the end
    of the last step that is over, and when it was seen; `last_step_ns`, `last_launch_ns`: how long
    the last step and launch took; `looked_ns`: the last look at the step that runs.
    """

    index: int
    table: SequenceTable
    device: AttentionLane
    hosts: list[HostStep]
    in_flight: deque[FlightStep] = field(default_factory=deque)
    queued: deque[_core.StepPlan] = field(default_factory=deque)
    first_due_step: int = 0
    last_event: Event | None = None
    last_end_ns: int = 0
    last_step_ns: int = 0
    last_launch_ns: int = 0
    looked_ns: int = 0

    def ends_in_ns(self, now_ns: int) -> int | None:
        """When its step ends if it takes as long as the last one; below 0 if it is late.

        None: there is no step, or none before it.
        """
        if not self.in_flight or not self.last_step_ns:
            return None
        begun_ns = max(self.last_end_ns, self.in_flight[0].launched_ns)
        return begun_ns + self.last_step_ns - now_ns

    def is_near_end(self, now_ns: int, early_ns: int = _EARLY_NS) -> bool:
        """Whether its step ends about now, or within `early_ns`."""
        left_ns = self.ends_in_ns(now_ns)
        return left_ns is not None and -_LATE_NS < left_ns < early_ns

    def look_s(self, now_ns: int) -> float:
        """How long to wait before the next look at its step."""
        left_ns = self.ends_in_ns(now_ns)
        if left_ns is None or not -_LATE_NS < left_ns < _EARLY_NS:
            return LOOK_S
        if abs(left_ns) < min(_NO_PAUSE_NS, self.last_step_ns // _NO_PAUSE_SHARE):
            return 0.0
        return CLOSE_LOOK_S


class DeviceStepLoop:
    """All lanes of one session of a device attention instance."""

    def __init__(
        self,
        session: _core.NodeSession,
        slots: AttentionSlots,
        links: FfnLinks,
        lanes: list[DeviceLane],
        times: StepTimes | None = None,
    ) -> None:
        """Starts with idle lanes and without links; `times`: where steps' times are noted."""
        self._session = session
        self._slots = slots
        self._links = links
        self._lanes = lanes
        self._times = times or StepTimes()
        self._max_tokens = session.settings.max_tokens_per_micro_batch
        self._max_steps_in_flight = session.settings.max_steps_in_flight
        self._is_draining = False

    def run(self) -> Outcome:
        """Serves plans until the session is lost or, when asked to drain, nothing is in flight."""
        # What is alive now stays: a collection that walks it would hold up a step's report. What an
        # earlier session kept is looked at once more.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        while True:
            is_busy = any(lane.in_flight or lane.queued for lane in self._lanes)
            if self._is_draining and not is_busy:
                return Outcome.DRAINED
            for event in self._session.poll(self._look_s() if is_busy else IDLE_TIMEOUT_S):
                if event.kind == "session_lost":
                    logger.warning("The session with the coordinator is over: %s", event.reason)
                    return Outcome.LOST
                self._handle(event)
            self.collect()
            if not any(lane.in_flight for lane in self._lanes):
                self._links.settle()
            for lane in self._lanes:
                if lane.queued:
                    self._launch_queued(lane)
                    # Another lane's step may have ended meanwhile.
                    self.collect()

    def _look_s(self) -> float:
        now_ns = time.perf_counter_ns()
        return min(lane.look_s(now_ns) for lane in self._lanes)

    def collect(self) -> None:
        """Reports the steps that are over."""
        for lane in self._lanes:
            self._collect(lane)

    def _handle(self, event: _core.Event) -> None:
        if event.kind == "step_plan":
            self._queue(event)
        elif event.kind == "arrival":
            self._links.on_arrival(event)
        elif event.kind == "link_up":
            self._links.on_up(event)
        elif event.kind == "link_down":
            self._links.on_down(event)
        elif event.kind == "drain":
            self._is_draining = True

    def launch(self, plan: _core.StepPlan) -> None:
        """Launches a plan's step, or has it wait."""
        self._queue(plan)
        self._launch_queued(self._lanes[plan.lane])

    def _queue(self, plan: _core.StepPlan) -> None:
        lane = self._lanes[plan.lane]
        num_unanswered = len(lane.queued) + len(lane.in_flight)
        if num_unanswered >= self._max_steps_in_flight:
            raise Internal(
                f"A plan for step {plan.step} of lane {plan.lane} arrived while {num_unanswered} "
                f"of its steps are not answered. max_steps_in_flight is "
                f"{self._max_steps_in_flight}. The coordinator's plan is wrong."
            )
        lane.queued.append(plan)

    def _launch_queued(self, lane: DeviceLane) -> None:
        """Launches what waits, unless it has to go on waiting."""
        while lane.queued:
            plan = lane.queued[0]
            if not self._links.is_ready and self._links.are_coming:
                return
            # Before the plan is applied, which takes longer than a look.
            if lane.in_flight and self._has_to_watch(lane):
                return
            try:
                planned = lane.table.apply(plan)
            except StepNotDueError as error:
                self._refuse(lane, lane.queued.popleft(), error)
                continue
            if lane.in_flight and (planned.must_wait or not self._links.is_ready):
                return
            lane.queued.popleft()
            if not planned.sequences:
                lane.in_flight.append(FlightStep(planned, None, None, None))
                self._collect(lane)
            elif self._links.is_ready:
                self._launch(lane, planned)
            else:
                self._give_up(lane, planned, self._links.reason)

    def _has_to_watch(self, lane: DeviceLane) -> bool:
        """Whether another lane's end is near, which a launch of `lane` would have reported late.

        The launch is in no hurry while the lane's own step has time left for it; a step of unknown
        length, or one that is late, may end at once.
        """
        now_ns = time.perf_counter_ns()
        early_ns = max(_EARLY_NS, lane.last_launch_ns + _LAUNCH_MARGIN_NS)
        left_ns = lane.ends_in_ns(now_ns)
        if left_ns is None or left_ns < early_ns:
            return False
        others = (other for other in self._lanes if other is not lane)
        return any(other.is_near_end(now_ns, early_ns) for other in others)

    def _launch(self, lane: DeviceLane, planned: PlannedStep) -> None:
        if planned.num_tokens > self._max_tokens:
            raise Internal(
                f"Step {planned.number} of lane {lane.index} has {planned.num_tokens} tokens. A "
                f"slot holds {self._max_tokens}. The coordinator's plan is wrong."
            )
        launched_ns = time.perf_counter_ns()
        host = lane.hosts.pop()
        order = fill_step(planned, lane.table, host)
        lane.table.launched(planned)
        event, scores = lane.device.launch(host, order)
        lane.last_launch_ns = time.perf_counter_ns() - launched_ns
        step = FlightStep(planned, host, event, scores, launched_ns, lane.last_launch_ns)
        lane.in_flight.append(step)

    def _collect(self, lane: DeviceLane) -> None:
        """Reports the steps that are over, in their order."""
        while lane.in_flight:
            step = lane.in_flight[0]
            now_ns = time.perf_counter_ns()
            if step.event is not None and not step.event.is_done():
                lane.looked_ns = now_ns
                return
            lane.in_flight.popleft()
            if step.host is None or step.event is None:
                self._session.complete_step(lane.index, step.planned.number, [], 0, 0, 0)
                continue
            lane.hosts.append(step.host)
            errors = self._slots.errors()[lane.index]
            device_ns = 0 if lane.last_event is None else step.event.elapsed_ns(lane.last_event)
            lane.last_event = step.event
            if errors.is_ok:
                # A step that was launched early began when the one before it ended.
                lane.last_step_ns = now_ns - max(step.launched_ns, lane.last_end_ns)
                lane.last_end_ns = now_ns
                self._complete(lane, step, step.host)
                self._note(lane, step, device_ns)
                continue
            bad = {rank: error.name for rank, error in enumerate(errors.peers) if error}
            self._links.break_all(f"lane {lane.index} stopped: {errors.lane.name}, ranks {bad}")
            lane.table.fail(step.planned)
            self._give_up(lane, step.planned, self._links.reason)

    def _complete(self, lane: DeviceLane, step: FlightStep, host: HostStep) -> None:
        planned = step.planned
        sampled = host.token_ids_out[: int(planned.samples.sum())].astype(np.int64)
        is_corrupt = corrupt_chunks(planned, host, step.scores)
        is_corrupt = lane.table.accept(planned, sampled, is_corrupt)
        outputs = step_outputs(planned, host, step.scores, is_corrupt)
        took_ns = lane.last_step_ns
        self._session.complete_step(lane.index, planned.number, outputs, took_ns, 0, took_ns)

    def _note(self, lane: DeviceLane, step: FlightStep, device_ns: int) -> None:
        """Notes when what happened to a step that was just reported."""
        launch_end_ns = step.launched_ns + step.launch_ns
        launch = (lane.index, step.planned.number, step.launched_ns, launch_end_ns)
        ends = (lane.looked_ns, lane.last_end_ns, time.perf_counter_ns())
        self._times.add((*launch, lane.last_step_ns, device_ns, *ends))
        lane.looked_ns = 0

    def _refuse(self, lane: DeviceLane, plan: _core.StepPlan, error: StepNotDueError) -> None:
        if plan.step >= lane.first_due_step:
            raise Internal(
                f"Step {plan.step} of lane {plan.lane} cannot start: {error}. No step failed "
                "that it could have been planned on. The coordinator's plan is wrong."
            ) from error
        reason = f"it was planned before a failure was known: {error}"
        self._session.fail_step(plan.lane, plan.step, reason)

    def _give_up(self, lane: DeviceLane, planned: PlannedStep, reason: str) -> None:
        """Gives a step up. K and V that it wrote are overwritten when it is planned again."""
        logger.warning("Step %d of lane %d fails: %s", planned.number, lane.index, reason)
        lane.first_due_step = planned.number + self._max_steps_in_flight
        self._session.fail_step(lane.index, planned.number, reason)
