"""What a device attention instance's host notes of its steps, and its file."""

from pathlib import Path

import numpy as np
import pytest

from step3rt.errors import InvalidArgument
from step3rt.trace import step_times
from step3rt.trace.step_times import StepTimes, load_step_times


def times_of(num_steps: int) -> StepTimes:
    times = StepTimes()
    for step in range(num_steps):
        times.add((step % 2, step, *range(7)))
    return times


def test_files_of_all_instances_are_read_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    for rank in (10, 2):
        times_of(rank).save(tmp_path / "made", rank)
    found = load_step_times(tmp_path / "made")
    assert [len(rows) for rows in found] == [2, 10]
    assert found[0]["lane"].tolist() == [0, 1]
    assert found[1]["reported"].tolist() == [6] * 10


def test_the_last_steps_are_kept_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "MAX_STEPS", 4)
    assert times_of(4).rows()["step"].tolist() == [0, 1, 2, 3]
    assert times_of(7).rows()["step"].tolist() == [3, 4, 5, 6]


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="has no step times"):
        load_step_times(tmp_path)
    np.save(tmp_path / "steps-0.npy", np.zeros(3))
    with pytest.raises(InvalidArgument, match="Record again"):
        load_step_times(tmp_path)
    (tmp_path / "steps-0.npy").write_bytes(b"PK nothing of the kind")
    with pytest.raises(InvalidArgument, match="has no step times"):
        load_step_times(tmp_path)
