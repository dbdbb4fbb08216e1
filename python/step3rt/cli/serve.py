"""`step3rt serve`: the coordinator."""

import argparse

from step3rt.cli import flags
from step3rt.config import ServeConfig

_DESCRIPTION = """\
Run the coordinator: it takes requests over gRPC, schedules them, and leads the attention and FFN
instances, which connect to --control-listen by themselves and may come and go. It answers
requests once --attention and --ffn instances are ready.
"""

_EPILOG = """\
example:
  step3rt serve nano --attention 1 --ffn 2
Send SIGTERM to drain: running streams finish, new requests are refused, then it exits with 0.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "serve",
        help="run the coordinator",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, help="checkpoint directory, or nano"
    )
    flags.add_config_file_flag(parser)
    flags.add_exit_with_parent_flag(parser)
    flags.add_config_flags(parser, ServeConfig, skip=("model",))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal; returns the exit code."""
    flags.exit_with_parent(arguments.exit_with_parent)
    config = flags.config_from(arguments, ServeConfig)
    from step3rt import _core

    return _core.serve(config.to_json())
