"""Which version of the sources a result was measured with."""

import os
import subprocess
from pathlib import Path


def measured_commit() -> str:
    """What is checked out where the package lies, else STEP3RT_COMMIT, else its version."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == 0:
        return found.stdout.strip()
    if "STEP3RT_COMMIT" in os.environ:  # a copy without its history
        return os.environ["STEP3RT_COMMIT"]
    import step3rt

    return f"step3rt {step3rt.__version__}"
