"""How far a long measurement is: one line on stderr, for who waits for it."""

import sys
import time
from typing import TextIO

_TERMINAL_INTERVAL_S = 0.5
_LOG_INTERVAL_S = 10.0


def warn(text: str) -> None:
    """Says on stderr what is not as it should be, and lets the measurement go on."""
    sys.stderr.write(f"warning: {text}\n")


class ProgressLine:
    """Counts up to a total; on a terminal the line is overwritten, in a log there are few of them.

    Args:
        what: is counted, e.g. "tokens of each stream".
        total: of it.
        out: where to; default: stderr.
    """

    def __init__(self, what: str, total: int, out: TextIO | None = None) -> None:
        """Says nothing yet."""
        self._what = what
        self._total = total
        self._count = 0
        self._out = sys.stderr if out is None else out
        self._is_terminal = self._out.isatty()
        self._interval_s = _TERMINAL_INTERVAL_S if self._is_terminal else _LOG_INTERVAL_S
        self._started_s = time.monotonic()
        self._next_s = self._started_s
        self._has_written = False

    def say(self, text: str) -> None:
        """Shows a line when the last one is old enough."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            self._write(text)

    def add(self, count: int) -> None:
        """Counts on."""
        self._count += count
        seconds = time.monotonic() - self._started_s
        self.say(f"{self._count} of {self._total} {self._what}, {seconds:.0f} s")

    def close(self) -> None:
        """Ends the line."""
        if self._has_written and self._is_terminal:
            print(file=self._out)

    def _write(self, text: str) -> None:
        self._has_written = True
        begin, end = ("\r\x1b[K", "") if self._is_terminal else ("", "\n")
        print(f"{begin}bench decode: {text}", end=end, file=self._out, flush=True)
