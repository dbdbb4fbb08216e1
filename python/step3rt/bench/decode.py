"""Measures decoding by a whole local cluster: coordinator, instances, and gRPC streams.

Owns the load and the arithmetic; the figures come from the coordinator's own log, where a line says
when each lane's step was done and how many tokens it gave. A client that timed 10,000 streams would
measure itself. What a step consists of, devices record themselves: see `decode_stages`; and when it
was where on its way to the client: see `decode_path`.
"""

import asyncio
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from step3rt.bench.commit import measured_commit
from step3rt.bench.decode_client import TokenTimes, decode_all
from step3rt.bench.decode_path import LaneStep, client_tpot_ms, path_report
from step3rt.bench.decode_stages import MAX_STEPS, stage_report
from step3rt.bench.decode_work import Shape, sizes_of
from step3rt.bench.progress import ProgressLine, warn
from step3rt.config import (
    COLOCATED,
    MAX_TRACE_STEPS,
    REFERENCE_DEVICE,
    ServeConfig,
    resolve_model,
)
from step3rt.errors import InvalidArgument, Step3Error, Unavailable
from step3rt.local_cluster import LocalCluster
from step3rt.model.config import Step3Config
from step3rt.placement import HostConfig, num_gpus
from step3rt.plan.hardware import card_of_machine, load_hardware
from step3rt.timing import percentile
from step3rt.trace.recording import Recording, load_all
from step3rt.trace.step_times import Rows, load_step_times

BLOCK_SIZE_TOKENS = 64
_SLACK_STEPS = 48
"""Streams start one after the other; so many steps may pass until the last one decodes."""

_WATCH_S = 0.1
"""Between looks at the cluster's processes."""

_DEATH_KNOWN_S = 1.0
"""Within which a process has ended whose sockets have closed."""

