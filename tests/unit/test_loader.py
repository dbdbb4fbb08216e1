import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step3rt.errors import CheckpointError, CheckpointUnreadable
from step3rt.model.checkpoint import Checkpoint, describe_checkpoint
from step3rt.model.file_reader import PIECE_BYTES, FileReader, FileVersion
from step3rt.model.tensor_files import TensorFiles
from step3rt.model.weights import load_attention_weights, load_ffn_weights
from tests.fixtures import checkpoint as written
from tests.fixtures import corruption, wrong_model
from tests.fixtures.corruption import damaged_copy


def refused(directory: Path) -> str:
    """Opens and loads everything; returns the text of the refusal."""
    with pytest.raises(CheckpointError) as caught:
        load_everything(directory)
    return str(caught.value)


def load_everything(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    load_attention_weights(checkpoint, torch.float32)
    load_ffn_weights(checkpoint, range(checkpoint.config.num_experts), torch.float32)


@pytest.mark.parametrize("name", corruption.CONTAINER_CORRUPTIONS)
def test_broken_container_is_refused_with_its_file(
    tiny_checkpoint: written.Checkpoint, tmp_path: Path, name: str
) -> None:
    damage = damaged_copy(
        tiny_checkpoint.directory, tmp_path / "bad", corruption.CONTAINER_CORRUPTIONS[name]
    )
    with pytest.raises(CheckpointError, match=damage.file_name):
        TensorFiles.open(tmp_path / "bad")


@pytest.mark.parametrize("name", [*wrong_model.TENSOR_CORRUPTIONS, *wrong_model.SCALE_CORRUPTIONS])
def test_wrong_tensor_is_refused_with_its_name_and_file(
    tiny_fp8_checkpoint: written.Checkpoint, tmp_path: Path, name: str
) -> None:
    corruptions = {**wrong_model.TENSOR_CORRUPTIONS, **wrong_model.SCALE_CORRUPTIONS}
    damage = damaged_copy(tiny_fp8_checkpoint.directory, tmp_path / "bad", corruptions[name])
    message = refused(tmp_path / "bad")
    assert damage.file_name in message
    assert f"'{damage.tensor_name}" in message


@pytest.mark.parametrize("name", wrong_model.INDEX_CORRUPTIONS)
def test_wrong_index_is_refused_with_its_file(
    tiny_sharded_checkpoint: written.Checkpoint, tmp_path: Path, name: str
) -> None:
    damage = damaged_copy(
        tiny_sharded_checkpoint.directory, tmp_path / "bad", wrong_model.INDEX_CORRUPTIONS[name]
    )
    message = refused(tmp_path / "bad")
    assert damage.file_name in message
    assert damage.tensor_name is None or damage.tensor_name in message


def test_nothing_is_allocated_for_a_config_larger_than_the_file(
    tiny_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint.directory, tmp_path / "bad")
    wrong_model.edit_text_config(tmp_path / "bad", vocab_size=1 << 24, hidden_size=1 << 24)
    assert "has shape [256, 128]. config.json implies [16777216, 16777216]" in refused(
        tmp_path / "bad"
    )


def test_shard_that_links_out_of_the_directory_is_refused(
    tiny_sharded_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    directory = tmp_path / "linked"
    shutil.copytree(tiny_sharded_checkpoint.directory, directory)
    shard = next(directory.glob("model-*.safetensors"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    assert f"{shard}: leads to" in refused(directory)


def test_links_of_a_download_cache_are_followed(
    tiny_sharded_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_sharded_checkpoint.directory, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    load_everything(snapshot)


def test_named_pipe_is_refused_without_waiting_for_a_writer(
    tiny_sharded_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    directory = tmp_path / "pipe"
    shutil.copytree(tiny_sharded_checkpoint.directory, directory)
    shard = next(directory.glob("model-*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    assert "must be regular files" in refused(directory)


def test_directory_with_both_layouts_is_refused(
    tiny_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint.directory, tmp_path / "both")
    (tmp_path / "both" / "model.safetensors.index.json").write_text("{}")
    assert "holds both" in refused(tmp_path / "both")


def test_fp8_without_quantisation_config_is_refused(
    tiny_fp8_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(tiny_fp8_checkpoint.directory, tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert "F8_E4M3, but config.json has no quantization_config" in refused(tmp_path / "bad")


def test_fp8_norm_is_refused(tiny_fp8_checkpoint: written.Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(tiny_fp8_checkpoint.directory, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    assert "'model.norm.weight' is F8_E4M3, but norms" in refused(tmp_path / "bad")


def test_ffn_role_reads_only_its_experts(
    tiny_sharded_checkpoint: written.Checkpoint, tmp_path: Path
) -> None:
    directory = tmp_path / "m"
    shutil.copytree(tiny_sharded_checkpoint.directory, directory)
    checkpoint = Checkpoint.open(directory)
    experts = range(2, 5)
    reads: list[tuple[int, int, str]] = []
    weights = load_ffn_weights(
        checkpoint, experts, torch.float32, lambda *progress: reads.append(progress)
    )

    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    wanted_bytes = 0
    for layer, of_layer in enumerate(weights.layers):
        prefix = f"model.layers.{layer}"
        if checkpoint.config.layers[layer].is_moe:
            routed, shared = of_layer.stacks
            gate = tensors[f"{prefix}.moe.gate_proj.weight"][2:5]
            up = tensors[f"{prefix}.moe.up_proj.weight"][2:5]
            assert routed.first_id == 2
            assert torch.equal(routed.gate_up.float(), torch.cat((gate, up), dim=1))
            assert torch.equal(routed.down.float(), tensors[f"{prefix}.moe.down_proj.weight"][2:5])
            wanted_bytes += 3 * gate.nbytes
            module = "share_expert"
        else:
            (shared,) = of_layer.stacks
            module = "mlp"
        assert shared.first_id == checkpoint.config.num_experts
        down = tensors[f"{prefix}.{module}.down_proj.weight"]
        assert torch.equal(shared.down[0].float(), down)
        wanted_bytes += 3 * down.nbytes
    assert reads[-1][:2] == (wanted_bytes, wanted_bytes)
    assert [done for done, _, _ in reads] == sorted({done for done, _, _ in reads})


def test_bytes_of_other_experts_are_not_read(tmp_path: Path) -> None:
    """Counts what the process reads: one expert of a file with 24 MiB of them."""
    spec = written.CheckpointSpec(
        num_layers=2,
        moe_layers=(1,),
        moe_layers_format="absent",
        num_experts=64,
        moe_intermediate_size=256,
    )
    directory = written.write_checkpoint(tmp_path / "m", spec).directory
    checkpoint = Checkpoint.open(directory)
    before = bytes_read()
    load_ffn_weights(checkpoint, range(3, 4), torch.float32)
    # One expert of 384 KiB, the dense and shared FFNs, and what else the process reads.
    assert bytes_read() - before < 2 << 20
    assert (directory / "model.safetensors").stat().st_size > 24 << 20


def bytes_read() -> int:
    """Bytes that this process has had from read system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def test_large_tensors_are_read_whole_in_pieces(tmp_path: Path) -> None:
    rows, columns = 5, PIECE_BYTES // 2 + 1
    values = torch.randint(256, (rows, columns), dtype=torch.uint8)
    num_bytes = rows * columns
    header = {"t": {"dtype": "F8_E4M3", "shape": [5, columns], "data_offsets": [0, num_bytes]}}
    path = tmp_path / "model.safetensors"
    corruption.write_raw(path, json.dumps(header).encode(), values.numpy().tobytes())
    files = TensorFiles.open(tmp_path)
    assert torch.equal(files.read(files.entries["t"]).view(torch.uint8), values)
    some = files.read(files.entries["t"], slice(1, 4))
    assert torch.equal(some.view(torch.uint8), values[1:4])


def change_nothing_but_the_time(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "has changed since"),
        (change_nothing_but_the_time, "has changed since"),
        (Path.unlink, r"cannot be read \(No such file"),
    ],
)
def test_a_file_that_changes_before_it_is_read_is_not_used(
    tiny_checkpoint: written.Checkpoint,
    tmp_path: Path,
    change: Callable[[Path], object],
    message: str,
) -> None:
    shutil.copytree(tiny_checkpoint.directory, tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    change(tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointUnreadable, match=rf"model\.safetensors: {message}"):
        load_attention_weights(checkpoint, torch.float32)


def test_a_file_that_ends_in_the_middle_of_a_read_is_an_error_and_no_signal(
    tmp_path: Path,
) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(1000))
    reader = FileReader({path: FileVersion.of(path.stat())})
    assert reader.read(path, 990, 10).tolist() == [0] * 10
    with pytest.raises(CheckpointUnreadable, match=r"became shorter.* ends before byte 1001\."):
        reader.read(path, 990, 11)


def test_attention_role_reads_no_expert(tiny_fp8_checkpoint: written.Checkpoint) -> None:
    checkpoint = Checkpoint.open(tiny_fp8_checkpoint.directory)
    reads: list[tuple[int, int, str]] = []
    load_attention_weights(checkpoint, torch.float32, lambda *progress: reads.append(progress))
    ffn_parts = (".mlp.", ".share_expert.", ".moe.gate_proj", ".moe.up_proj", ".moe.down_proj")
    wanted_bytes = sum(
        entry.num_bytes
        for name, entry in checkpoint.files.entries.items()
        if not any(part in name for part in ffn_parts)
    )
    assert reads[-1][:2] == (wanted_bytes, wanted_bytes)
    assert reads[0][2] == "embedding and head"
    assert reads[-1][2] == "layer 3"


def test_vision_tensors_are_skipped(tiny_bf16_checkpoint: written.Checkpoint) -> None:
    checkpoint = Checkpoint.open(tiny_bf16_checkpoint.directory)
    assert "vit_large_projector.weight" in checkpoint.files.entries
    weights = load_attention_weights(checkpoint, torch.bfloat16)
    assert weights.lm_head.dtype == torch.bfloat16


def test_tensors_that_are_not_aligned_to_their_dtype_are_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32)
    header = {
        "odd": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "model": {"dtype": "F32", "shape": [6], "data_offsets": [3, 27]},
    }
    corruption.write_raw(
        tmp_path / "model.safetensors",
        json.dumps(header).encode(),
        bytes(3) + values.numpy().tobytes(),
    )
    files = TensorFiles.open(tmp_path)
    assert torch.equal(files.read(files.entries["model"]), values)
    assert torch.equal(files.read(files.entries["model"], slice(2, 4)), values[2:4])


def test_fingerprint_tells_models_apart(
    tiny_checkpoint: written.Checkpoint,
    tiny_fp8_checkpoint: written.Checkpoint,
    tiny_sharded_checkpoint: written.Checkpoint,
) -> None:
    single, fp8, sharded = (
        Checkpoint.open(written_one.directory).fingerprint()
        for written_one in (tiny_checkpoint, tiny_fp8_checkpoint, tiny_sharded_checkpoint)
    )
    assert single != fp8
    assert single == sharded  # the same model, cut otherwise


def test_description_names_what_matters(tiny_fp8_checkpoint: written.Checkpoint) -> None:
    text = describe_checkpoint(tiny_fp8_checkpoint.directory)
    assert "4 layers (2 with 8 experts), hidden 128, BF16, F32, F8_E4M3" in text
