"""Measures the scheduler, and beside it those that people use, with the same trace.

A peer's code is never part of this project: it is loaded from a directory that the caller names.
"""

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NUM_PROMPT_TOKENS = 64
MEAN_LIFE_STEPS = 100

# A Python scheduler takes tens of milliseconds per step; its median needs no more than this.
_PEER_STEPS = 200
_SAMPLED_TOKEN = 1


@dataclass(frozen=True, slots=True)
class Load:
    """How much runs at a time."""

    num_sequences: int
    num_attention: int
    num_lanes: int

    @property
    def sequences_per_lane_step(self) -> int:
        """Sequences in one step of one lane on every attention instance."""
        return -(-self.num_sequences // self.num_lanes)


def life_steps(request: int) -> int:
    """How many tokens a request generates: the formula of `step3rt-sim`'s workload."""
    spread = (request * 2_654_435_769 % 2**32) >> 16
    return MEAN_LIFE_STEPS // 2 + spread % MEAN_LIFE_STEPS


def measure(
    load: Load, *, num_steps: int, has_scaling: bool, peers: Mapping[str, Path]
) -> dict[str, Any]:
    """The report of `_core.bench_scheduler` with `peers`: per peer its time and the ratio to ours.

    Args:
        load: how much runs at a time.
        num_steps: lane steps to measure.
        has_scaling: whether to measure other sizes as well.
        peers: directories with sources, by name; only "nano-vllm" is known.

    Raises:
        InvalidArgument: the load cannot be measured.
    """
    from step3rt import _core

    options = {
        "sequences": load.num_sequences,
        "attention": load.num_attention,
        "lanes": load.num_lanes,
        "steps": num_steps,
        "scaling": has_scaling,
    }
    report: dict[str, Any] = json.loads(_core.bench_scheduler(json.dumps(options)))
    report["peers"] = []
    for name, directory in peers.items():
        ours_us = report["schedule_apply_us"]["p50"]
        report["peers"].append(_measure_nano_vllm(name, directory, load, ours_us))
    return report


def _measure_nano_vllm(name: str, directory: Path, load: Load, ours_us: float) -> dict[str, Any]:
    if not (directory / "nanovllm" / "engine" / "scheduler.py").is_file():
        return {"name": name, "skipped": f"{directory} has no nanovllm/engine/scheduler.py"}
    try:
        with _nano_vllm(directory) as (scheduler, sequence):
            times_us = _run_nano_vllm(scheduler, sequence, load.sequences_per_lane_step)
    except ImportError as error:
        return {"name": name, "skipped": f"its sources cannot be imported: {error}"}
    times_us.sort()
    p50_us, p99_us = times_us[len(times_us) // 2], times_us[len(times_us) * 99 // 100]
    return {
        "name": name,
        "p50_us": p50_us,
        "p99_us": p99_us,
        "steps": len(times_us),
        "ratio_p50": p50_us / ours_us,
    }


@contextmanager
def _nano_vllm(directory: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Its modules `scheduler` and `sequence`, without what they do not need.

    The package's own `__init__` and configuration import the model and its kernels, so both are
    stood in for while the scheduler is imported.
    """
    package = ModuleType("nanovllm")
    package.__path__ = [str(directory / "nanovllm")]
    config = ModuleType("nanovllm.config")
    config.Config = SimpleNamespace  # type: ignore[attr-defined]
    before = set(sys.modules)
    sys.modules["nanovllm"] = package
    sys.modules["nanovllm.config"] = config
    try:
        scheduler = importlib.import_module("nanovllm.engine.scheduler")
        yield scheduler, importlib.import_module("nanovllm.engine.sequence")
    finally:
        for module in set(sys.modules) - before:
            if module.partition(".")[0] == "nanovllm":
                del sys.modules[module]


def _run_nano_vllm(scheduler: Any, sequence: Any, num_sequences: int) -> list[float]:
    """Microseconds per step of `num_sequences` sequences, of which 1 % end and join in each."""
    parameters = importlib.import_module("nanovllm.sampling_params").SamplingParams
    block_size_tokens = sequence.Sequence.block_size
    config = SimpleNamespace(
        max_num_seqs=2 * num_sequences,
        max_num_batched_tokens=num_sequences + 8 * NUM_PROMPT_TOKENS,
        eos=-1,
        kvcache_block_size=block_size_tokens,
        num_kvcache_blocks=5 * num_sequences,
    )
    engine = scheduler.Scheduler(config)
    numbers = count()

    def new_sequence() -> Any:
        number = next(numbers)
        sampling = parameters(max_tokens=life_steps(number), ignore_eos=True)
        return sequence.Sequence([number] * NUM_PROMPT_TOKENS, sampling)

    for _ in range(num_sequences):
        engine.add(new_sequence())
    times_us = []
    for _ in range(MEAN_LIFE_STEPS + _PEER_STEPS):
        spare = [new_sequence() for _ in range(num_sequences // 8 + 8)]
        started = time.perf_counter()
        num_ended = _lane_step(engine)
        for joining in spare[:num_ended]:
            engine.add(joining)
        times_us.append((time.perf_counter() - started) * 1e6)
    return times_us[MEAN_LIFE_STEPS:]


def _lane_step(engine: Any) -> int:
    """Schedules and applies until everybody who decodes has got a token; returns who ended.

    It computes prompts in steps of their own, before any that decode.
    """
    num_before = len(engine.running) + len(engine.waiting)
    is_prefill = True
    while is_prefill:
        batch, is_prefill = engine.schedule()
        engine.postprocess(batch, [_SAMPLED_TOKEN] * len(batch), is_prefill)
    return num_before - len(engine.running) - len(engine.waiting)
