"""TTFT, TPOT and throughput are what their definitions say."""

import pytest

from step3rt.timing import StreamTimer, percentile, summarise


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def test_percentile_is_a_value_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 100
    assert percentile([7.0], 0.01) == 7
    assert percentile([], 0.5) is None


def test_first_token_is_ttft_and_later_ones_are_tpot() -> None:
    clock = Clock()
    timer = StreamTimer(clock)
    clock.now_s += 0.5
    timer.add(1)
    clock.now_s += 0.03
    timer.add(1)
    clock.now_s += 0.08
    timer.add(2)
    timer.add(0)
    assert timer.ttft_ms == pytest.approx(500)
    assert timer.gaps_ms == pytest.approx([30, 40, 40])
    assert timer.num_tokens == 4


def test_summary_covers_all_streams() -> None:
    clock = Clock()
    timers = [StreamTimer(clock), StreamTimer(clock)]
    clock.now_s += 1.0
    for timer in timers:
        timer.add(1)
    summary = summarise(timers, elapsed_s=2.0)
    assert summary["ttft_ms"] == {"p50": pytest.approx(1000), "p99": pytest.approx(1000)}
    assert summary["tpot_ms"] == {"p50": None, "p99": None}
    assert summary["tokens_per_s"] == 1.0
