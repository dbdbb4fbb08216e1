"""When a device instance's lanes sent, waited and were answered: kept on the device, then saved.

Owns the memory of the times; the kernels write them, and `step3rt.trace` reads the files.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from step3rt.config import NodeConfig
from step3rt.instance.device_claim import name_of
from step3rt.instance.group_rows import GroupRows
from step3rt.ops.afd_endpoint import AfdEndpoint
from step3rt.ops.afd_slots import AFD_TRACE_ROW
from step3rt.trace.recording import Recording, Shape
from step3rt.trace.step_times import StepTimes

logger = logging.getLogger(__name__)

_ROW_WORDS = AFD_TRACE_ROW.itemsize // 8


class LaneTraces:
    """The last steps of one instance's lanes."""

    def __init__(
        self,
        directory: Path,
        shape: Shape,
        slots: AfdEndpoint,
        num_rows: int,
        group_tables: Sequence[torch.Tensor] = (),
    ) -> None:
        """Lets all lanes note the times of their last `num_rows` layers; they must be idle.

        `group_tables`: of an FFN instance's lanes, see `GroupRows`.
        """
        self._directory = directory
        self._shape = shape
        self._group_rows = GroupRows(group_tables) if group_tables else None
        self._rings = [
            torch.zeros(num_rows, _ROW_WORDS, dtype=torch.int64, device=slots.device)
            for _ in range(slots.shape.num_lanes)
        ]
        for lane, ring in enumerate(self._rings):
            slots.set_trace(lane, ring)

    @classmethod
    def start(
        cls,
        node: NodeConfig,
        rank: int,
        num_layers: int,
        slots: AfdEndpoint,
        group_tables: Sequence[torch.Tensor] = (),
    ) -> "LaneTraces | None":
        """Starts noting times if the instance was asked to."""
        if node.trace_dir is None:
            return None
        links = slots.shape
        sizes = (num_layers, links.num_sources, links.num_ranks)
        shape = Shape(node.role, rank, *sizes, device=name_of(slots.device))
        return cls(node.trace_dir, shape, slots, node.trace_steps * num_layers, group_tables)

    def look(self) -> None:
        """Looks at the rows of each group of experts when it is time to; never waits."""
        if self._group_rows is not None:
            self._group_rows.look()

    def save(self, times: StepTimes | None = None) -> None:
        """Writes what was noted, and the host's own times; the lanes must be idle."""
        rings = [ring.cpu().numpy().view(AFD_TRACE_ROW)[:, 0] for ring in self._rings]
        group_rows = None
        if self._group_rows is not None:
            self._group_rows.close()
            group_rows = self._group_rows.rows()
        try:
            path = Recording.of_rings(self._shape, rings, group_rows).save(self._directory)
            if times is not None:
                times.save(self._directory, self._shape.rank)
        except OSError as error:
            # The streams were served; that nobody can see how fast is no reason to fail.
            logger.error("The trace cannot be written to %s: %s", self._directory, error)
            return
        logger.info("The trace of the last steps is in %s", path)
