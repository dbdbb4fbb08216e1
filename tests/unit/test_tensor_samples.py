"""The fingerprint of a checkpoint tells revisions apart by samples of their values."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3rt.errors import CheckpointError
from step3rt.model.checkpoint import Checkpoint, describe_checkpoint
from step3rt.model.tensor_files import TensorEntry
from step3rt.model.tensor_samples import BLOCK_BYTES, STRIDE_BYTES, sample_digests, sample_spans
from tests.fixtures import checkpoint as written
from tests.fixtures.corruption import TARGET


def flip(entry: TensorEntry, position: int) -> None:
    """Changes one bit of a tensor's values; a negative position counts from its end."""
    with entry.path.open("r+b") as file:
        at = entry.offset + position % entry.num_bytes
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_the_same_files_agree_wherever_they_are_and_however_old(
    tiny_sharded_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    source = tiny_sharded_checkpoint.directory
    copy = tmp_path / "another name"
    shutil.copytree(source, copy)
    for path in copy.iterdir():
        os.utime(path, (0, 0))
    assert Checkpoint.open(copy).fingerprint() == Checkpoint.open(source).fingerprint()


@pytest.mark.parametrize("position", [0, -1])
def test_a_changed_value_at_either_end_of_any_tensor_is_another_model(
    tiny_fp8_checkpoint: written.Checkpoint, tmp_path: Path, position: int
) -> None:
    shutil.copytree(tiny_fp8_checkpoint.directory, tmp_path / "copy")
    opened = Checkpoint.open(tmp_path / "copy")
    seen = {opened.fingerprint()}
    for entry in opened.files.entries.values():
        flip(entry, position)
        seen.add(opened.fingerprint())
    assert len(seen) == 1 + len(opened.files.entries)


def test_two_trainings_of_one_architecture_differ(
    tiny_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    other = written.write_checkpoint(tmp_path, written.CheckpointSpec(seed=1))
    fingerprints = [
        Checkpoint.open(model.directory).fingerprint() for model in (tiny_checkpoint, other)
    ]
    assert fingerprints[0] != fingerprints[1]


def test_a_file_that_shrinks_while_it_is_read_is_said_so(
    tiny_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint.directory, tmp_path / "copy")
    opened = Checkpoint.open(tmp_path / "copy")
    entry = opened.files.entries[TARGET]
    os.truncate(entry.path, entry.offset + 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        opened.fingerprint()
    entry.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened.fingerprint()


def test_a_description_has_the_fingerprint(tiny_checkpoint: written.Checkpoint) -> None:
    directory = tiny_checkpoint.directory
    assert Checkpoint.open(directory).fingerprint() in describe_checkpoint(directory)


@given(st.integers(0, 8 * STRIDE_BYTES) | st.integers(0, 4 * BLOCK_BYTES))
def test_samples_are_few_and_spread_from_the_first_byte_to_the_last(num_bytes: int) -> None:
    spans = list(sample_spans(num_bytes))
    assert spans[0][0] == 0
    assert sum(spans[-1]) == num_bytes
    for (offset, length), (following, _) in pairwise(spans):
        assert offset + length <= following <= offset + STRIDE_BYTES + BLOCK_BYTES
    assert len(spans) <= 2 + num_bytes // STRIDE_BYTES
    assert all(length <= 2 * BLOCK_BYTES for _, length in spans)


def test_a_large_tensor_is_read_where_its_samples_are_and_nowhere_else(tmp_path: Path) -> None:
    num_bytes = 3 * STRIDE_BYTES + 5
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, num_bytes + 10)
    entry = TensorEntry("large", path, "F8_E4M3", (num_bytes,), 10, num_bytes)
    before = sample_digests({"large": entry})
    for position in (BLOCK_BYTES, STRIDE_BYTES - 1, STRIDE_BYTES + BLOCK_BYTES):
        flip(entry, position)
        assert sample_digests({"large": entry}) == before
    for position in (BLOCK_BYTES - 1, STRIDE_BYTES, 2 * STRIDE_BYTES + 7, num_bytes - 1):
        flip(entry, position)
        after = sample_digests({"large": entry})
        assert after != before
        before = after
