"""Times a step's way from the device's end to the client, without a device.

`python -m step3rt.bench.host_path` measures a cluster as `step3rt bench decode` does: coordinator,
sessions, instances' loop, streams and client are the product's. A clock is the device: all steps
take equally long, so what varies is the host's. Prints one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step3rt.bench.decode import DecodeLoad, measure
from step3rt.cli import flags, node
from step3rt.cli.log import log_to_stderr
from step3rt.config import NodeConfig, ServeConfig
from step3rt.local_cluster import LocalCluster
from step3rt.placement import HostConfig

_KEYS = ("steps", "batch", "lanes", "machine", "date", "commit")
_FIGURES = ("tokens_per_s", "tpot_ms", "jitter_ms", "client_tpot_ms", "path")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or with `node …` behind the flags is one of the instances."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("examples/step3-slice"))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--step-ms", type=float, default=37.0)
    parser.add_argument("--apart-ms", type=float, default=1.0, help="between lanes' first steps")
    parser.add_argument("--launch-ms", type=float, default=2.0)
    parser.add_argument("--log-dir", type=Path, help="keeps logs and what instances noted")
    parser.add_argument("node", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    if given.node:
        return _run_node(given)
    print(json.dumps(_measure(given)))  # noqa: T201
    return 0


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    clock = [
        f"--{name}-ms={value}"
        for name, value in (
            ("step", given.step_ms),
            ("apart", given.apart_ms),
            ("launch", given.launch_ms),
        )
    ]

    class ClockCluster(LocalCluster):
        """Its instances are this module's."""

        def command(self, arguments: Sequence[str]) -> list[str]:
            if arguments[0] != "node":
                return super().command(arguments)
            return [sys.executable, "-m", __spec__.name, *clock, *arguments]

    serve = ServeConfig(
        model=given.model,
        attention=1,
        ffn=1,
        lanes=given.lanes,
        dtype="bfloat16",
        precision="production",
    )
    load = DecodeLoad(batch=given.batch, context_tokens=given.context, steps=given.steps)
    host = HostConfig(devices=("cpu",), random_weights=True)
    result = measure(serve, load, host, log_dir=given.log_dir, cluster_type=ClockCluster)
    return {key: result[key] for key in (*_KEYS, *_FIGURES)}


def _run_node(given: argparse.Namespace) -> int:
    from step3rt.bench.clock_instance import Clock, run_clock_instance

    parser = argparse.ArgumentParser()
    node.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(given.node)
    flags.exit_with_parent(arguments.exit_with_parent)
    log_to_stderr()
    clock = Clock(
        step_ns=round(given.step_ms * 1e6),
        apart_ns=round(given.apart_ms * 1e6),
        launch_s=given.launch_ms / 1e3,
    )
    return run_clock_instance(flags.config_from(arguments, NodeConfig), clock)


if __name__ == "__main__":
    sys.exit(main())
