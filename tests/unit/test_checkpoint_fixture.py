"""Shows that the synthetic checkpoints have Step-3's layout and behave like a model."""

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.fixtures import tokenizer
from tests.fixtures.checkpoint import (
    Checkpoint,
    CheckpointSpec,
    is_quantised,
    quantise_blocks,
    weight_shapes,
    write_checkpoint,
)
from tests.fixtures.inspection import digests, load_tensors
from tests.fixtures.vision_tower import vision_shapes
from tests.oracle import step3_numpy
from tests.oracle.config import read_config
from tests.oracle.step3_numpy import Step3Oracle

STEP3 = CheckpointSpec(
    vocab_size=128815,
    hidden_size=7168,
    num_layers=61,
    num_heads=64,
    head_dim=256,
    query_rank=2048,
    intermediate_size=18432,
    moe_layers=tuple(range(4, 60)),
    num_experts=48,
    top_k=3,
    moe_intermediate_size=5120,
    share_expert_dim=5120,
    dtype="fp8",
    block_size=(128, 128),
)


# --- Layout ---


def test_the_published_sizes_give_the_published_number_of_bytes() -> None:
    shapes = weight_shapes(STEP3)
    num_parameters = {name: math.prod(shape) for name, shape in shapes.items()}
    num_fp8_bytes = 0
    for name, shape in shapes.items():
        if is_quantised(STEP3, name):
            values, scales = quantise_blocks(
                torch.empty(shape, device="meta"), STEP3.block_size, torch.float32
            )
            num_fp8_bytes += values.numel() + 4 * scales.numel()
        else:
            num_fp8_bytes += 2 * num_parameters[name]
    attention = sum(n for name, n in num_parameters.items() if ".layers.0.self_attn." in name)

    # Vision tower and projector: 4,675,374,592 parameters, bfloat16 in both checkpoints.
    vision = 4_675_374_592
    assert round(attention / 1e6, 2) == 169.35
    assert sum(num_parameters.values()) == 316_294_538_240
    assert round(2 * (sum(num_parameters.values()) + vision) / 1e9, 1) == 641.9
    assert round((num_fp8_bytes + 2 * vision) / 1e9, 3) == 327.589


def test_names_and_shapes_are_those_of_the_published_layout() -> None:
    shapes = weight_shapes(STEP3)
    assert len(shapes) == 3 + 61 * 8 + 5 * 3 + 56 * 7
    expected = {
        "model.embed_tokens.weight": (128815, 7168),
        "model.layers.0.mlp.down_proj.weight": (7168, 18432),
        "model.layers.60.mlp.gate_proj.weight": (18432, 7168),
        "model.layers.4.self_attn.q_proj.weight": (2048, 7168),
        "model.layers.4.self_attn.k_proj.weight": (256, 7168),
        "model.layers.4.self_attn.inter_norm.weight": (2048,),
        "model.layers.4.self_attn.wq.weight": (16384, 2048),
        "model.layers.4.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.59.moe.gate.weight": (48, 7168),
        "model.layers.59.moe.up_proj.weight": (48, 5120, 7168),
        "model.layers.59.moe.down_proj.weight": (48, 7168, 5120),
        "model.layers.59.share_expert.down_proj.weight": (7168, 5120),
        "lm_head.weight": (128815, 7168),
    }
    assert {name: shapes[name] for name in expected} == expected


def test_fp8_keeps_router_embedding_head_and_norms_in_bf16(tiny_fp8_checkpoint: Checkpoint) -> None:
    tensors = load_tensors(tiny_fp8_checkpoint.directory)
    bf16 = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}

    assert {name.split(".")[-2] for name in bf16} == {
        "embed_tokens",
        "input_layernorm",
        "inter_norm",
        "post_attention_layernorm",
        "gate",
        "norm",
        "lm_head",
    }
    assert scales.keys() == {name + "_scale_inv" for name in fp8}
    assert all(scale.dtype == torch.float32 for scale in scales.values())
    assert scales["model.layers.1.moe.gate_proj.weight_scale_inv"].shape == (8, 2, 4)
    assert bf16 | fp8 | scales.keys() == tensors.keys()


