"""`step3rt sim`: the scheduler in a simulated world of faults, many seeds or one in words."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from typing import Any

from step3rt.errors import InvalidArgument

_DESCRIPTION = """\
Drive the real scheduler with simulated instances, network and clients. One seed decides everything:
what is asked, what breaks, and when. Every promise is checked after every event. A seed that breaks
one is printed and replays event by event:
  step3rt sim --seeds 20000            many seeds; exits with 1 if one breaks a promise
  step3rt sim --seed 4711 --trace      one seed in words
The last line is JSON.
"""

_MAX_SHOWN = 20
# Between two batches, Ctrl-C is heard; one takes a second or two.
_BATCH_SEEDS = 500
_MAX_SEED = 2**64


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "sim",
        help="check the scheduler against simulated faults",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, default=1_000, help="how many (default: 1000)")
    which.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--first-seed", type=int, default=0, help="where to begin (default: 0)")
    parser.add_argument("--trace", action="store_true", help="tell every event of --seed in words")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="seeds at a time (default: cores)"
    )
    parser.add_argument(
        "--sabotage",
        metavar="KIND",
        help="break something on purpose, to see that it is found; a wrong KIND lists them",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if every promise was kept, 1 if not.

    Raises:
        InvalidArgument: the flags do not go together, or there is no such sabotage.
    """
    first, count = arguments.first_seed, arguments.seeds
    if arguments.seed is not None:
        first, count = arguments.seed, 1
    elif arguments.trace:
        raise InvalidArgument(
            "--trace is given without --seed. Many seeds at a time cannot be told in words. Name "
            "the seed with --seed"
        )
    if count < 1 or arguments.threads < 1 or first < 0 or first + count > _MAX_SEED:
        raise InvalidArgument(
            f"{count} seeds from {first} on with {arguments.threads} threads cannot be run. Seeds "
            "lie below 2**64, and there must be at least one seed and one thread. Correct the flag"
        )
    started = time.perf_counter()
    num_violations = 0
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    events = judged = pushed = 0
    for batch in range(first, first + count, _BATCH_SEEDS):
        report = _simulate(batch, min(_BATCH_SEEDS, first + count - batch), arguments)
        if arguments.trace:
            sys.stdout.write(report["trace"])
        for violation in report["violations"]:
            num_violations += 1
            if num_violations <= _MAX_SHOWN:
                _show(violation["seed"], violation["what"], arguments)
        faults.update(report["faults"])
        ends.update(report["ends"])
        events += report["events"]
        judged += report["judged_steps"][0]
        pushed += report["judged_steps"][1]
    if num_violations > _MAX_SHOWN:
        print(f"... and {num_violations - _MAX_SHOWN} seeds more")
    summary = {
        "seeds": count,
        "violations": num_violations,
        "faults": dict(faults),
        "ends": dict(ends),
        "steps_with_decodes_and_prompts": judged,
        "pushed_past_target": pushed,
        "events": events,
        "seconds": round(time.perf_counter() - started, 3),
    }
    print(json.dumps(summary))
    return 1 if num_violations else 0


def _simulate(first_seed: int, seeds: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from step3rt import _core

    options = {
        "first_seed": first_seed,
        "seeds": seeds,
        "threads": arguments.threads,
        "sabotage": arguments.sabotage,
        "trace": arguments.trace,
    }
    report: dict[str, Any] = json.loads(_core.simulate(json.dumps(options)))
    return report


def _show(seed: int, what: str, arguments: argparse.Namespace) -> None:
    print(f"seed {seed}: {what}")
    if not arguments.trace:
        sabotage = f" --sabotage {arguments.sabotage}" if arguments.sabotage else ""
        print(f"  replay it: step3rt sim --seed {seed} --trace{sabotage}")
