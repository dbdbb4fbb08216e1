"""One measured row, and the time of launches as a CUDA graph replays them.

Never checks a result; the benchmarks do that before they time.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

MIN_ROTATED_BYTES = 1 << 30
"""Launches of one graph cycle through this much weights or KV, many times the L2."""
NUM_REPLAYS = 25

Launch = Callable[[], None]


@dataclass(slots=True)
class Row:
    """One measured kernel and shape; `peers` in microseconds, by name."""

    kernel: str
    shape: str
    us: float
    gb_per_s: float
    tflops: float
    peers: dict[str, float] = field(default_factory=dict)


def measure_us(launches: Sequence[Launch]) -> float:
    """Returns the median time of one launch, replaying all of them as one CUDA graph."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(5):
        graph.replay()
    times_us = []
    for _ in range(NUM_REPLAYS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times_us.append(start.elapsed_time(stop) * 1e3 / len(launches))
    return float(statistics.median(times_us))
