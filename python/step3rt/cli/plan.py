"""`step3rt plan`: what a deployment costs, how fast it is, and which one to take."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3rt.errors import InvalidArgument

if TYPE_CHECKING:
    from step3rt.plan.architecture import Model
    from step3rt.plan.cost import Precision
    from step3rt.plan.deployment import Deployment
    from step3rt.plan.hardware import Hardware
    from step3rt.plan.measurement import Measurement

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
  step3rt plan search --gpus h200:4 --profile peers-h200 --emit cluster.toml
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
    _add_search(commands)
    _add_compare(commands)
    _add_kernels(commands)
    _add_plot(commands)


def _add_cost(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("cost", help="theoretical cost of a token (the paper's tables)")
    _add_common(parser)
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
    _add_common(parser)
    _add_profile(parser)
    _add_kv_dtype(parser)
    _add_deployment(parser)
    parser.set_defaults(run=_run_predict)


def _add_deployment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attention-gpus", type=int, metavar="N", help="of a disaggregated unit")
    parser.add_argument("--ffn-gpus", type=int, metavar="N", help="of a disaggregated unit")
    parser.add_argument("--colocated-gpus", type=int, metavar="N", help="both roles on every GPU")
    parser.add_argument("--hardware", default="h800", metavar="CARD", help="(default: h800)")
    parser.add_argument("--ffn-hardware", metavar="CARD", help="default: --hardware")
    parser.add_argument("--lanes", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--ffn-parallelism", choices=("ep", "tp_ep"), default="ep")
    parser.add_argument("--batch", type=int, required=True, metavar="N", help="sequences in flight")
    parser.add_argument("--experts", type=int, metavar="N", help="routed experts, for a slice")


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("simulate", help="throughput and TPOT of one deployment")
    _add_common(parser)
    _add_model_of_time(parser)
    _add_deployment(parser)
    parser.add_argument(
        "--lengths", choices=("fixed", "spread", "stationary"), default="spread", help="of contexts"
    )
    parser.add_argument("--output-tokens", type=int, default=1024, metavar="N", help="stationary")
    parser.add_argument("--arrivals-per-step", type=float, metavar="X", help="stationary, Poisson")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="(default: 1000)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a step's timeline")
    parser.set_defaults(run=_run_simulate)


def _add_search(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("search", help="the best deployment of given cards, and why")
    _add_common(parser)
    _add_model_of_time(parser)
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


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("compare", help="predicted beside measured, and a fitted profile")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json|DIR")
    _add_common(parser, has_context=False)
    _add_profile(parser)
    parser.add_argument("--hardware", metavar="CARD", help="default: what the file's machine names")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the fitted profile")
    parser.add_argument(
        "--fit-all",
        action="store_true",
        help="fit to all runs and test on none; default: of several runs, one half each",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the halves")
    parser.set_defaults(run=_run_compare, model=None)


def _add_kernels(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("kernels", help="a profile from measured kernels")
    parser.add_argument("result", type=Path, metavar="KERNELS.json", help="of bench kernels")
    _add_profile(parser)
    parser.add_argument("--hardware", required=True, metavar="CARD", help="what it ran on")
    parser.add_argument("--hardware-file", type=Path, metavar="TOML", help="more cards or prices")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="the profile")
    parser.set_defaults(run=_run_kernels)


def _add_plot(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("plot", help="measured decode runs as a table and a plot")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json|DIR")
    parser.add_argument("--tpot-ms", type=float, default=50.0, metavar="MS", help="(default: 50)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.svg, .png)")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="put table and plot between the page's marks"
    )
    parser.set_defaults(run=_run_plot)


def _add_common(parser: argparse.ArgumentParser, *, has_context: bool = True) -> None:
    parser.add_argument(
        "--model",
        default="step3",
        metavar="NAME_OR_PATH",
        help="a model that ships, a checkpoint directory or a config.json (default: step3)",
    )
    if has_context:
        parser.add_argument(
            "--context", type=int, default=8192, metavar="TOKENS", help="(default: 8192)"
        )
    parser.add_argument("--hardware-file", type=Path, metavar="TOML", help="more cards or prices")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default="paper-h800",
        metavar="NAME_OR_FILE",
        help="kernel efficiencies: paper-h800, peers-h200, step3rt-h200, or a fitted file "
        "(default: paper-h800)",
    )


def _add_model_of_time(parser: argparse.ArgumentParser) -> None:
    _add_profile(parser)
    _add_kv_dtype(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")


def _add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype", choices=("fp8", "bfloat16"), help="default: as the paper quantises the model"
    )


def _run_cost(arguments: argparse.Namespace) -> int:
    from step3rt.plan import report
    from step3rt.plan.cost import token_cost
    from step3rt.plan.hardware import PAPER_CARDS, pick_hardware

    cards, model = _cards(arguments), _model(arguments)
    _check_context(arguments.context)
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
    from step3rt.plan.deployment import max_batch_by_memory
    from step3rt.plan.profile import load_profile

    model, deployment = _sliced_model(arguments), _deployment(arguments)
    profile, precision = load_profile(arguments.profile), _precision(arguments, model)
    _check_context(arguments.context)
    places = deployment.lanes * deployment.num_attention_gpus
    if arguments.batch < places:
        raise InvalidArgument(
            f"--batch is {arguments.batch}. Each of {places} lanes takes at least one sequence. "
            "Give more, or fewer lanes or GPUs"
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
    from step3rt.plan.profile import load_profile
    from step3rt.plan.simulate import simulate, timeline
    from step3rt.plan.workload import Workload

    model, deployment = _sliced_model(arguments), _deployment(arguments)
    profile, precision = load_profile(arguments.profile), _precision(arguments, model)
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


def _run_search(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from step3rt.plan import report
    from step3rt.plan.emit import cluster_toml, write_text
    from step3rt.plan.hardware import parse_inventory
    from step3rt.plan.profile import load_profile
    from step3rt.plan.search import Inventory, Target
    from step3rt.plan.verdict import decide

    model, profile = _model(arguments), load_profile(arguments.profile)
    precision = _precision(arguments, model)
    inventory = Inventory(parse_inventory(arguments.gpus, _cards(arguments)))
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
            model=arguments.serve_model or arguments.model,
            context_tokens=arguments.context,
            command=command,
        )
        write_text(arguments.emit, text)
    return 0 if verdict.choices else 1


def _run_compare(arguments: argparse.Namespace) -> int:
    from step3rt.plan import report
    from step3rt.plan.compare import compare, fit, split
    from step3rt.plan.cross_validation import cross_validate
    from step3rt.plan.profile import load_profile, save_profile

    measurements, model = _measurements(arguments), _model(arguments)
    stated = load_profile(arguments.profile)
    rows = {"stated": compare(model, measurements, stated)}
    fitted_to, tested_on = measurements, list[Any]()
    if len(measurements) > 1 and not arguments.fit_all:
        fitted_to, tested_on = split(measurements, arguments.seed)
    fitted = None
    if tested_on or arguments.fit_all or arguments.save is not None:
        fitted = fit(model, fitted_to, stated)
        rows["fitted"] = compare(model, tested_on or fitted_to, fitted)
    values: dict[str, Any] = {name: report.comparison_values(each) for name, each in rows.items()}
    if tested_on:
        values["test"] = report.holdout_values(
            [each.name for each in fitted_to],
            compare(model, tested_on, stated),
            rows["fitted"],
        )
        found = cross_validate(model, measurements, stated)
        values["cross_validation"] = report.cross_validation_values(found)
    if arguments.json:
        print(json.dumps(values, indent=2))
    else:
        print(f"stated profile: {stated.source}\n{report.comparison_text(rows['stated'])}")
        if fitted is not None:
            print(f"fitted profile: {fitted.source}\n{report.comparison_text(rows['fitted'])}")
        if tested_on:
            print(report.holdout_text(values["test"]))
            print(report.cross_validation_text(values["cross_validation"]))
    if fitted is not None and arguments.save is not None:
        save_profile(fitted, arguments.save)
        print(f"saved; use it with --profile {arguments.save}", file=sys.stderr)
    return 0


def _measurements(arguments: argparse.Namespace) -> "list[Measurement]":
    """The runs of the given files; of a `--model`, if one is given, else of their own."""
    from dataclasses import replace

    from step3rt.plan.hardware import pick_hardware
    from step3rt.plan.measurement import load_measurement, result_files

    cards = _cards(arguments)
    card = pick_hardware(arguments.hardware, cards) if arguments.hardware else None
    found = [load_measurement(path, cards, card) for path in result_files(arguments.results)]
    return found if arguments.model is None else [replace(each, model=None) for each in found]


def _run_kernels(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from step3rt.plan.hardware import pick_hardware
    from step3rt.plan.kernel_profile import profile_from_kernels
    from step3rt.plan.profile import load_profile, save_profile

    card = pick_hardware(arguments.hardware, _cards(arguments))
    before = load_profile(arguments.profile)
    after = profile_from_kernels(arguments.result, card, before)
    save_profile(after, arguments.save)
    stated = asdict(before)
    for name, value in asdict(after).items():
        if name != "source" and value != stated[name]:
            print(f"{name:<22} {stated[name]:>8.3g} -> {value:.3g}")
    print(f"saved; use it with --profile {arguments.save}", file=sys.stderr)
    return 0


def _run_plot(arguments: argparse.Namespace) -> int:
    from step3rt.plan.decode_table import load_points, put_into, table
    from step3rt.plan.measurement import result_files

    points = load_points(result_files(arguments.results))
    text = table(points, Path() if arguments.into is None else arguments.into.parent)
    if arguments.plot is not None:
        from step3rt.plan.plots import draw_decode

        draw_decode(arguments.plot, points, arguments.tpot_ms)
    if arguments.into is None:
        print(text)
        return 0
    if arguments.plot is not None:
        place = os.path.relpath(arguments.plot, arguments.into.parent)
        text += f"\n\n![Decoding, measured: throughput and TPOT]({place})"
    put_into(arguments.into, text)
    return 0


def _cards(arguments: argparse.Namespace) -> "dict[str, Hardware]":
    from step3rt.plan.hardware import load_hardware

    return load_hardware(arguments.hardware_file)


def _model(arguments: argparse.Namespace) -> "Model":
    from step3rt.plan.hf_config import load_model

    return load_model(arguments.model or "step3")


def _sliced_model(arguments: argparse.Namespace) -> "Model":
    """`--model`, with `--experts` routed experts if they are given."""
    model = _model(arguments)
    if arguments.experts is None:
        return model
    if arguments.experts < 1:
        raise InvalidArgument(
            f"--experts is {arguments.experts}. A slice has at least one. Correct it"
        )
    return model.with_num_experts(arguments.experts)


def _check_context(context: int) -> None:
    if context < 1:
        raise InvalidArgument(f"--context is {context}. A token has some behind it. Correct it")


def _precision(arguments: argparse.Namespace, model: "Model") -> "Precision":
    from step3rt.plan.cost import paper_precision

    return paper_precision(model, arguments.kv_dtype)


def _deployment(arguments: argparse.Namespace) -> "Deployment":
    from step3rt.plan.deployment import Deployment
    from step3rt.plan.hardware import pick_hardware

    cards = _cards(arguments)
    colocated, attention = arguments.colocated_gpus, arguments.attention_gpus
    ffn = arguments.ffn_gpus
    is_colocated = colocated is not None
    if is_colocated == (attention is not None) or (attention is None) != (ffn is None):
        raise InvalidArgument(
            "The placement is incomplete or given twice. A unit is disaggregated or colocated. "
            "Give --attention-gpus and --ffn-gpus, or --colocated-gpus alone"
        )
    card = pick_hardware(arguments.hardware, cards)
    ffn_card = pick_hardware(arguments.ffn_hardware or arguments.hardware, cards)
    values: dict[str, Any] = {
        "placement": "colocated" if is_colocated else "disaggregated",
        "attention_card": card,
        "ffn_card": card if is_colocated else ffn_card,
        "num_attention_gpus": colocated if is_colocated else attention,
        "num_ffn_gpus": 0 if is_colocated else ffn,
        "lanes": arguments.lanes,
        "ffn_parallelism": arguments.ffn_parallelism,
    }
    return Deployment(**values)
