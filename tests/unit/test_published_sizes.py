"""Step-3's own sizes, in files that have a header and no data: nothing here fits into memory."""

import json
import math
import os
from pathlib import Path
from typing import Literal

import pytest
import torch

from step3rt.model.checkpoint import Checkpoint, describe_checkpoint
from step3rt.model.config import Step3Config
from step3rt.model.gpu_weights import CheckpointTensors
from step3rt.model.tensor_plan import scale_shape, wanted_tensors
from tests.fixtures import corruption
from tests.fixtures.checkpoint import is_quantised, weight_shapes
from tests.unit.test_checkpoint_fixture import STEP3
from tests.unit.test_config_json import PUBLISHED

ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


def write_headers(directory: Path, dtype: Literal["bfloat16", "fp8"]) -> None:
    """Writes the published config, and a sparse shard for each layer and one for the rest."""
    config = dict(PUBLISHED)
    if dtype == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in weight_shapes(STEP3).items():
        parts = name.split(".")
        shard = shards.setdefault(parts[2] if parts[1] == "layers" else "rest", {})
        if dtype == "fp8" and is_quantised(STEP3, name):
            shard[name] = ("F8_E4M3", shape)
            shard[name + "_scale_inv"] = ("F32", scale_shape(shape, (128, 128)))
        else:
            shard[name] = ("BF16", shape)
    weight_map = {}
    for key, tensors in shards.items():
        path = directory / f"model-{key}.safetensors"
        header, end = {}, 0
        for name, (kind, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[kind]
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = path.name
        corruption.write_raw(path, json.dumps(header).encode(), b"")
        os.truncate(path, path.stat().st_size + end)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def test_the_loader_wants_the_published_names_and_shapes() -> None:
    config = Step3Config.from_json(PUBLISHED, Path("config.json"))
    wanted = {tensor.name: tensor.shape for tensor in wanted_tensors(config)}
    assert wanted == weight_shapes(STEP3)
    may_be_fp8 = {tensor.name for tensor in wanted_tensors(config) if tensor.may_be_fp8}
    assert may_be_fp8 == {name for name in wanted if is_quantised(STEP3, name)}


# Without the vision tower, which is BF16 in both and has 9.35 GB.
@pytest.mark.parametrize(("dtype", "num_mb"), [("bfloat16", "632589.1"), ("fp8", "318238.3")])
def test_a_checkpoint_of_the_published_sizes_is_opened_and_read_in_parts(
    tmp_path: Path, dtype: Literal["bfloat16", "fp8"], num_mb: str
) -> None:
    write_headers(tmp_path, dtype)
    text = describe_checkpoint(tmp_path)
    assert "61 layers (56 with 48 experts), hidden 7168" in text
    assert f" {num_mb} MB" in text
    tensors = CheckpointTensors(Checkpoint.open(tmp_path), torch.device("cpu"))
    matrix = tensors.matrix("model.layers.59.moe.down_proj.weight", 47)
    assert (matrix.values.shape, matrix.scales.shape) == ((7168, 5120), (56, 40))
