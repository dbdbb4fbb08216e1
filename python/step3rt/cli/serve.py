"""`step3rt serve`: the coordinator."""

import argparse

from step3rt.cli import flags
from step3rt.cli.log import log_to_stderr
from step3rt.config import ServeConfig
from step3rt.local_instances import LocalInstances
from step3rt.placement import HostConfig

_DESCRIPTION = """\
Run the coordinator: it takes requests over gRPC, schedules them, and leads the attention and FFN
instances, which connect to --control-listen by themselves and may come and go. It answers
requests once --attention and --ffn instances are ready. With --devices it starts them itself, on
this host, and starts those that die again.
"""

_EPILOG = """\
examples:
  step3rt serve nano --attention 1 --ffn 2
  step3rt serve DIR --placement colocated --devices cuda:0,cuda:1 --dtype bfloat16 \\
    --precision production
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
    flags.add_config_flags(parser, HostConfig, title="instances of its own")
    flags.add_config_flags(parser, ServeConfig, skip=("model",))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal; returns the exit code."""
    flags.exit_with_parent(arguments.exit_with_parent)
    serve, host = flags.cluster_from(arguments)
    from step3rt import _core

    if not host.devices:
        host.check_unused()
        return _core.serve(serve.to_json())
    log_to_stderr()
    with LocalInstances(serve, host) as instances:
        code = _core.serve(instances.serve.to_json())
    return instances.refusal or code
