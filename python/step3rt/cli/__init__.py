"""The `step3rt` command: one module per subcommand, errors and exit codes in one place.

Exit codes: 0 done, 1 failed, 2 wrong usage, 69 not available, 78 bad configuration, 130 Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

from step3rt.cli import bench, chat, doctor, generate, node, plan, serve, sim, trace, version
from step3rt.errors import ConfigError, InvalidArgument, Step3Error, Unavailable

EX_USAGE = 2
EX_UNAVAILABLE = 69
EX_CONFIG = 78
EX_INTERRUPTED = 130

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
    parser = argparse.ArgumentParser(
        prog="step3rt",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for command in (serve, node, generate, chat, plan, bench, sim, trace, doctor, version):
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except ConfigError as error:
        return _fail(error, EX_CONFIG)
    except InvalidArgument as error:
        return _fail(error, EX_USAGE)
    except Unavailable as error:
        return _fail(error, EX_UNAVAILABLE)
    except Step3Error as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say or to whom.
        sys.stderr.close()
        return 1


def _fail(error: Step3Error, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
