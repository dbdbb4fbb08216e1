"""`step3rt bench`: figures of the parts, each with the machine that it was measured on."""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from step3rt.cli import flags
from step3rt.cli.signals import ended_by_ctrl_c, unwound_by_signals
from step3rt.config import ServeConfig
from step3rt.errors import InvalidArgument, Step3Error
from step3rt.placement import HostConfig

_SET_BY_LOAD = (
    "listen",
    "control_listen",
    "ready_file",
    "max_model_len",
    "max_tokens_per_micro_batch",
    "max_sequences_per_lane",
    "max_waiting_requests",
    "log_format",
    "assume_computed_prompts",
)
"""Settings of a cluster that a load to decode decides."""

_TRACES = ("bursty", "reasoning", "mixed")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser("bench", help="measure a part of step3rt")
    parts = parser.add_subparsers(title="parts", dest="part", required=True)
    _add_scheduler(parts)
    _add_replay(parts)
    _add_kernels(parts)
    _add_engine(parts)
    _add_link(parts)
    _add_decode(parts)


def _add_scheduler(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = parts.add_parser("scheduler", help="what one lane step costs the scheduler")
    parser.add_argument("--sequences", type=int, default=6_144, help="that run at a time")
    parser.add_argument("--attention", type=int, default=16, help="attention instances")
    parser.add_argument("--lanes", type=int, default=3, help="micro-batch lanes per instance")
    parser.add_argument("--steps", type=int, default=10_000, help="lane steps to measure")
    parser.add_argument(
        "--scaling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure from 256 to 65,536 sequences as well",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="measure another scheduler beside it, with the same trace: nano-vllm=DIR with its "
        "sources, vllm, or vllm=PYTHON, an interpreter that has vLLM",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run_scheduler)


def _add_replay(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = parts.add_parser(
        "replay", help="a trace through the scheduler and first-come-first-served, simulated"
    )
    parser.add_argument("--trace", choices=_TRACES, required=True)
    parser.add_argument("--seed", type=int, default=1, help="another trace of the same kind")
    parser.add_argument("--requests", type=int, default=600, help="length of the trace")
    parser.add_argument("--attention", type=int, default=2, help="attention instances")
    parser.add_argument("--kv-blocks", type=int, default=4_096, help="of 64 tokens, per instance")
    parser.add_argument("--tpot-target-ms", type=float, default=50.0)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run_replay)


def _add_kernels(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    # Its flags are its own: no character begins one here, so all of them reach it as they are.
    parser = parts.add_parser(
        "kernels", help="the CUDA kernels on this host's GPU", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("flags", nargs="*")
    parser.set_defaults(run=run_kernels)


def _add_engine(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = parts.add_parser("engine", help="prefill and decoding of a whole model, one GPU")
    parser.add_argument(
        "--model", default="nano", help="checkpoint directory, or nano (default: nano)"
    )
    parser.add_argument("--sequences", type=int, default=64, help="decoded together (default: 64)")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens of each at the start (default: 1024)"
    )
    parser.add_argument(
        "--prefill-tokens", type=int, default=1024, help="of a step of prefill (default: 1024)"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="make weights up, of the sizes in config.json"
    )
    parser.set_defaults(run=run_engine)


def _add_link(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = parts.add_parser("link", help="one-way times of a link between two processes")
    parser.add_argument("--fabric", choices=("shm", "tcp", "rdma", "cuda_ipc"), required=True)
    parser.add_argument(
        "--bytes", type=int, default=917_504, help="payload of a frame (default: 917504)"
    )
    parser.add_argument(
        "--peers", type=int, default=2, help="processes, two by two (default: 2; cuda_ipc has 2)"
    )
    parser.add_argument(
        "--tls", action="store_true", help="an encrypted link beside the plain one; tcp only"
    )
    parser.add_argument(
        "--rounds", type=int, help="there and back (default: 2000; cuda_ipc has its own)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run_link)


def _add_decode(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = parts.add_parser(
        "decode",
        help="decoding by a whole local cluster, scheduler and gRPC streams included",
        description="Start a cluster on this host, let every sequence begin at its context with "
        "random K and V, decode, and report what each lane's steps took.",
    )
    parser.add_argument("--batch", type=int, default=48, help="sequences at a time (default: 48)")
    parser.add_argument(
        "--context", type=int, default=1024, help="mean tokens of a sequence (default: 1024)"
    )
    parser.add_argument(
        "--spread", type=float, default=0.0, help="lengths differ by this share (default: 0)"
    )
    parser.add_argument("--steps", type=int, default=200, help="measured steps of each lane")
    parser.add_argument("--warmup-steps", type=int, default=20, help="before them (default: 20)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Perfetto trace; needs --devices"
    )
    parser.add_argument(
        "--stages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="devices note times for what a step consists of; --no-stages shows what that costs",
    )
    parser.add_argument(
        "--name", help="what the result calls the run (default: its deployment and model)"
    )
    parser.add_argument("--log-dir", type=Path, help="keep the processes' logs and recordings here")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    flags.add_config_file_flag(parser)
    flags.add_config_flags(parser, HostConfig, skip=("kv_blocks",), title="placement")
    flags.add_config_flags(parser, ServeConfig, skip=_SET_BY_LOAD)
    parser.set_defaults(run=run_decode)


def run_decode(arguments: argparse.Namespace) -> int:
    """Prints one line of JSON and returns 0.

    Raises:
        Step3Error: the load cannot be measured on this host.
    """
    from step3rt.bench import decode
    from step3rt.bench.decode_load import DecodeLoad

    load = DecodeLoad(
        batch=arguments.batch,
        context_tokens=arguments.context,
        spread=arguments.spread,
        steps=arguments.steps,
        warmup_steps=arguments.warmup_steps,
    )
    serve, host = flags.cluster_from(arguments, {"model": Path("nano")})
    _check_outputs(arguments.trace, arguments.out)
    with (
        unwound_by_signals(),
        tempfile.TemporaryDirectory(prefix="step3rt-trace-") as directory,
    ):
        trace_dir = Path(directory) if arguments.log_dir is None else arguments.log_dir / "trace"
        values = decode.measure(
            serve,
            load,
            host,
            trace_dir=trace_dir if arguments.trace is not None else None,
            log_dir=arguments.log_dir,
            has_stages=arguments.stages,
            name=arguments.name,
        )
        if arguments.trace is not None:
            values |= _write_trace(trace_dir, arguments.trace)
    report = json.dumps(values)
    print(report, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(report + "\n", encoding="utf-8")
    return 0


def _check_outputs(trace: Path | None, out: Path | None) -> None:
    """Checks that what a run gives can be kept, before it takes its time.

    Raises:
        InvalidArgument: a file cannot be written where it should be.
        ConfigError: a trace is wanted and the package that writes it is not installed.
    """
    for flag, path in (("--trace", trace), ("--out", out)):
        if path is None:
            continue
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidArgument(
                f"{flag} {str(path)!r} cannot be written. It is a directory, or the one that it "
                "should be in does not exist or takes no files. Give another file"
            )
    if trace is not None:
        from step3rt.trace import perfetto

        perfetto.check_installed()


def _write_trace(directory: Path, out: Path) -> dict[str, Any]:
    """Writes a Perfetto trace of the recordings in `directory`.

    Returns:
        Keys of the result: the recordings' summary, or why there is none. Without a trace the run
        is still worth its figures.
    """
    from step3rt.bench.progress import warn
    from step3rt.trace import perfetto
    from step3rt.trace.recording import load_all
    from step3rt.trace.summary import summarise
    from step3rt.trace.timeline import build

    try:
        timeline = build(load_all(directory))
        perfetto.write(timeline, out)
        return {"trace": summarise(timeline)}
    except Step3Error as error:
        warn(f"there is no trace: {error}")
        return {"trace_missing": str(error)}


def run_scheduler(arguments: argparse.Namespace) -> int:
    """Prints and returns 0.

    Raises:
        InvalidArgument: a flag cannot be used.
    """
    from step3rt.bench import scheduler

    _check_at_most(arguments, sequences=1_000_000, attention=1024, steps=10_000_000)
    peers = dict(_parse_peer(text) for text in arguments.peer)
    with ended_by_ctrl_c():
        report = scheduler.measure(
            scheduler.Load(arguments.sequences, arguments.attention, arguments.lanes),
            num_steps=arguments.steps,
            has_scaling=arguments.scaling,
            peers=peers,
        )
    if not arguments.json:
        _print_scheduler(report)
    print(json.dumps(report))
    return 0


def _check_at_most(arguments: argparse.Namespace, **limits: int) -> None:
    """What is simulated lies in memory, of which a slip of the keyboard would take all."""
    for name, limit in limits.items():
        value = getattr(arguments, name)
        if value > limit:
            raise InvalidArgument(
                f"--{name} {value} cannot be measured. What runs is held in memory. Use at most "
                f"{limit}"
            )


def run_replay(arguments: argparse.Namespace) -> int:
    """Prints and returns 0.

    Raises:
        InvalidArgument: a flag cannot be used.
    """
    from step3rt import _core

    _check_at_most(arguments, requests=1_000_000, attention=1024)
    names = ("trace", "seed", "requests", "attention", "kv_blocks", "tpot_target_ms")
    options = {name: getattr(arguments, name) for name in names}
    with ended_by_ctrl_c():
        report: dict[str, Any] = json.loads(_core.replay_traffic(json.dumps(options)))
    if not arguments.json:
        _print_replay(report)
    print(json.dumps({**options, **report}))
    return 0


def run_kernels(arguments: argparse.Namespace) -> int:
    """Hands over to the kernels' own command and returns its exit code."""
    from step3rt.bench import kernels

    return kernels.main(arguments.flags)


def run_engine(arguments: argparse.Namespace) -> int:
    """Prints one line of JSON and returns 0.

    Raises:
        Step3Error: the model or this host cannot be used.
    """
    from step3rt.bench import engine
    from step3rt.config import resolve_model

    model = resolve_model(Path(arguments.model))
    load = engine.EngineLoad(
        num_sequences=arguments.sequences,
        num_context_tokens=arguments.context,
        prefill_tokens=arguments.prefill_tokens,
    )
    print(json.dumps(engine.measure(model, load, has_random_weights=arguments.random_weights)))
    return 0


def run_link(arguments: argparse.Namespace) -> int:
    """Prints and returns 0.

    Raises:
        InvalidArgument: a flag cannot be used.
        Unavailable: this host has no such link.
    """
    with unwound_by_signals():
        report = _measure_link(arguments)
    if not arguments.json:
        quantiles = ", ".join(f"{key} {us} us" for key, us in report["one_way_us"].items())
        baseline = report["baseline"]
        print(
            f"{report['fabric']}, {report['bytes']} bytes one way: {quantiles}; "
            f"{baseline['name']} p50 {baseline['one_way_us']['p50']} us"
        )
        if "tls" in report:
            tls = report["tls"]
            quantiles = ", ".join(f"{key} {us} us" for key, us in tls["one_way_us"].items())
            print(f"encrypted: {quantiles}; {tls['times_plain_p50']} times plain p50")
    print(json.dumps(report))
    return 0


def _measure_link(arguments: argparse.Namespace) -> dict[str, Any]:
    for flag in ("bytes", "rounds"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise InvalidArgument(f"--{flag} {value} cannot be measured. Use --{flag} 1 or more")
    if arguments.tls and arguments.fabric != "tcp":
        raise InvalidArgument(
            f"--tls was given with --fabric {arguments.fabric}, which is never encrypted. Use "
            "--fabric tcp"
        )
    if arguments.fabric != "cuda_ipc":
        from step3rt.bench import link

        num_rounds = link.NUM_ROUNDS if arguments.rounds is None else arguments.rounds
        load = link.Load(arguments.bytes, arguments.peers, num_rounds)
        return link.measure(arguments.fabric, load, has_tls=arguments.tls)
    if arguments.peers != 2:
        raise InvalidArgument(
            f"--peers {arguments.peers} cannot be measured with --fabric cuda_ipc. Use --peers 2"
        )
    if arguments.rounds is not None:
        raise InvalidArgument(
            "--rounds cannot be used with --fabric cuda_ipc: it measures as many as the size "
            "needs. Leave --rounds out"
        )
    from step3rt.bench import device_link

    return device_link.measure(arguments.bytes)


def _parse_peer(text: str) -> tuple[str, str]:
    name, _, where = text.partition("=")
    if name != "vllm" and not (name == "nano-vllm" and where):
        raise InvalidArgument(
            f"--peer {text!r} names no peer. The schedulers of nano-vllm, from a directory with "
            "its sources, and of vLLM, from an interpreter that has it, can be measured beside "
            "ours. Use --peer nano-vllm=DIR, --peer vllm or --peer vllm=PYTHON"
        )
    return name, where


def _print_scheduler(report: dict[str, Any]) -> None:
    times, cpu = report["schedule_apply_us"], report["schedule_apply_cpu_us"]
    print(f"{report['sequences_per_lane_step']} sequences per lane step on {report['machine']}")
    for name, quantiles in (("wall clock", times), ("on a core", cpu)):
        figures = ", ".join(f"{key} {value:.0f} us" for key, value in quantiles.items())
        print(f"  {name}: {figures}")
    print(f"  resident memory grew by {report['resident_growth_kib']} KiB in {report['steps']}")
    for point in report["scaling"]:
        cost = f"{point['p50_us']:.0f} us, {point['ns_per_sequence']:.0f} ns per sequence"
        print(f"  {point['sequences']:>6} sequences: p50 {cost}")
    for peer in report["peers"]:
        if "skipped" in peer:
            print(f"  {peer['name']}: skipped: {peer['skipped']}")
        else:
            cost = f"p50 {peer['p50_us']:.0f} us, {peer['ratio_p50']:.1f} times ours"
            print(f"  {peer['name']} ({peer['version']}), on a core: {cost}")


def _print_replay(report: dict[str, Any]) -> None:
    print(f"{'':24}{'step3rt':>12}{'fcfs':>12}")
    ours, theirs = report["step3rt"], report["fcfs"]
    for name, value in ours.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, dict):
                    for quantile, figure in inner.items():
                        other = theirs[name].get(key, {}).get(quantile, 0.0)
                        _print_row(f"ttft_ms {quantile} (prio {key})", figure, other)
                else:
                    _print_row(f"{name} {key}", inner, theirs[name][key])
        else:
            _print_row(name, value, theirs[name])


def _print_row(name: str, ours: float, theirs: float) -> None:
    print(f"{name:24}{ours:>12.2f}{theirs:>12.2f}")
