"""The `step3rt` command: one module per subcommand."""

import argparse
import sys
from collections.abc import Sequence

from step3rt.cli import (
    bench,
    chat,
    doctor,
    generate,
    node,
    plan,
    serve,
    sim,
    streams,
    trace,
    version,
)
from step3rt.cli.exit_codes import (
    EX_CONFIG,
    EX_FAILED,
    EX_INTERRUPTED,
    EX_USAGE,
    refused_by_system,
    report,
    without_package,
)
from step3rt.errors import Step3Error

__all__ = ["EX_CONFIG", "EX_USAGE", "main"]

_DESCRIPTION = """\
Serve Step-3 with attention and FFN on separate processes.

Start here:
  step3rt generate --model nano "Once upon a time"   a whole cluster for one prompt
  step3rt serve nano                                 a coordinator; then, in other terminals:
  step3rt node ffn --model nano
  step3rt node attention --model nano
  step3rt chat                                       talk to it
  step3rt plan search --gpus h800:32 --context 4096  which deployment, and why
  step3rt doctor                                     what this host can do, and what is missing
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    streams.take_any_text()
    try:
        try:
            return _run(arguments)
        finally:
            streams.flush_output()
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say or to whom.
        streams.discard_output(sys.stdout, sys.stderr)
        return EX_FAILED
    except OSError as error:
        streams.discard_output(sys.stdout)
        return refused_by_system(error)


def _run(arguments: Sequence[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except Step3Error as error:
        return report(error)
    except ModuleNotFoundError as error:
        return without_package(error)
    except KeyboardInterrupt:
        return EX_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step3rt",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for command in (serve, node, generate, chat, plan, bench, sim, trace, doctor, version):
        command.add_parser(subparsers)
    return parser
