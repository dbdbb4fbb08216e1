"""Instances without a device, for `bench.host_path`: their steps end when a clock says so.

The session, the lanes' sequences and the loop are the product's; in place of a lane's program is
one that computes nothing and whose steps take equally long.
"""

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from step3rt import _core
from step3rt.config import NodeConfig
from step3rt.instance.device_links import FfnLinks
from step3rt.instance.device_loop import DeviceLane, DeviceStepLoop
from step3rt.instance.device_setup import SLOT_BYTES
from step3rt.instance.node import IDLE_TIMEOUT_S, Model, Outcome, run_node
from step3rt.instance.sequence_table import SequenceTable
from step3rt.model.device_attention import AttentionLane, PromptScores, StepOrder
from step3rt.model.device_inputs import HostStep
from step3rt.ops.afd_link import AttentionSlots
from step3rt.ops.sample import MAX_TOP
from step3rt.ops.stream import Event
from step3rt.trace.step_times import StepTimes

_NUM_SMS = 132  # of the H200 that is not there
_TOKEN_ID = 7
_FILLING_STEPS = 24


@dataclass(frozen=True, slots=True)
class Clock:
    """How long steps and launches take, and how much later each lane's steps end than another's."""

    step_ns: int
    apart_ns: int
    launch_s: float


class _End:
    """An event that is done when its time has come."""

    def __init__(self, at_ns: int) -> None:
        self._at_ns = at_ns

    def is_done(self) -> bool:
        return time.perf_counter_ns() >= self._at_ns

    def elapsed_ns(self, since: "_End") -> int:
        return self._at_ns - since._at_ns

    def wait(self) -> None:
        time.sleep(max(0.0, (self._at_ns - time.perf_counter_ns()) / 1e9))


class _ClockLane:
    """A lane whose steps run one after the other.

    While it fills, in its first steps, one that finds it idle begins at the lane's place among the
    others' steps, and later at once.
    """

    def __init__(self, clock: Clock, place_ns: int) -> None:
        self._clock = clock
        self._place_ns = place_ns
        self._end_ns = 0
        self._num_steps = 0

    def launch(self, host: HostStep, order: StepOrder) -> tuple[Event, PromptScores | None]:
        host.pad(order.num_rows, order.num_rows)
        time.sleep(self._clock.launch_s)  # as in the driver: without the GIL
        begin_ns, step_ns = max(self._end_ns, time.perf_counter_ns()), self._clock.step_ns
        if begin_ns > self._end_ns and self._num_steps < _FILLING_STEPS:
            begin_ns += (self._place_ns - begin_ns) % step_ns
        self._end_ns = begin_ns + step_ns
        self._num_steps += 1
        host.token_ids_out[: order.num_samples] = _TOKEN_ID
        host.is_corrupt_out[: order.num_samples] = 0
        return cast(Event, _End(self._end_ns)), None


class _ClockAttention:
    def __init__(self, node: NodeConfig, model: Model, clock: Clock) -> None:
        self._node, self._model, self._clock = node, model, clock

    def run(self, session: _core.NodeSession) -> Outcome:
        settings, num_blocks = session.settings, self._node.kv_blocks or 1
        session.bind(SLOT_BYTES, SLOT_BYTES)
        session.ready(num_blocks)
        lanes = [self._lane(index, settings, num_blocks) for index in range(settings.num_lanes)]
        fine = [SimpleNamespace(is_ok=True)] * len(lanes)
        slots = cast(AttentionSlots, SimpleNamespace(errors=lambda: fine))
        times = StepTimes()
        loop = DeviceStepLoop(session, slots, cast(FfnLinks, _NoLinks()), lanes, times)
        try:
            return loop.run()
        finally:
            if self._node.trace_dir is not None:
                times.save(self._node.trace_dir, session.role_rank)

    def _lane(self, index: int, settings: _core.Settings, num_blocks: int) -> DeviceLane:
        max_tokens = settings.max_tokens_per_micro_batch
        table = SequenceTable(
            num_slots=max_tokens,
            num_blocks=num_blocks,
            max_model_len=settings.max_model_len,
            vocab_size=self._model.config.vocab_size,
        )
        device = torch.device("cpu")
        hosts = [
            HostStep(max_tokens, MAX_TOP, device, prefill_ctas=_NUM_SMS)
            for _ in range(settings.max_steps_in_flight)
        ]
        lane = cast(AttentionLane, _ClockLane(self._clock, index * self._clock.apart_ns))
        return DeviceLane(index, table, lane, hosts)


class _ClockFfn:
    def run(self, session: _core.NodeSession) -> Outcome:
        session.bind(SLOT_BYTES, SLOT_BYTES)
        session.ready(0)
        while True:
            for event in session.poll(IDLE_TIMEOUT_S):
                if event.kind == "session_lost":
                    return Outcome.LOST
                if event.kind == "drain":
                    return Outcome.DRAINED


class _NoLinks:
    """Links that are there from the start, whatever the session says of them."""

    is_ready = are_coming = True

    def settle(self) -> None:
        """Nothing breaks."""

    def _ignore(self, _event: Any) -> None:
        """The device is a clock: nothing is sent."""

    on_up = on_down = on_arrival = _ignore


def run_clock_instance(node: NodeConfig, clock: Clock) -> int:
    """Runs an instance until the coordinator or a signal ends it; returns the exit code."""

    def make_role(model: Model) -> _ClockAttention | _ClockFfn:
        return _ClockAttention(node, model, clock) if node.role == "attention" else _ClockFfn()

    return run_node(node, make_role)
