"""`step3rt bench scheduler` and `replay`: what the scheduler costs, and what it decides.

Owns their flags and tables; never measures.
"""

import argparse
import json
from typing import Any

from step3rt.cli.signals import ended_by_ctrl_c
from step3rt.errors import InvalidArgument

_TRACES = ("bursty", "reasoning", "mixed")


def add_scheduler(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench scheduler`."""
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


def add_replay(parts: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench replay`."""
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


def _check_at_most(arguments: argparse.Namespace, **limits: int) -> None:
    """What is simulated lies in memory, of which a slip of the keyboard would take all."""
    for name, limit in limits.items():
        value = getattr(arguments, name)
        if value > limit:
            raise InvalidArgument(
                f"--{name} {value} cannot be measured. What runs is held in memory. Use at most "
                f"{limit}"
            )


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
