"""When tokens came: TTFT, TPOT and throughput of one or many streams.

Owns the definitions; reads no clock but the one it is given.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` (0 to 1) of all values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(slots=True)
class StreamTimer:
    """Stamps one stream. TPOT is the time from one token to the next, after the first.

    Several tokens in one message share the time since the message before.
    """

    clock: Callable[[], float] = time.perf_counter
    started_s: float = 0.0
    ttft_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    num_tokens: int = 0
    _last_s: float = 0.0

    def __post_init__(self) -> None:
        self.started_s = self._last_s = self.clock()

    def add(self, num_tokens: int) -> None:
        """Notes the arrival of `num_tokens` tokens."""
        if num_tokens == 0:
            return
        now_s = self.clock()
        if self.ttft_ms is None:
            self.ttft_ms = (now_s - self.started_s) * 1e3
        else:
            gap_ms = (now_s - self._last_s) * 1e3 / num_tokens
            self.gaps_ms.extend([gap_ms] * num_tokens)
        self.num_tokens += num_tokens
        self._last_s = now_s


def summarise(timers: Sequence[StreamTimer], elapsed_s: float) -> dict[str, object]:
    """TTFT and TPOT percentiles in milliseconds over all streams, and tokens per second."""
    ttft = [timer.ttft_ms for timer in timers if timer.ttft_ms is not None]
    gaps = [gap for timer in timers for gap in timer.gaps_ms]
    num_tokens = sum(timer.num_tokens for timer in timers)
    return {
        "ttft_ms": {"p50": percentile(ttft, 0.5), "p99": percentile(ttft, 0.99)},
        "tpot_ms": {"p50": percentile(gaps, 0.5), "p99": percentile(gaps, 0.99)},
        "tokens": num_tokens,
        "elapsed_s": elapsed_s,
        "tokens_per_s": num_tokens / elapsed_s if elapsed_s > 0 else None,
    }
