"""The command's standard streams: text that they cannot carry, and readers that are gone.

Owns what becomes of output at the end of a command; what is said on it is the commands' own.
"""

import os
import sys
from io import TextIOWrapper


def take_any_text() -> None:
    """Shows a substitute for characters that the terminal's encoding lacks, instead of failing.

    A model may write any character, and a pipe may bring any byte.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_output() -> None:
    """Writes what is buffered while an error can still be told; later, Python exits with 120."""
    if sys.stdout is not None:  # it is None after `>&-`
        sys.stdout.flush()


def discard_output(*streams: object) -> None:
    """Has what nobody reads, or nothing can hold, go nowhere when the interpreter flushes it."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  (no path of ours)
        for stream in streams:
            if isinstance(stream, TextIOWrapper):
                os.dup2(nowhere.fileno(), stream.fileno())
