"""`step3rt plan search`: the best deployment of given cards, and the files that come of it.

Never advises: that is `step3rt.plan.verdict`'s.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from step3rt.cli.plan_flags import (
    add_common,
    add_model_of_time,
    cards_of,
    model_of,
    precision_of,
    profile_of,
)
from step3rt.errors import InvalidArgument


def add_search(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan search`."""
    parser = commands.add_parser("search", help="the best deployment of given cards, and why")
    add_common(parser)
    add_model_of_time(parser)
    parser.add_argument(
        "--gpus", required=True, metavar="CARD:N[,CARD:N]", help="the inventory, e.g. h20:8,h800:8"
    )
    parser.add_argument("--tpot-ms", type=float, default=50.0, metavar="MS", help="(default: 50)")
    parser.add_argument("--percentile", choices=("p50", "p99"), default="p99")
    parser.add_argument("--placement", choices=("disaggregated", "colocated"))
    parser.add_argument("--ffn-parallelism", choices=("ep", "tp_ep"))
    parser.add_argument("--lanes", type=int, metavar="N", help="default: 1 to 4 are tried")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the Pareto front")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a Markdown report")
    parser.add_argument(
        "--emit", type=Path, metavar="FILE", help="write the cluster file of `step3rt serve`"
    )
    parser.add_argument(
        "--serve-model",
        metavar="DIR",
        help="checkpoint directory that the cluster file names; default: --model",
    )
    parser.set_defaults(run=_run_search)


def _run_search(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from step3rt.plan import report
    from step3rt.plan.emit import check_served, cluster_toml, write_text
    from step3rt.plan.hardware import parse_inventory
    from step3rt.plan.search_space import Inventory, Target
    from step3rt.plan.verdict import decide

    model, profile = model_of(arguments), profile_of(arguments)
    precision = precision_of(arguments, model)
    if arguments.emit is not None:
        check_served(model)
    inventory = Inventory(parse_inventory(arguments.gpus, cards_of(arguments)))
    target = Target(
        context_tokens=arguments.context,
        tpot_ms=arguments.tpot_ms,
        percentile=arguments.percentile,
        placement=arguments.placement,
        lanes=arguments.lanes,
        ffn_parallelism=arguments.ffn_parallelism,
    )
    verdict = decide(model, inventory, target, profile, precision, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(report.verdict_values(verdict, target, model), indent=2))
    else:
        print(report.verdict_text(verdict, target))
    command = shlex.join(["step3rt", *sys.argv[1:]])
    if arguments.plot is not None:
        from step3rt.plan.plots import draw_front

        draw_front(arguments.plot, verdict, target)
    if arguments.report is not None:
        text = report.verdict_markdown(
            verdict,
            target,
            model,
            command=command,
            profile_source=profile.source,
            plot=None if arguments.plot is None else str(arguments.plot.absolute()),
        )
        write_text(arguments.report, text)
    if arguments.emit is not None:
        # Instances have whole experts; what runs best with those need not be what is best.
        served = replace(target, ffn_parallelism="ep")
        best = verdict.choices[:1]
        if served != target:
            verdict = decide(model, inventory, served, profile, precision, seed=arguments.seed)
        if not verdict.choices:
            raise InvalidArgument(
                "No cluster file was written: no deployment that `step3rt serve` runs meets the "
                f"target. {verdict.text}"
            )
        text = cluster_toml(
            verdict.choices[0],
            precision,
            target,
            model=arguments.serve_model or arguments.model,
            command=command,
        )
        write_text(arguments.emit, text)
        written = verdict.choices[0].candidate
        label = written.deployment.label
        other = "" if best and best[0].candidate.deployment.label == label else " (not the best)"
        print(
            f"wrote {arguments.emit}: {label}{other}, {written.tokens_per_s_per_gpu:,.0f} "
            "tokens/s/GPU",
            file=sys.stderr,
        )
    return 0 if verdict.choices else 1
