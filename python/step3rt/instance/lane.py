"""Owns one micro-batch lane of an attention instance: its steps, and what they wait for.

It never talks to the session; `step_loop` does, and tells the lane what happened.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from step3rt import _core
from step3rt.instance.sequences import LaneSequences, PlannedChunk
from step3rt.model.placement import Placement, combine
from step3rt.model.step3 import FfnRequest


@dataclass(slots=True)
class Step:
    """A step in progress: `forward`'s generator, stopped at one layer's FFN.

    partial_sums has one entry per FFN rank. waiting maps the ranks whose reply is due to the
    instance that owes it; unsent holds the ranks whose slot still belongs to an older frame.
    """

    number: int
    planned: list[PlannedChunk]
    layers: Generator[FfnRequest, torch.Tensor, torch.Tensor]
    started_ns: int
    compute_ns: int = 0
    wait_ns: int = 0
    request: FfnRequest | None = None
    placements: list[Placement] = field(default_factory=list)
    partial_sums: list[torch.Tensor] = field(default_factory=list)
    waiting: dict[int, int] = field(default_factory=dict)
    unsent: set[int] = field(default_factory=set)

    @property
    def is_answered(self) -> bool:
        """Whether every partial sum of the layer is there."""
        return not self.waiting and not self.unsent

    def ffn_output(self) -> torch.Tensor:
        """The sum of the layer's partial sums, f32[T, H]."""
        hidden = self.layer_request().hidden
        return combine(self.partial_sums, self.placements, hidden.shape[0])

    def layer_request(self) -> FfnRequest:
        """What the FFN instances are computing."""
        if self.request is None:
            raise RuntimeError("the step has not begun")
        return self.request

    def is_due(self, rank: int, arrival: _core.Arrival) -> bool:
        """Whether an arrival from FFN rank `rank` answers this step's current layer."""
        return (
            self.waiting.get(rank) == arrival.peer
            and arrival.step == self.number
            and arrival.layer == self.layer_request().layer
        )


@dataclass(slots=True)
class Lane:
    """One lane: its sequences, its step if one is in progress, and the slots that are taken.

    queued holds the plans whose steps come after that one. Those below first_due_step may have been
    planned before the coordinator knew that a step of this lane had failed.

    taken_by_peer holds the instances that have not yet answered this lane's last push. A step may
    fail while they compute; the next one must not write into their slot before they have answered.
    """

    index: int
    sequences: LaneSequences
    step: Step | None = None
    queued: deque[_core.StepPlan] = field(default_factory=deque)
    first_due_step: int = 0
    taken_by_peer: set[int] = field(default_factory=set)
