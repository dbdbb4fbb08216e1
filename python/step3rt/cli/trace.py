"""`step3rt trace`: what the instances of a device pipeline recorded."""

import argparse
import json
from pathlib import Path

_DESCRIPTION = """\
Read what attention and FFN instances recorded with --trace-dir: when each layer's rows were sent,
awaited and answered, in the clocks of their GPUs.
"""

_EPILOG = """\
example:
  step3rt trace summary DIR
  step3rt trace convert DIR out.pftrace     # then open it at https://ui.perfetto.dev
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "trace",
        help="what a device pipeline's instances did when",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(title="parts", dest="part", required=True)
    summary = parts.add_parser("summary", help="stage times, bubbles, and who is late")
    summary.add_argument("directory", type=Path, help="with the instances' recordings")
    summary.add_argument("--json", action="store_true", help="print JSON only")
    summary.set_defaults(run=run_summary)
    convert = parts.add_parser("convert", help="write one Perfetto trace")
    convert.add_argument("directory", type=Path, help="with the instances' recordings")
    convert.add_argument("out", type=Path, help="file to write, usually *.pftrace")
    convert.set_defaults(run=run_convert)


def run_summary(arguments: argparse.Namespace) -> int:
    """Prints and returns 0.

    Raises:
        InvalidArgument: the directory does not hold the recordings of a deployment.
    """
    from step3rt.trace.recording import load_all
    from step3rt.trace.summary import describe, summarise
    from step3rt.trace.timeline import build

    summary = summarise(build(load_all(arguments.directory)))
    print(json.dumps(summary) if arguments.json else describe(summary))
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Writes and returns 0.

    Raises:
        InvalidArgument: the directory does not hold the recordings of a deployment, or the file
            cannot be written.
        ConfigError: the package that knows the format is not installed.
    """
    from step3rt.trace import perfetto
    from step3rt.trace.recording import load_all
    from step3rt.trace.timeline import build

    num_slices = perfetto.write(build(load_all(arguments.directory)), arguments.out)
    print(f"{arguments.out}: {num_slices} slices. Open it at https://ui.perfetto.dev")
    return 0
