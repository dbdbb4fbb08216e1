"""Measures decoding by a whole local cluster: coordinator, instances, and gRPC streams.

Owns the run and the result's keys. The figures come from the coordinator's own log, where a line
says when each lane's step was done and how many tokens it gave: see `decode_figures`. A client that
timed 10,000 streams would measure itself. What a step consists of, devices record themselves: see
`decode_stages`; and when it was where on its way to the client: see `decode_path`.
"""

import asyncio
import contextlib
import datetime
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from step3rt.bench.commit import measured_commit
from step3rt.bench.decode_client import TokenTimes, decode_all
from step3rt.bench.decode_figures import measured_lanes, quantiles, read_steps, summarise
from step3rt.bench.decode_load import DecodeLoad, check
from step3rt.bench.decode_path import LaneStep, client_tpot_ms, path_report
from step3rt.bench.decode_stages import stage_report
from step3rt.bench.decode_work import Shape, sizes_of
from step3rt.bench.progress import ProgressLine, warn
from step3rt.config import (
    COLOCATED,
    REFERENCE_DEVICE,
    ServeConfig,
    resolve_model,
)
from step3rt.errors import InvalidArgument, Step3Error
from step3rt.local_cluster import LocalCluster
from step3rt.model.config import Step3Config
from step3rt.placement import HostConfig, num_gpus
from step3rt.plan.hardware import card_of_machine, load_hardware
from step3rt.trace.recording import Recording, load_all
from step3rt.trace.step_times import Rows, load_step_times

BLOCK_SIZE_TOKENS = 64
_WATCH_S = 0.1
"""Between looks at the cluster's processes."""

_DEATH_KNOWN_S = 1.0
"""Within which a process has ended whose sockets have closed."""

_LOG_FILTER = "warn,step3rt_server::drive=debug"


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
    check(load, num_lanes, config.max_model_len)
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
        "client_tpot_ms": quantiles(seen.tolist()) if len(seen) else None,
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
