"""How many rows each group of experts got: read off the device while its lanes run.

Owns when it looks and what it keeps. A look copies a few kilobytes on a stream of its own and waits
for nothing; layers that the lane has passed are of the step in progress, the others of the one
before.
"""

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from step3rt.ops.stream import Event, Stream

LOOK_INTERVAL_S = 0.05
"""Longer than a step takes on a GPU, so that two looks are of different steps."""

MAX_LOOKS = 512


class GroupRows:
    """The last looks at all lanes of one FFN instance."""

    def __init__(self, tables: Sequence[torch.Tensor]) -> None:
        """`tables`: i32[layers, groups, 2] of each lane, first row and rows of each group."""
        self._tables = tables
        device = tables[0].device
        self._stream = Stream(device)
        self._copies = [
            torch.zeros(table.shape, dtype=table.dtype, pin_memory=device.type == "cuda")
            for table in tables
        ]
        self._pending: Event | None = None
        self._next_look_s = 0.0
        self._found: deque[npt.NDArray[np.int32]] = deque(maxlen=MAX_LOOKS)

    def look(self) -> None:
        """Takes what the last look has found, and looks again when it is time; never waits."""
        if self._pending is not None:
            if not self._pending.is_done():
                return
            self._pending = None
            self._found.append(np.stack([copy[..., 1].numpy().copy() for copy in self._copies]))
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_INTERVAL_S
            self._stream.run(self._copy)
            self._pending = self._stream.record()

    def rows(self) -> npt.NDArray[np.int32]:
        """i32[looks, lanes, layers, groups]."""
        if self._found:
            return np.stack(self._found)
        num_layers, num_groups = self._tables[0].shape[:2]
        return np.zeros((0, len(self._tables), num_layers, num_groups), dtype=np.int32)

    def close(self) -> None:
        """Ends the stream."""
        self._stream.synchronize()
        self._stream.close()

    def _copy(self) -> None:
        for copy, table in zip(self._copies, self._tables, strict=True):
            copy.copy_(table, non_blocking=True)
