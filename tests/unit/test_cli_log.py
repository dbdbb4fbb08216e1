"""What commands say on standard error, by who reads it there: the journal, or a person."""

import os
import subprocess
import sys

from step3rt.cli import EX_CONFIG

_LOGGING = """
import logging
from step3rt.cli.log import log_to_stderr
log_to_stderr()
log = logging.getLogger("step3rt.test")
log.info("fine")
log.warning("two\\nlines")
log.error("bad")
"""


def run(*arguments: str, is_journal: bool) -> tuple[int, list[str]]:
    """Runs python with standard error to a stream that is, or is not, the one of JOURNAL_STREAM."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as output:
        stream = os.fstat(writing)
        inode = stream.st_ino if is_journal else stream.st_ino + 1
        environment = {**os.environ, "JOURNAL_STREAM": f"{stream.st_dev}:{inode}"}
        done = subprocess.run(
            [sys.executable, *arguments], stderr=writing, env=environment, timeout=60, check=False
        )
        os.close(writing)
        return done.returncode, output.read().decode().splitlines()


def test_the_journal_learns_how_bad_each_line_is() -> None:
    _, lines = run("-c", _LOGGING, is_journal=True)
    assert lines == ["<6>fine", "<4>two", "<4>lines", "<3>bad"]


def test_what_ends_a_service_is_an_error_in_the_journal() -> None:
    code, lines = run("-m", "step3rt", "serve", "nowhere/at/all", is_journal=True)
    assert code == EX_CONFIG
    assert lines[-1].startswith("<3>error: The model directory ")


def test_a_person_sees_no_priorities_though_the_variable_is_inherited() -> None:
    _, lines = run("-m", "step3rt", "serve", "nowhere/at/all", is_journal=False)
    assert lines[-1].startswith("error: The model directory ")
    _, lines = run("-c", _LOGGING, is_journal=False)
    assert [line.split(" ", 1)[1] for line in lines[:2]] == [" INFO fine", " WARN two"]
