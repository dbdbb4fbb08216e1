"""`step3rt plan`: what a deployment costs and how fast it is; which one to take.

Owns `cost`, `predict` and `simulate`; searches and measurements have files of their own.
"""

import argparse
import json
from pathlib import Path

from step3rt.cli.plan_flags import (
    add_common,
    add_deployment,
    add_kv_dtype,
    add_model_of_time,
    add_profile,
    cards_of,
    check_context,
    deployment_of,
    model_of,
    precision_of,
    profile_of,
    sliced_model_of,
)
from step3rt.cli.plan_measured import add_compare, add_kernels, add_plot
from step3rt.cli.plan_search import add_search
from step3rt.errors import InvalidArgument

_DESCRIPTION = """\
Plan a deployment: cost per token, simulated throughput and TPOT, the best placement on given
cards, and predictions beside measurements. Everything is computed here; no GPU is needed.
"""

_EPILOG = """\
examples:
  step3rt plan cost --model step3 --context 8192 --json
  step3rt plan simulate --attention-gpus 16 --ffn-gpus 16 --ffn-parallelism tp_ep --batch 6144
  step3rt plan predict --attention-gpus 2 --ffn-gpus 2 --experts 6 --hardware h200 --lanes 2 \\
      --profile step3rt-h200 --batch 1024 --context 4096
  step3rt plan search --gpus h800:32 --context 4096 --plot front.svg
  step3rt plan search --gpus h200:4 --profile step3rt-h200 --emit cluster.toml
  step3rt plan kernels docs/results/kernels-h200-2026-11-22.json \\
      --profile peers-h200 --hardware h200 --save h200.toml
  step3rt plan plot docs/results --plot docs/plots/decode.svg --into README.md
  step3rt plan compare docs/results --profile h200.toml --save fitted.toml
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command and its subcommands."""
    parser = subparsers.add_parser(
        "plan",
        help="cost, throughput and best placement of a deployment, predicted",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", dest="plan_command", required=True)
    _add_cost(commands)
    _add_predict(commands)
    _add_simulate(commands)
    add_search(commands)
    add_compare(commands)
    add_kernels(commands)
    add_plot(commands)


def _add_cost(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("cost", help="theoretical cost of a token (the paper's tables)")
    add_common(parser)
    parser.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="CARD",
        help="may be given several times; all is every known card (default: those of the paper)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a figure (.svg, .png)")
    parser.add_argument(
        "--figure",
        choices=("1", "2", "5"),
        default="1",
        help="the paper's: 1 cost front, 2 cost by hardware, 5 compute and memory (default: 1)",
    )
    parser.set_defaults(run=_run_cost)


def _add_predict(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "predict", help="means of one deployment, as compare puts them beside a measured run"
    )
    add_common(parser)
    add_profile(parser, takes_fitted=True)
    add_kv_dtype(parser)
    add_deployment(parser)
    parser.set_defaults(run=_run_predict)


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("simulate", help="throughput and TPOT of one deployment")
    add_common(parser)
    add_model_of_time(parser)
    add_deployment(parser)
    parser.add_argument(
        "--lengths", choices=("fixed", "spread", "stationary"), default="spread", help="of contexts"
    )
    parser.add_argument("--output-tokens", type=int, default=1024, metavar="N", help="stationary")
    parser.add_argument("--arrivals-per-step", type=float, metavar="X", help="stationary, Poisson")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a step's timeline")
    parser.set_defaults(run=_run_simulate)


def _run_cost(arguments: argparse.Namespace) -> int:
    from step3rt.plan import report
    from step3rt.plan.cost import token_cost
    from step3rt.plan.hardware import PAPER_CARDS, pick_hardware

    cards, model = cards_of(arguments), model_of(arguments)
    check_context(arguments.context)
    keys = list(cards) if "all" in arguments.hardware else arguments.hardware or PAPER_CARDS
    chosen = [pick_hardware(key, cards) for key in keys]
    cost = token_cost(model, arguments.context)
    values = report.cost_values(model, arguments.context, cost, chosen)
    print(json.dumps(values, indent=2) if arguments.json else report.cost_text(values))
    if arguments.plot is not None:
        from step3rt.plan.plots import draw_costs

        draw_costs(arguments.plot, arguments.figure, cards)
    return 0


def _run_predict(arguments: argparse.Namespace) -> int:
    from step3rt.plan import report
    from step3rt.plan.compare import predict_run
    from step3rt.plan.deployment import MAX_BATCH, max_batch_by_memory

    model, deployment = sliced_model_of(arguments), deployment_of(arguments)
    profile, precision = profile_of(arguments), precision_of(arguments, model)
    check_context(arguments.context)
    places = deployment.lanes * deployment.num_attention_gpus
    if not places <= arguments.batch <= MAX_BATCH:
        raise InvalidArgument(
            f"--batch is {arguments.batch}. Each of {places} lanes takes at least one sequence, "
            f"and all at most {MAX_BATCH}. Correct it, or take other lanes or GPUs"
        )
    found = predict_run(model, deployment, profile, arguments.batch, precision, arguments.context)
    max_batch = int(max_batch_by_memory(model, deployment, arguments.context, precision))
    if arguments.json:
        values = {"deployment": deployment.label, "batch": arguments.batch, "max_batch": max_batch}
        print(json.dumps(values | found, indent=2))
        return 0
    print(report.prediction_text(deployment, arguments.batch, found))
    if arguments.batch > max_batch:
        print(f"  warning: {max_batch} sequences fit in memory, {arguments.batch} were asked for")
    return 0


def _run_simulate(arguments: argparse.Namespace) -> int:
    from step3rt.plan import report
    from step3rt.plan.deployment import max_batch_by_memory
    from step3rt.plan.simulate import simulate, timeline
    from step3rt.plan.workload import Workload

    model, deployment = sliced_model_of(arguments), deployment_of(arguments)
    profile, precision = profile_of(arguments), precision_of(arguments, model)
    workload = Workload(
        batch=arguments.batch,
        context_tokens=arguments.context,
        lengths=arguments.lengths,
        output_tokens=arguments.output_tokens,
        arrivals_per_step=arguments.arrivals_per_step,
    )
    what = (model, deployment, profile, workload, precision)
    result = simulate(*what, steps=arguments.steps, seed=arguments.seed)
    max_batch = int(max_batch_by_memory(model, deployment, arguments.context, precision))
    shown = (deployment, arguments.batch, max_batch, result)
    if arguments.json:
        print(json.dumps(report.result_values(*shown), indent=2))
    else:
        print(report.result_text(*shown))
    if arguments.plot is not None:
        from step3rt.plan.plots import draw_timeline

        draw_timeline(arguments.plot, timeline(*what, seed=arguments.seed))
    return 0
