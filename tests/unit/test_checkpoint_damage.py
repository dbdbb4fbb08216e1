"""Shows that each damage to a checkpoint is the one that its name states, and no other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tests.fixtures import corruption, wrong_model
from tests.fixtures.checkpoint import Checkpoint
from tests.fixtures.corruption import Corruption, damaged_copy
from tests.fixtures.inspection import digests, load_tensors


def open_every_tensor(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            file.get_tensor(name)


@pytest.mark.parametrize("name", corruption.CONTAINER_CORRUPTIONS)
def test_container_damage_is_refused_by_the_format_library(
    tiny_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    source = tiny_checkpoint.directory
    before = digests(source)
    damage = damaged_copy(source, tmp_path / "bad", corruption.CONTAINER_CORRUPTIONS[name])

    with pytest.raises(SafetensorError):
        open_every_tensor(tmp_path / "bad" / damage.file_name)
    assert digests(source) == before


CONTENT_CORRUPTIONS: dict[str, Corruption] = {
    **wrong_model.TENSOR_CORRUPTIONS,
    **wrong_model.SCALE_CORRUPTIONS,
}


@pytest.mark.parametrize("name", CONTENT_CORRUPTIONS)
def test_content_damage_is_in_the_named_tensor_of_a_valid_container(
    tiny_fp8_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    source = tiny_fp8_checkpoint.directory
    damage = damaged_copy(source, tmp_path / "bad", CONTENT_CORRUPTIONS[name])
    good, bad = load_tensors(source), load_tensors(tmp_path / "bad")

    def description(tensor: torch.Tensor | None) -> object:
        if tensor is None:
            return None
        return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).tolist()

    different = {
        key
        for key in good.keys() | bad.keys()
        if description(good.get(key)) != description(bad.get(key))
    }
    assert len(different) == 1
    assert damage.tensor_name is not None
    assert different <= {damage.tensor_name, damage.tensor_name + "_scale_inv"}


@pytest.mark.parametrize("name", wrong_model.INDEX_CORRUPTIONS)
def test_index_damage_leaves_the_other_shards_as_they_are(
    tiny_sharded_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    source = tiny_sharded_checkpoint.directory
    damage = damaged_copy(source, tmp_path / "bad", wrong_model.INDEX_CORRUPTIONS[name])
    good, bad = digests(source), digests(tmp_path / "bad")
    assert {key for key in good if good[key] != bad.get(key)} == {damage.file_name}
    assert bad.keys() <= good.keys()


def test_index_damage_points_to_real_files_outside(
    tiny_sharded_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    for name in ("index_names_parent_directory", "index_names_absolute_path"):
        directory = tmp_path / name
        damaged_copy(
            tiny_sharded_checkpoint.directory, directory, wrong_model.INDEX_CORRUPTIONS[name]
        )
        index = json.loads((directory / corruption.INDEX_FILE_NAME).read_text())
        pointed_to = directory / index["weight_map"][corruption.TARGET]
        assert corruption.TARGET in load_file(pointed_to)


@pytest.mark.parametrize("name", wrong_model.CONFIG_CORRUPTIONS)
@pytest.mark.parametrize("source", ["tiny_checkpoint", "ragged_fp8_checkpoint"])
def test_config_damage_changes_the_config_alone(
    source: str, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    directory: Path = request.getfixturevalue(source).directory
    damage = damaged_copy(directory, tmp_path / "bad", wrong_model.CONFIG_CORRUPTIONS[name])
    good, bad = digests(directory), digests(tmp_path / "bad")
    assert damage.file_name == "config.json"
    assert {key for key in good if good[key] != bad.get(key)} == {"config.json"}