def test_ragged_checkpoint_differs_in_every_choice_of_layout(
    ragged_fp8_checkpoint: Checkpoint,
) -> None:
    directory = ragged_fp8_checkpoint.directory
    tensors = load_tensors(directory)
    config = json.loads((directory / "config.json").read_text())
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]

    assert weight_map.keys() == tensors.keys()
    assert len(list(directory.glob("model-0000?-of-00003.safetensors"))) == 3
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert weight_map[q_proj] != weight_map[q_proj + "_scale_inv"]
    assert tensors[q_proj + "_scale_inv"].shape == (2, 4)  # 64 / 48 and 128 / 40, rounded up
    assert tensors[q_proj + "_scale_inv"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert "text_config" not in config
    assert config["moe_layers_enum"] == [1, 2]


def test_configs_of_all_layouts_read_the_same(
    tiny_checkpoint: Checkpoint, ragged_fp8_checkpoint: Checkpoint
) -> None:
    nested = read_config(tiny_checkpoint.directory)
    flat = read_config(ragged_fp8_checkpoint.directory)
    assert "rms_norm_eps" not in (tiny_checkpoint.directory / "config.json").read_text()
    assert nested.rms_norm_eps == 1e-5
    assert nested.moe_layers == {1, 2}
    assert nested.max_position == 1024
    assert nested.eos_token_ids == {1}
    assert (nested.weight_block_size, flat.weight_block_size) == (None, (48, 40))
    for name in nested.__slots__:
        if name != "weight_block_size":
            assert getattr(nested, name) == getattr(flat, name), name


def test_vision_tensors_do_not_change_the_text_model(
    tiny_bf16_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    text_only = write_checkpoint(tmp_path / "text", CheckpointSpec(dtype="bfloat16"))
    with_vision = Step3Oracle.load(tiny_bf16_checkpoint.directory)
    without = Step3Oracle.load(text_only.directory)
    tensors = load_tensors(tiny_bf16_checkpoint.directory)
    assert tensors.keys() == without.weights.keys() | vision_shapes(128).keys()
    np.testing.assert_array_equal(with_vision.logits([5, 6]), without.logits([5, 6]))


def test_same_spec_gives_the_same_bytes_and_another_seed_others(
    tiny_fp8_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    again = write_checkpoint(tmp_path / "again", CheckpointSpec(dtype="fp8"))
    other = write_checkpoint(tmp_path / "other", CheckpointSpec(dtype="fp8", seed=1))
    expected = digests(tiny_fp8_checkpoint.directory)
    assert digests(again.directory) == expected
    assert digests(other.directory).keys() == expected.keys()
    assert digests(other.directory)["model.safetensors"] != expected["model.safetensors"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_layers_format": "absent"}, r"1\.\.L-1"),
        ({"moe_layers": (4,)}, "4 layers"),
        ({"head_dim": 31}, "odd"),
    ],
)
def test_a_spec_that_cannot_be_written_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointSpec(**fields)


# --- The oracle reads what the safetensors library wrote, for any sizes ---


@st.composite
def specs(draw: st.DrawFn) -> CheckpointSpec:
    num_layers = draw(st.integers(1, 3))
    moe_layers_format: Any = draw(st.sampled_from(["string", "list", "absent"]))
    layers = list(range(num_layers))
    some_layers = draw(st.lists(st.sampled_from(layers), unique=True).map(sorted))
    num_experts = draw(st.integers(1, 5))
    size = st.integers(1, 40)
    return CheckpointSpec(
        seed=draw(st.integers(0, 1000)),
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(size),
        num_layers=num_layers,
        num_heads=draw(st.integers(1, 5)),
        head_dim=2 * draw(st.integers(1, 10)),
        query_rank=draw(size),
        intermediate_size=draw(size),
        moe_layers=tuple(layers[1:] if moe_layers_format == "absent" else some_layers),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        moe_intermediate_size=draw(size),
        share_expert_dim=draw(size),
        norm_expert_weight=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "fp8"])),
        block_size=draw(st.tuples(st.integers(1, 50), st.integers(1, 50))),
        scale_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        num_shards=draw(st.integers(1, 3)),
        config_layout=draw(st.sampled_from(["nested", "flat"])),
        moe_layers_format=moe_layers_format,
    )


