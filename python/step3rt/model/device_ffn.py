"""The FFN side of the device pipeline: one lane's step over all layers, without a host between.

Owns a lane's stream, scratch and graph, and the order of launches in it; knows nothing of sessions,
and never learns how many rows came.

    per layer   wait for the step's sources -> sort by group, GEMMs -> sums into the sources' slots
"""

from dataclasses import replace

import torch

from step3rt.model.ffn_groups import FfnGroups
from step3rt.ops.afd_link import FfnSlots
from step3rt.ops.graph import StepGraph
from step3rt.ops.launch import num_sms
from step3rt.ops.moe_fp8 import Fp8Experts, MoeWorkspace, allocate_moe_workspace
from step3rt.ops.moe_push import moe_fp8_push
from step3rt.ops.stream import Event, Stream

SMS_PER_WAITING_LANE = 2
"""Left out by a lane's GEMMs for each other lane, whose wait holds a part of one: see moe_push."""


class FfnLane:
    """One lane of an FFN instance: a step is one replay, of however many sources take part."""

    def __init__(
        self, groups: FfnGroups, slots: FfnSlots, lane: int, num_ctas: int | None = None
    ) -> None:
        """Allocates the lane's scratch and captures its step; the slots are not connected yet.

        `num_ctas`: SMs that its GEMMs may fill, even; by default all but those of waiting lanes.
        `group_tables` i32[layers, groups, 2]: first row and rows of each group in the last step. A
        table for each layer costs nothing and can be read beside the lane.
        """
        self._groups = groups
        self._slots = slots
        self._lane = lane
        shape = slots.shape
        if num_ctas is None:
            left = num_sms(groups.device) - SMS_PER_WAITING_LANE * (shape.num_lanes - 1)
            num_ctas = max(2, left // 2 * 2)
        self._workspaces: dict[tuple[int, int], MoeWorkspace] = {}
        for experts in groups.layers:
            if _shape_of(experts) not in self._workspaces:
                self._workspaces[_shape_of(experts)] = allocate_moe_workspace(
                    experts, shape.num_rows, shape.num_columns, num_ctas
                )
        max_groups = max(experts.num_groups for experts in groups.layers)
        self.group_tables = torch.zeros(
            len(groups.layers), max_groups, 2, dtype=torch.int32, device=groups.device
        )
        self._stream = Stream(groups.device)
        slots.run_on(self._stream)
        self._graph = StepGraph.capture(groups.device, self._launch, self._stream)

    def replay(self) -> Event:
        """Queues a step, which waits for its sources; returns the event of its end."""
        self._graph.replay()
        return self._stream.record()

    def close(self) -> None:
        """Ends the lane's stream; nothing may be parked in it."""
        self._stream.close()

    @torch.inference_mode()
    def _launch(self) -> None:
        for index, experts in enumerate(self._groups.layers):
            self._slots.wait(self._lane, is_first_layer=index == 0)
            table = self.group_tables[index, : experts.num_groups]
            workspace = replace(self._workspaces[_shape_of(experts)], groups=table)
            moe_fp8_push(experts, workspace, self._slots, self._lane)


def _shape_of(experts: Fp8Experts) -> tuple[int, int]:
    return experts.num_groups, experts.intermediate_size