_STEP_LINE = "step done"
_LOG_FILTER = "warn,step3rt_server::drive=debug"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """What decodes, and for how long.

    Attributes:
        batch: sequences at a time over all lanes and attention instances, a multiple of those.
        context_tokens: mean length of a sequence over the measured steps.
        spread: lengths are drawn from `context_tokens` times 1 - spread to 1 + spread.
        steps: measured steps of each lane, after `warmup_steps`.
    """

    batch: int
    context_tokens: int
    spread: float = 0.0
    steps: int = 200
    warmup_steps: int = 20
    seed: int = 0

    @property
    def trace_steps(self) -> int:
        """Steps of a lane that devices record: what stages are means of, and those that follow."""
        return min(MAX_TRACE_STEPS, self.stage_steps + 2 * _SLACK_STEPS)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that every stream generates: before, while and after it is measured."""
        return self.warmup_steps + self.steps + 2 * _SLACK_STEPS

    @property
    def grown_tokens(self) -> int:
        """Tokens that a sequence has generated when half of the measured steps are over."""
        return _SLACK_STEPS + self.warmup_steps + self.steps // 2

    @property
    def stage_steps(self) -> int:
        """Steps of each lane that stages are means of: the last ones with every sequence."""
        return min(MAX_STEPS, self.steps)

    @property
    def stage_context_tokens(self) -> float:
        """Mean length of a sequence over those steps, the last of which begins the last token."""
        after_middle = self.max_new_tokens - self.grown_tokens - self.stage_steps / 2
        return self.context_tokens + after_middle

    def prompt_lengths(self) -> list[int]:
        """Tokens of each sequence at the start: `context_tokens` are reached half way."""
        draw = random.Random(self.seed)
        shares = [1 + self.spread * draw.uniform(-1, 1) for _ in range(self.batch)]
        return [round(self.context_tokens * share) - self.grown_tokens for share in shares]


def measure(
    serve: ServeConfig,
    load: DecodeLoad,
    host: HostConfig | None = None,
    *,
    trace_dir: Path | None = None,
    log_dir: Path | None = None,
    has_stages: bool = True,
    name: str | None = None,
) -> dict[str, Any]:
    """Starts a cluster, decodes, stops it, and returns the result file's object.

    Args:
        serve: the cluster; its limits are set for the load.
        load: what decodes.
        host: how the instances are started.
        trace_dir: see `LocalCluster`.
        log_dir: see `LocalCluster`.
        has_stages: devices note times, for what a step consists of. Without, nothing of a run is
            noted on them, to see what noting costs.
        name: what the result calls the run; None: its deployment and model.

    Raises:
        ConfigError: the placement does not fit the cluster.
        InvalidArgument: the load does not fit the cluster or the model; or a trace is wanted of
            what is not noted.
        Unavailable: a process of the cluster ended; or the streams did not all decode at the same
            time for long enough.
    """
    host = host or HostConfig()
    devices = host.used_devices(serve)
    gpus = num_gpus(devices)
    # Instances of the device pipeline record their times.
    is_on_devices = REFERENCE_DEVICE not in devices
    if trace_dir is not None and not has_stages:
        raise InvalidArgument(
            "A trace was asked for, and no stages. A trace is made of the times that stages are "
            "made of. Leave out --trace or --no-stages"
        )
    if trace_dir is not None and not is_on_devices:
        raise InvalidArgument(
            "A trace was asked for, and a device is 'reference'. Instances of the device pipeline "
            "note times, others do not. Set --devices to cpu or cuda:N, or leave out --trace"
        )
    config = Step3Config.from_directory(resolve_model(serve.model))
    num_lanes = serve.attention * serve.lanes
    _check(load, num_lanes, config.max_model_len)
    longest = max(load.prompt_lengths()) + load.max_new_tokens
    per_lane = load.batch // num_lanes
    settings = replace(
        serve,
        listen="127.0.0.1:0",
        assume_computed_prompts=True,
        max_sequences_per_lane=per_lane,
        max_tokens_per_micro_batch=max(per_lane, 16),
        max_waiting_requests=max(load.batch, 1024),
        max_model_len=longest + 1,
        log_format="json",
    )
    blocks_each = -(-(longest + 1) // BLOCK_SIZE_TOKENS)
    # A sixteenth more: newcomers leave some blocks to those that grow.
    host = replace(host, kv_blocks=per_lane * serve.lanes * blocks_each * 17 // 16 + 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment("STEP3RT_LOG", _LOG_FILTER))
        if log_dir is None:
            directory = tempfile.TemporaryDirectory(prefix="step3rt-bench-")
            log_dir = Path(stack.enter_context(directory))
        if trace_dir is None and is_on_devices and has_stages:
            trace_dir = log_dir / "trace"
        if trace_dir is not None:
            _forget_recordings(trace_dir)
        log = log_dir / "coordinator.log"
        # Logs are appended to: what an earlier run has left there is not this one's.
        log_begin = log.stat().st_size if log.exists() else 0
        progress = ProgressLine("tokens of each stream", load.max_new_tokens)
        stack.callback(progress.close)
        with LocalCluster(
            settings,
            **host.options(),
            trace_dir=trace_dir,
            trace_steps=load.trace_steps,
            log_dir=log_dir,
            on_status=progress.say,
        ) as cluster:
            streams = asyncio.run(_decode(cluster, load, config.vocab_size, progress))
            fabrics = _fabrics(cluster)
        recordings = _recordings(trace_dir)
        hosts = _step_times(trace_dir)
        lines = log.read_bytes()[log_begin:].decode("utf-8").splitlines()
    steps = read_steps(lines)
    figures = summarise(steps, load, num_lanes, config.num_layers)
    figures |= _path(steps, measured_lanes(steps, load, num_lanes), hosts, streams)
    if gpus:
        per_gpu = figures["tokens_per_s"] / gpus
        figures["tokens_per_s_per_gpu"] = round(per_gpu, 1)
    machine = _machine(gpus)
    if is_on_devices and not has_stages:
        figures |= _without_stages(figures["stages"], "--no-stages: no times were noted")
    if recordings is not None:
        shape = _shape(serve, load, config)
        figures |= _stages(recordings, shape, load, machine, figures["stages"])
    return {
        "run": name or _run_name(serve, host),
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": measured_commit(),
        "command": shlex.join(["step3rt", *sys.argv[1:]]),
        "gpus": gpus,
        "devices": devices,
        "instances": serve.attention + serve.ffn,
        "attention": serve.attention,
        "ffn": serve.ffn,
        "placement": host.placement,
        "fabrics": fabrics,
        "context": load.context_tokens,
        "context_spread": load.spread,
        "contexts_are_random_kv": True,
        "batch": load.batch,
        "lanes": serve.lanes,
        "layers": config.num_layers,
        "experts": config.num_experts,
        "model": sizes_of(config),
        "kv_dtype": serve.wire_dtypes()[2],
        "weight_dtype": "fp8" if is_on_devices else serve.dtype,
        "random_weights": host.random_weights,
        "natural_routing": True,
        "scheduler_in_loop": True,
        **figures,
    }


def _run_name(serve: ServeConfig, host: HostConfig) -> str:
    model = resolve_model(serve.model).name
    if host.placement == COLOCATED:
        return f"colocated-{serve.attention}-{model}"
    return f"{serve.attention}a{serve.ffn}f-{model}"


def read_steps(lines: Sequence[str]) -> list[LaneStep]:
    """The lane steps in a coordinator's log with JSON lines, as they were done."""
    steps = []
    for line in lines:
        if _STEP_LINE not in line:
            continue
        values = json.loads(line)["fields"]
        if values.get("message") == _STEP_LINE:
            steps.append(LaneStep(*(int(values[name]) for name in LaneStep.__slots__)))
    return steps