@given(specs())
def test_the_oracle_reads_checkpoints_of_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, spec: CheckpointSpec
) -> None:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("any"), spec)
    oracle = Step3Oracle.load(checkpoint.directory)
    stored = load_tensors(checkpoint.directory)

    assert oracle.weights.keys() == weight_shapes(spec).keys()
    for name, weight in oracle.weights.items():
        expected = stored[name].double()
        if spec.dtype == "fp8" and is_quantised(spec, name):
            block_rows, block_columns = spec.block_size
            scale = stored[name + "_scale_inv"].double()
            row_block = torch.arange(expected.shape[-2]) // block_rows
            column_block = torch.arange(expected.shape[-1]) // block_columns
            expected *= scale[..., row_block[:, None], column_block]
        np.testing.assert_array_equal(weight, expected.numpy())
    logits = oracle.logits([0, 1, 1])
    assert logits.shape == (3, spec.vocab_size)
    assert np.all(np.isfinite(logits))


# --- Behaviour of the random models ---


@pytest.mark.parametrize("name", ["tiny_checkpoint", "tiny_bf16_checkpoint", "tiny_fp8_checkpoint"])
def test_the_first_choice_usually_leads_and_all_experts_work(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Step3Oracle.load(request.getfixturevalue(name).directory)
    chosen: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    original = step3_numpy.choose_experts

    def recording(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        topk_ids, topk_weights = original(*arguments)
        chosen.append(topk_ids)
        weights.append(topk_weights)
        return topk_ids, topk_weights

    monkeypatch.setattr(step3_numpy, "choose_experts", recording)
    logits = oracle.logits(np.random.default_rng(3).integers(0, 256, 64).tolist())

    best_two = np.sort(logits, axis=-1)[:, -2:]
    assert np.mean(best_two[:, 1] - best_two[:, 0] > 0.05) >= 0.9
    for topk_ids in chosen:  # one entry per MoE layer
        assert set(topk_ids.ravel()) == set(range(8))
    # Neither a lone winner nor eight equals.
    assert all(0.3 < np.mean(np.sum(topk_weights, axis=-1)) < 0.9 for topk_weights in weights)


def test_greedy_text_does_not_fall_into_one_token(tiny_oracle: Step3Oracle) -> None:
    assert len(set(tiny_oracle.generate_greedy([3, 4, 5], max_tokens=24).token_ids)) >= 10


# --- Tokenizer ---


def test_tokenizer_round_trips_any_text(chat_checkpoint: Checkpoint) -> None:
    loaded = Tokenizer.from_file(str(chat_checkpoint.directory / "tokenizer.json"))
    assert loaded.get_vocab() == tokenizer.vocabulary()
    assert loaded.get_vocab_size() <= chat_checkpoint.spec.vocab_size
    for text in ("the thing and", " \n\ttabs", "caf\u00e9 \u6b65 \U0001f680"):
        assert loaded.decode(loaded.encode(text).ids) == text
    assert loaded.encode(" the").ids == [tokenizer.vocabulary()["\u0120the"]]
    assert loaded.encode(f"{tokenizer.BOS_TOKEN}a{tokenizer.EOS_TOKEN}").ids[::2] == [0, 1]


@pytest.mark.parametrize("file_format", ["json", "jinja"])
def test_chat_template_renders_as_published(tmp_path: Path, file_format: Any) -> None:
    tokenizer.write_tokenizer(tmp_path, 320, file_format)
    path = tmp_path / f"chat_template.{file_format}"
    text = path.read_text()
    template = json.loads(text)["chat_template"] if file_format == "json" else text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    rendered = jinja2.Template(template).render(
        messages=messages, bos_token="<bos>", add_generation_prompt=True
    )
    assert rendered == ("<bos> Be brief. <|BOT|>user\n Hello <|EOT|><|BOT|>assistant\n<think>\n")


def test_a_vocabulary_below_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 256"):
        write_checkpoint(tmp_path, CheckpointSpec(vocab_size=256, has_tokenizer=True))
