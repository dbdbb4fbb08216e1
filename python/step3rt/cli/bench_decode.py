"""`step3rt bench decode`: a whole cluster of this host that decodes.

Owns its flags and what becomes of the result; never measures: that is `step3rt.bench.decode`'s.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from step3rt.cli import flags
from step3rt.cli.signals import unwound_by_signals
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


def add_decode(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench decode`."""
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
    parser.add_argument(
        "--warmup-steps",
        type=int,
        default=100,
        help="before them; a GPU that reaches its power limit slows down over some seconds "
        "(default: 100)",
    )
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
