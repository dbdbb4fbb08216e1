"""What signals do to a command.

Owns those of commands that start processes or keep files for themselves, and of those that only
compute. Those of `serve` and `node` are the extension module's, which drains.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from step3rt.cli.exit_codes import EX_SIGNAL

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Has SIGTERM and SIGHUP raise `SystemExit` in the block, which then stops what it started."""
    # Ignored signals stay ignored: that is how `nohup` works.
    taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, _exit)
    except ValueError:  # not the main thread, which alone receives them
        taken = []
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Has Ctrl-C end the process in the block at once, as SIGTERM does.

    For long calls of the extension module, in which Python looks after no signal.
    """
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(EX_SIGNAL + number)
