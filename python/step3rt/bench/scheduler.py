"""Measures the scheduler, and beside it those that people use, with the same trace.

A peer's code is never part of this project: it is loaded from where the caller says. Ours and
theirs are compared in CPU time of one thread, which other processes do not lengthen.
"""

import importlib
import json
import subprocess
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
    load: Load, *, num_steps: int, has_scaling: bool, peers: Mapping[str, str]
) -> dict[str, Any]:
    """The report of `_core.bench_scheduler` with `peers`: per peer its time and the ratio to ours.

    Args:
        load: how much runs at a time.
        num_steps: lane steps to measure.
        has_scaling: whether to measure other sizes as well.
        peers: where each is, by name: "nano-vllm", a directory with its sources, and "vllm", an
            interpreter that has it, or "" for this one.

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
    ours_us = report["schedule_apply_cpu_us"]["p50"]
    measure_peer = {"nano-vllm": _measure_nano_vllm, "vllm": _measure_vllm}
    for name, where in peers.items():
        try:
            version, times_us = measure_peer[name](where, load.sequences_per_lane_step)
        except _UnmeasuredError as error:
            report["peers"].append({"name": name, "skipped": str(error)})
            continue
        times_us.sort()
        p50_us, p99_us = times_us[len(times_us) // 2], times_us[len(times_us) * 99 // 100]
        figures = {"p50_us": p50_us, "p99_us": p99_us, "steps": len(times_us)}
        ratio = {"ratio_p50": p50_us / ours_us}
        report["peers"].append({"name": name, "version": version, **figures, **ratio})
    return report


class _UnmeasuredError(Exception):
    """A peer is not there or does not run; says why."""


def _measure_vllm(python: str, num_sequences: int) -> tuple[str, list[float]]:
    num_steps = MEAN_LIFE_STEPS + _PEER_STEPS
    load = {
        "lives": [life_steps(request) for request in range(num_sequences + 2 * num_steps)],
        "num_sequences": num_sequences,
        "num_prompt_tokens": NUM_PROMPT_TOKENS,
        "num_warmup": MEAN_LIFE_STEPS,
        "num_steps": _PEER_STEPS,
    }
    program = Path(__file__).with_name("vllm_scheduler.py")
    # -P: this directory's modules are not to be found in place of that interpreter's own.
    command = [python or sys.executable, "-P", str(program)]
    try:
        done = subprocess.run(
            command, input=json.dumps(load), capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise _UnmeasuredError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no output").splitlines()[-1]
        raise _UnmeasuredError(f"{command[0]} cannot run vLLM's scheduler: {last}") from error
    report = json.loads(done.stdout.splitlines()[-1])
    return report["version"], report["times_us"]


def _measure_nano_vllm(where: str, num_sequences: int) -> tuple[str, list[float]]:
    directory = Path(where)
    if not (directory / "nanovllm" / "engine" / "scheduler.py").is_file():
        raise _UnmeasuredError(f"{directory} has no nanovllm/engine/scheduler.py")
    try:
        with _nano_vllm(directory) as (scheduler, sequence):
            return "sources", _run_nano_vllm(scheduler, sequence, num_sequences)
    except ImportError as error:
        raise _UnmeasuredError(f"its sources cannot be imported: {error}") from error


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
    """CPU microseconds per step of `num_sequences` sequences, of which 1 % end and join in each."""
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
        started = time.thread_time()
        num_ended = _lane_step(engine)
        for joining in spare[:num_ended]:
            engine.add(joining)
        times_us.append((time.thread_time() - started) * 1e6)
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
