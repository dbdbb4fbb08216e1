"""`step3rt node`: one attention or FFN instance."""

import argparse

from step3rt.cli import flags
from step3rt.cli.exit_codes import end_process
from step3rt.cli.log import log_to_stderr
from step3rt.config import COLOCATED, ROLES, NodeConfig

_DESCRIPTION = """\
Run one instance. An attention instance holds embedding, attention, KV cache and sampler; an FFN
instance holds dense FFNs and its share of the experts. Either may start before the coordinator.
`colocated` runs one of each in one process, on one --device.
"""

_EPILOG = """\
example:
  step3rt node ffn --model nano --coordinator 127.0.0.1:50052
  step3rt node colocated --model DIR --device cuda:0
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "node",
        help="run one attention or FFN instance",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # A default that is text would be checked against the choices, SUPPRESS too.
    parser.add_argument("role", nargs="?", choices=ROLES, default=None, help="(default: as FILE)")
    flags.add_config_file_flag(parser)
    flags.add_exit_with_parent_flag(parser)
    flags.add_config_flags(parser, NodeConfig, skip=("role",))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs until the coordinator or a signal ends it; returns the exit code."""
    flags.exit_with_parent(arguments.exit_with_parent)
    if arguments.role is None:
        del arguments.role
    config = flags.config_from(arguments, NodeConfig)
    log_to_stderr()
    from step3rt.instance import run_instance

    if config.role != COLOCATED:
        return run_instance(config, end_process)
    try:
        return run_instance(config, end_process)
    except BaseException as error:
        end_process(error)  # with the role in the other thread
