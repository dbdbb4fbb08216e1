"""Where the log lines of a command go."""

import logging
import os
import time


def log_to_stderr() -> None:
    """Lines as the Rust side of the process writes them: the journal adds the time, else UTC."""
    handler = logging.StreamHandler()
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(logging.Formatter("%(message)s"))
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
