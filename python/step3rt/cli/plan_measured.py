"""`step3rt plan compare`, `kernels` and `plot`: what result files of runs and kernels say.

Never measures: files are of `step3rt bench`.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3rt.cli.plan_flags import add_common, add_profile, cards_of, model_of
from step3rt.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from step3rt.plan.measurement import Measurement


_KEPT = Path("-")
"""For `--save` without a file."""


def add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan compare`."""
    parser = commands.add_parser("compare", help="predicted beside measured, and a fitted profile")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json|DIR")
    add_common(parser, has_context=False)
    add_profile(parser)
    parser.add_argument("--hardware", metavar="CARD", help="default: what the file's machine names")
    parser.add_argument(
        "--save",
        type=Path,
        nargs="?",
        const=_KEPT,
        metavar="FILE",
        help="write the fitted profile; without FILE it is kept, and the next predictions take it",
    )
    parser.add_argument(
        "--fit-all",
        action="store_true",
        help="fit to all runs and test on none; default: of several runs, one half each",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the halves")
    parser.set_defaults(run=_run_compare, model=None)


def add_kernels(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan kernels`."""
    parser = commands.add_parser("kernels", help="a profile from measured kernels")
    parser.add_argument("result", type=Path, metavar="KERNELS.json", help="of bench kernels")
    add_profile(parser)
    parser.add_argument("--hardware", required=True, metavar="CARD", help="what it ran on")
    parser.add_argument("--hardware-file", type=Path, metavar="TOML", help="more cards or prices")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="the profile")
    parser.set_defaults(run=_run_kernels)


def add_plot(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `plan plot`."""
    parser = commands.add_parser("plot", help="measured decode runs as a table and a plot")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json|DIR")
    parser.add_argument("--tpot-ms", type=float, default=50.0, metavar="MS", help="(default: 50)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.svg, .png)")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="put table and plot between the page's marks"
    )
    parser.set_defaults(run=_run_plot)


def _run_compare(arguments: argparse.Namespace) -> int:
    from step3rt.plan import report
    from step3rt.plan.compare import compare, fit, split
    from step3rt.plan.cross_validation import cross_validate
    from step3rt.plan.profile import fitted_profile_path, load_profile, save_profile

    is_kept = arguments.save == _KEPT
    path = fitted_profile_path() if is_kept else arguments.save
    if is_kept and path is None:
        raise ConfigError(
            "This user has no home directory, and XDG_CONFIG_HOME is not set. A fitted profile is "
            "kept among a user's settings. Name a file: --save FILE"
        )
    measurements, model = _measurements(arguments), model_of(arguments)
    stated = load_profile(arguments.profile)
    rows = {"stated": compare(model, measurements, stated)}
    fitted_to, tested_on = measurements, list[Any]()
    if len(measurements) > 1 and not arguments.fit_all:
        fitted_to, tested_on = split(measurements, arguments.seed)
    fitted = None
    if tested_on or arguments.fit_all or path is not None:
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
    if fitted is not None and path is not None:
        save_profile(fitted, path)
        use = "from now on used where no --profile is named" if is_kept else "use it with --profile"
        print(f"saved; {use}: {path}", file=sys.stderr)
    return 0


def _measurements(arguments: argparse.Namespace) -> "list[Measurement]":
    """The runs of the given files; of a `--model`, if one is given, else of their own."""
    from dataclasses import replace

    from step3rt.plan.hardware import pick_hardware
    from step3rt.plan.measurement import load_measurement, result_files

    cards = cards_of(arguments)
    card = pick_hardware(arguments.hardware, cards) if arguments.hardware else None
    found = [load_measurement(path, cards, card) for path in result_files(arguments.results)]
    return found if arguments.model is None else [replace(each, model=None) for each in found]


def _run_kernels(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from step3rt.plan.hardware import pick_hardware
    from step3rt.plan.kernel_profile import profile_from_kernels
    from step3rt.plan.profile import load_profile, save_profile

    card = pick_hardware(arguments.hardware, cards_of(arguments))
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

    if not 0 < arguments.tpot_ms < math.inf:
        raise InvalidArgument(
            f"--tpot-ms is {arguments.tpot_ms}. A line is drawn there. Give a number above 0"
        )
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
