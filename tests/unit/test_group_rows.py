"""Looks at the groups' rows: not too many, complete, and never waited for."""

import time

import numpy as np
import pytest
import torch

from step3rt.instance import group_rows
from step3rt.instance.group_rows import GroupRows


def look_until(looks: GroupRows, count: int) -> np.ndarray:
    deadline = time.monotonic() + 30
    while len(looks.rows()) < count:
        assert time.monotonic() < deadline
        looks.look()
        time.sleep(0.001)
    return looks.rows()


def test_looks_have_the_rows_of_all_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_rows, "LOOK_INTERVAL_S", 0.0)
    tables = [torch.zeros(3, 2, 2, dtype=torch.int32) for _ in range(2)]
    looks = GroupRows(tables)
    assert looks.rows().shape == (0, 2, 3, 2)
    tables[1][2, 1] = torch.tensor([64, 7], dtype=torch.int32)  # first row, rows
    found = look_until(looks, 1)
    assert found.dtype == np.int32
    assert found[0, 1, 2].tolist() == [0, 7]
    assert found.sum() == 7 * len(found)
    tables[1][2, 1, 1] = 9
    found = look_until(looks, len(found) + 3)
    assert found[0, 1, 2, 1] == 7  # what was found stays
    assert found[-1, 1, 2, 1] == 9
    looks.close()


def test_looks_keep_a_distance() -> None:
    looks = GroupRows([torch.zeros(1, 1, 2, dtype=torch.int32)])
    started = time.monotonic()
    found = look_until(looks, 3)
    assert time.monotonic() - started >= 2 * group_rows.LOOK_INTERVAL_S
    assert len(found) == 3
    looks.close()
