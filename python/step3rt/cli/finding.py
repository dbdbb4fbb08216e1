"""What `step3rt doctor` reports: findings, each with what to do about it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `missing` fails the report, `note` does not."""

    level: Literal["ok", "note", "missing"]
    subject: str
    found: str
    fix: str = ""
