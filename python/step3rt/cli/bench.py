"""`step3rt bench`: figures of the parts, each with the machine that it was measured on.

Owns `kernels`, `engine` and `link`; whole clusters and the scheduler have files of their own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from step3rt.cli.bench_decode import add_decode
from step3rt.cli.bench_scheduler import add_replay, add_scheduler
from step3rt.cli.signals import unwound_by_signals
from step3rt.errors import InvalidArgument


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser("bench", help="measure a part of step3rt")
    parts = parser.add_subparsers(title="parts", dest="part", required=True)
    add_scheduler(parts)
    add_replay(parts)
    _add_kernels(parts)
    _add_engine(parts)
    _add_link(parts)
    add_decode(parts)


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
