"""One lane of AFD links in this process, for tests that make its calls one by one.

All in one stream, so that it runs on one GPU, too.
"""

import torch

from step3rt.ops.afd_link import AttentionSlots, FfnSlots, LaneErrors, LaneState, StopWord
from step3rt.ops.afd_slots import AfdShape
from step3rt.ops.quantize import quantize_groups
from step3rt.ops.rmsnorm_quantize import QuantizedRows
from tests.kernels.afd_cases import EPOCHS, device_of
from tests.kernels.afd_party import compute


class Bench:
    """Sources and one rank in this process, whose calls are made one after the other."""

    def __init__(
        self,
        kind: str,
        num_sources: int = 2,
        wait_limit_ns: int = 300_000_000,
        idle_limit_ns: int = 0,
    ) -> None:
        self.device = device_of(kind)
        self.shape = AfdShape(1, num_sources, 1, 5, 256, 3)
        self.stop = StopWord(self.device)
        limits = (wait_limit_ns, 0, idle_limit_ns)
        self.rank = FfnSlots(self.shape, 0, self.device, self.stop, *limits)
        self.sources = [
            AttentionSlots(self.shape, index, self.device, self.stop, wait_limit_ns)
            for index in range(num_sources)
        ]
        for index in range(num_sources):
            self.link(index)

    def link(self, index: int) -> None:
        epoch = next(EPOCHS)
        source = self.sources[index]
        self.rank.connect(index, source.handle, epoch)
        source.connect(0, self.rank.handle, epoch)

    def rows(self, value: float) -> QuantizedRows:
        rows = torch.full((5, self.shape.hidden_size), value, device=self.device)
        return QuantizedRows(*quantize_groups(rows))

    def send(self, index: int, value: float, num_rows: int = 2, *, is_first: bool = True) -> None:
        count = torch.tensor([num_rows], dtype=torch.int32, device=self.device)
        source = self.sources[index]
        source.send(0, self.rows(value), None, count, 0, is_first_layer=is_first)

    def compute(self, *, is_first: bool = True) -> None:
        """The rank's layer: half of each row, as `compute` has it for a home."""
        self.rank.wait(0, is_first)
        self.rank.push(0, compute(self.rank.tokens(0), 0, 1, 0))

    def receive(self, index: int, *, is_first: bool = True) -> list[float]:
        """Waits; returns the first value of each of the rows that came back."""
        source = self.sources[index]
        source.wait(0, is_first_layer=is_first)
        is_present = source.present(0).bool()
        return source.sums(0)[0][is_present][:, 0].tolist()

    def finish(self) -> None:
        """Waits until all calls have ended on the device."""
        if self.device.type != "cpu":
            torch.cuda.synchronize()

    def state(self) -> LaneState:
        """The rank's."""
        self.finish()
        return self.rank.state(0)

    def errors(self) -> tuple[LaneErrors, list[LaneErrors]]:
        """The rank's, and the sources'."""
        self.finish()
        return self.rank.errors()[0], [source.errors()[0] for source in self.sources]

    def close(self) -> None:
        self.stop.set()
        self.finish()
        for slots in (self.rank, *self.sources):
            slots.close()
