"""Where the log lines of a command go."""

import logging
import os
import sys
import time

_ERROR_PRIORITY = 3
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}
"""syslog's, by logging's; what is worse is an error."""


def print_error(text: str) -> None:
    """Prints what a command ends with, as an error where it becomes an entry of the journal."""
    print(f"<{_ERROR_PRIORITY}>{text}" if _is_journal() else text, file=sys.stderr)


def log_to_stderr() -> None:
    """Lines as the Rust side of the process writes them: the journal adds the time, else UTC."""
    handler = logging.StreamHandler()
    if _is_journal():
        handler.setFormatter(_JournalFormatter())
    else:
        logging.addLevelName(logging.WARNING, "WARN")
        formatter = logging.Formatter(
            "%(asctime)s.%(msecs)03dZ %(levelname)5s %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Ours alone: torch has things to say at this level that no operator acts on.
    logging.getLogger("step3rt").setLevel(logging.INFO)


def _is_journal() -> bool:
    """Whether standard error is the stream that the journal reads priorities from.

    The variable alone does not say so: programs inherit it whose output goes elsewhere.
    """
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


class _JournalFormatter(logging.Formatter):
    """A priority before every line, for each becomes an entry of its own."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, _ERROR_PRIORITY)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())
