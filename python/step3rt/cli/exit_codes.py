"""What an error means to whoever started the command: a line for people, and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 69 not available, 78 bad configuration, 130 Ctrl-C, 143
SIGTERM, 129 SIGHUP.
"""

import logging
import os
import sys
import traceback
from typing import NoReturn

from step3rt.cli.log import print_error
from step3rt.errors import ConfigError, InvalidArgument, Step3Error, Unavailable

EX_FAILED = 1
EX_USAGE = 2
EX_UNAVAILABLE = 69
EX_CONFIG = 78
EX_SIGNAL = 128
"""Added to the number of the signal that ended a command, as shells do."""
EX_INTERRUPTED = 130

_CODES: tuple[tuple[type[Step3Error], int], ...] = (
    (ConfigError, EX_CONFIG),
    (InvalidArgument, EX_USAGE),
    (Unavailable, EX_UNAVAILABLE),
)

_EXTRA_OF = {"torch": "worker", "safetensors": "worker", "cupy": "cuda13"}
"""Which extra brings a package that the client side does without."""


def report(error: Step3Error) -> int:
    """Prints an error as the command's last line and returns the exit code."""
    print_error(f"error: {error}")
    return next((code for kind, code in _CODES if isinstance(error, kind)), EX_FAILED)


def without_package(error: ModuleNotFoundError) -> int:
    """Prints which extra brings the package that a command lacks and returns the exit code.

    Raises:
        ModuleNotFoundError: no extra does; a defect.
    """
    extra = _EXTRA_OF.get(error.name or "")
    if extra is None:
        raise error
    print(
        f"error: The Python package {error.name!r} is not installed. Client and coordinator do "
        f"without it, instances and benches do not. Install it: pip install 'step3rt[{extra}]'",
        file=sys.stderr,
    )
    return EX_CONFIG


def refused_by_system(error: OSError) -> int:
    """Prints what the operating system would not do and returns the exit code."""
    place = "" if error.filename is None else f" for {str(error.filename)!r}"
    print_error(
        f"error: The operating system refused{place}: {error.strerror or error}. The command "
        "cannot go on without it. Free space, or correct path and permissions"
    )
    return EX_FAILED


def end_process(error: BaseException) -> NoReturn:
    """Ends the process at once, whatever its other threads and its GPU are waiting for."""
    if isinstance(error, Step3Error):
        code = report(error)
    elif isinstance(error, KeyboardInterrupt):
        code = EX_INTERRUPTED
    else:
        traceback.print_exception(error)
        code = EX_FAILED
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