def summarise(
    steps: Sequence[LaneStep], load: DecodeLoad, num_lanes: int, num_layers: int
) -> dict[str, Any]:
    """The figures over the window in which every sequence decodes.

    TPOT is the time from one step of a lane to its next, once for each token of it.

    Raises:
        Unavailable: some lane has fewer such steps than `load.steps`.
    """
    lanes = measured_lanes(steps, load, num_lanes)
    gaps_ms = [
        ((after.at_ns - before.at_ns) / 1e6, after.num_tokens)
        for lane in lanes
        for before, after in pairwise(lane)
    ]
    weighted = [gap for gap, num_tokens in gaps_ms for _ in range(num_tokens)]
    # Each lane's own rate: lanes do not begin and end together.
    tokens_per_s = sum(
        sum(step.num_tokens for step in lane[1:]) * 1e9 / (lane[-1].at_ns - lane[0].at_ns)
        for lane in lanes
    )
    measured = [step for lane in lanes for step in lane[1:]]
    step_ms = _quantiles([gap for gap, _ in gaps_ms])
    about_trend = _quantiles([gap for lane in lanes for gap in _about_trend_ms(lane)])
    return {
        "steps": load.steps,
        "tokens_per_s": round(tokens_per_s, 1),
        "tpot_ms": _quantiles(weighted),
        "step_ms": step_ms,
        "jitter_ms": round(step_ms["p99"] - step_ms["p50"], 3),
        "jitter_about_trend_ms": round(about_trend["p99"] - about_trend["p50"], 3),
        "stages": {
            "attention": {"us": _per_layer_us(measured, "compute_ns", num_layers)},
            "wait": {"us": _per_layer_us(measured, "wait_ns", num_layers)},
            "lane_step": {"us": _per_layer_us(measured, "total_ns", num_layers)},
        },
    }


def measured_lanes(
    steps: Sequence[LaneStep], load: DecodeLoad, num_lanes: int
) -> list[list[LaneStep]]:
    """Lane by lane, the steps that are measured, behind the one from which they are timed.

    Raises:
        Unavailable: some lane has fewer such steps than `load.steps`.
    """
    lanes = [lane[load.warmup_steps :][: load.steps + 1] for lane in _full_steps(steps, load)]
    if len(lanes) < num_lanes or any(len(lane) <= load.steps for lane in lanes):
        lengths = [len(lane) for lane in lanes]
        raise Unavailable(
            f"Only {lengths} steps of {num_lanes} lanes had all their sequences. {load.steps} are "
            "needed after the warm-up. Measure fewer sequences, or more steps"
        )
    return lanes


def _about_trend_ms(lane: Sequence[LaneStep]) -> list[float]:
    """A lane's times from step to step, less the straight line on which contexts lengthen them."""
    gaps = [(after.at_ns - before.at_ns) / 1e6 for before, after in pairwise(lane)]
    if len(gaps) < 2:
        return [0.0] * len(gaps)
    slope, start = statistics.linear_regression(range(len(gaps)), gaps)
    return [gap - start - slope * index for index, gap in enumerate(gaps)]


def _full_steps(steps: Sequence[LaneStep], load: DecodeLoad) -> list[list[LaneStep]]:
    """Per lane, its steps from when all sequences of all lanes decode until the first one ends."""
    sequences: dict[tuple[int, int], int] = {}
    for step in steps:
        key = step.instance, step.lane
        sequences[key] = max(sequences.get(key, 0), step.num_tokens)
    if sum(sequences.values()) < load.batch:
        return []
    is_full = {key: False for key in sequences}
    lanes: dict[tuple[int, int], list[LaneStep]] = {key: [] for key in sequences}
    for step in steps:
        key = step.instance, step.lane
        is_full[key] = step.num_tokens == sequences[key]
        if all(is_full.values()):
            lanes[key].append(step)
        elif any(lanes.values()):
            break
    return list(lanes.values())


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    shares = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "max": max(values)}
    return {name: round(value or 0.0, 3) for name, value in shares.items()}


def _forget_recordings(directory: Path) -> None:
    """Removes what instances of an earlier run have left: this run may have fewer of them."""
    for pattern in ("attention-*.npz", "ffn-*.npz", "steps-*.npy"):
        for path in directory.glob(pattern):
            path.unlink()


def _recordings(directory: Path | None) -> list[Recording] | Step3Error | None:
    """What the instances recorded; or why there is nothing, when they should have."""
    if directory is None:
        return None
    try:
        return load_all(directory)
    except Step3Error as error:
        return error


def _step_times(directory: Path | None) -> list[Rows]:
    """What the attention instances noted on their hosts; nothing where they note nothing."""
    if directory is None:
        return []
    try:
        return load_step_times(directory)
    except Step3Error as error:
        warn(f"the result does not say when instances saw their steps' ends: {error}")
        return []


