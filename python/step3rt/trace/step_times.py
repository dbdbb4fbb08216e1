"""When the host of a device attention instance launched, saw and reported its lanes' last steps.

Owns the file format; the times are the host's monotonic clock, which all processes of a host share.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from step3rt.errors import InvalidArgument

MAX_STEPS = 16_384
"""Of all lanes together; they take 1 MiB."""

ROW = np.dtype(
    [
        ("lane", np.int64),
        ("step", np.int64),
        ("launch_begin", np.int64),
        ("launch_end", np.int64),
        ("took", np.int64),
        ("device", np.int64),
        ("looked", np.int64),
        ("seen", np.int64),
        ("reported", np.int64),
    ]
)
"""A step. `took`: nanoseconds, as it was reported to the coordinator. `device`: nanoseconds from
the end of the lane's step before to its own by the device's clock, 0 where there was none.
`looked`: the last look that came too early, 0 if none did; `seen`: the look that found it over.
`reported`: its report is with the session's thread."""

Rows = npt.NDArray[np.void]


class StepTimes:
    """A ring of the last steps."""

    def __init__(self) -> None:
        """Starts without any."""
        self._rows = np.zeros(MAX_STEPS, dtype=ROW)
        self._num_steps = 0

    def add(self, row: tuple[int, int, int, int, int, int, int, int, int]) -> None:
        """Notes a step that was reported; `row` has the fields of `ROW`."""
        self._rows[self._num_steps % MAX_STEPS] = row
        self._num_steps += 1

    def rows(self) -> Rows:
        """ROW[N], as they were reported."""
        if self._num_steps <= MAX_STEPS:
            return self._rows[: self._num_steps].copy()
        return np.roll(self._rows, -(self._num_steps % MAX_STEPS))

    def save(self, directory: Path, rank: int) -> Path:
        """Writes `steps-<rank>.npy` and returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"steps-{rank}.npy"
        np.save(path, self.rows())
        return path


def load_step_times(directory: Path) -> list[Rows]:
    """What the attention instances of a directory saved, by rank.

    Raises:
        InvalidArgument: a file is none of `StepTimes.save`, or there is none.
    """
    paths = sorted(directory.glob("steps-*.npy"), key=lambda path: int(path.stem[6:]))
    found = []
    for path in paths:
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"{str(path)!r} has no step times: {error}. Attention instances with --trace-dir "
                "write them"
            ) from error
        if rows.dtype != ROW or rows.ndim != 1:
            raise InvalidArgument(
                f"{str(path)!r} has {rows.dtype} and not step times. Another version may have "
                "written it. Record again"
            )
        found.append(rows)
    if not found:
        raise InvalidArgument(
            f"{str(directory)!r} has no step times. Attention instances of the device pipeline "
            "with --trace-dir write them"
        )
    return found