def _path(
    steps: Sequence[LaneStep],
    lanes: Sequence[Sequence[LaneStep]],
    hosts: Sequence[Rows],
    streams: Sequence[TokenTimes],
) -> dict[str, Any]:
    seen = client_tpot_ms(lanes, steps, streams)
    return {
        "client_tpot_ms": _quantiles(seen.tolist()) if len(seen) else None,
        "path": path_report(lanes, steps, hosts, streams),
    }


def _stages(
    recordings: list[Recording] | Step3Error,
    shape: Shape,
    load: DecodeLoad,
    machine: str,
    known: dict[str, Any],
) -> dict[str, Any]:
    """The result's keys of stages. Without them the run is still worth its figures."""
    try:
        if isinstance(recordings, Step3Error):
            raise recordings
        card = card_of_machine(machine, load_hardware())
        report = stage_report(recordings, shape, card, load.stage_steps)
    except Step3Error as error:
        warn(f"the result has no stages: {error}")
        return _without_stages(known, str(error))
    report["stages"]["lane_step"] = known["lane_step"]
    return report


def _without_stages(known: dict[str, Any], reason: str) -> dict[str, Any]:
    # The coordinator knows how long a step took, but not what it was spent on.
    return {"stages": {"lane_step": known["lane_step"]}, "stages_missing": reason}


def _shape(serve: ServeConfig, load: DecodeLoad, config: Step3Config) -> Shape:
    return Shape(
        config=config,
        num_attention=serve.attention,
        num_ffn=serve.ffn,
        num_lanes=serve.lanes,
        batch=load.batch,
        context_tokens=load.stage_context_tokens,
        kv_dtype=serve.wire_dtypes()[2],
    )


def _per_layer_us(steps: Sequence[LaneStep], name: str, num_layers: int) -> float:
    return round(statistics.fmean(getattr(step, name) for step in steps) / num_layers / 1e3, 2)


async def _decode(
    cluster: LocalCluster, load: DecodeLoad, vocab_size: int, progress: ProgressLine
) -> list[TokenTimes]:
    """Decodes as long as all processes live: nobody takes the place of one that ends."""

    async def watch() -> NoReturn:
        while True:
            cluster.check()
            await asyncio.sleep(_WATCH_S)

    tokens = (load.max_new_tokens, vocab_size, load.seed + 1)
    streams = asyncio.create_task(
        decode_all(cluster.address, load.prompt_lengths(), *tokens, progress)
    )
    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait({streams, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not streams.done() or streams.exception() is not None:
            # How a process died says more than that streams failed, and is known a moment later.
            await asyncio.wait({watcher}, timeout=_DEATH_KNOWN_S)
            if watcher.done():
                watcher.result()
        return streams.result()
    finally:
        for task in (streams, watcher):
            task.cancel()
        await asyncio.gather(streams, watcher, return_exceptions=True)


def _check(load: DecodeLoad, num_lanes: int, max_context_tokens: int) -> None:
    if load.batch < 1 or load.batch % num_lanes:
        raise InvalidArgument(
            f"batch={load.batch} cannot be spread over {num_lanes} lanes. Every lane gets as many "
            f"sequences as any other. Use a multiple of {num_lanes}"
        )
    if load.steps < 1 or load.warmup_steps < 0 or not 0 <= load.spread < 1:
        raise InvalidArgument(
            f"steps={load.steps}, warmup_steps={load.warmup_steps}, spread={load.spread} cannot be "
            "measured. Use 1 step or more, a warm-up of 0 or more, and a spread from 0 to below 1"
        )
    lengths = load.prompt_lengths()
    if min(lengths) < 1:
        raise InvalidArgument(
            f"A sequence would begin with {min(lengths)} tokens, to have its share of "
            f"context={load.context_tokens} once it has generated {load.grown_tokens}. A sequence "
            "begins with one token or more. Use a longer context, fewer steps or a smaller spread"
        )
    longest = max(lengths) + load.max_new_tokens
    if longest > max_context_tokens:
        raise InvalidArgument(
            f"The longest sequence would reach {longest} tokens. The model takes "
            f"{max_context_tokens}. Use a shorter context or fewer steps"
        )


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable for the processes that are started within."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _machine(num_gpus: int) -> str:
    if num_gpus == 0:
        return f"{os.cpu_count()} CPU cores, {platform.machine()}"
    import torch

    return f"{num_gpus} x {torch.cuda.get_device_name()}"


def _fabrics(cluster: LocalCluster) -> list[str]:
    links = [link for item in cluster.instances() for link in item["links"]]  # type: ignore[attr-defined]
    return sorted({link["fabric"] for link in links})
