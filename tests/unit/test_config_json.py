import json
from pathlib import Path
from typing import Any

import pytest

from step3rt.errors import ConfigError
from step3rt.model.config import Step3Config
from tests.fixtures import wrong_model
from tests.fixtures.checkpoint import Checkpoint
from tests.fixtures.corruption import damaged_copy

# The published file's text model, with its spelling: a string of layers, a singular "embedding".
PUBLISHED = {
    "architectures": ["Step3VLForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_step3.Step3VLConfig"},
    "model_type": "step3_vl",
    "bos_token_id": 0,
    "eos_token_id": 128805,
    "vision_config": {"hidden_size": 1792},
    "text_config": {
        "model_type": "step3_text",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_attention_groups": 1,
        "head_dim": 256,
        "share_q_dim": 2048,
        "moe_layers_enum": ",".join(str(layer) for layer in range(4, 60)),
        "moe_num_experts": 48,
        "moe_top_k": 3,
        "moe_intermediate_size": 5120,
        "share_expert_dim": 5120,
        "norm_expert_weight": False,
        "rope_theta": 500000,
        "rope_scaling": None,
        "max_seq_len": 65536,
        "max_position_embedding": 65536,
        "vocab_size": 128815,
        "torch_dtype": "bfloat16",
    },
}


def read(**changes: Any) -> Step3Config:
    top = json.loads(json.dumps(PUBLISHED))
    for key, value in changes.items():
        place = top if key in ("quantization_config", "eos_token_id", "model_type") else None
        place = top["text_config"] if place is None else place
        place[key] = value
        if value is None:
            del place[key]
    return Step3Config.from_json(top, Path("config.json"))


def test_published_config_has_its_traps_resolved() -> None:
    config = read()
    assert config.num_layers == 61
    assert [i for i, layer in enumerate(config.layers) if not layer.is_moe] == [0, 1, 2, 3, 60]
    assert config.max_model_len == 65536
    assert config.rms_norm_eps == 1e-5
    assert config.query_rank == 2048
    assert config.eos_token_ids == (128805,)
    assert config.weight_block_size is None


def test_flat_config_of_the_text_model_reads_the_same() -> None:
    flat = PUBLISHED["text_config"] | {"bos_token_id": 0, "eos_token_id": [128805]}
    assert Step3Config.from_json(flat, Path("config.json")) == read()


@pytest.mark.parametrize("value", ["2, 0", [0, 2]])
def test_moe_layers_are_read_from_string_and_list(value: Any) -> None:
    config = read(moe_layers_enum=value, num_hidden_layers=3)
    assert [layer.is_moe for layer in config.layers] == [True, False, True]


def test_absent_moe_layers_mean_all_but_the_first() -> None:
    config = read(moe_layers_enum=None, num_hidden_layers=3)
    assert [layer.is_moe for layer in config.layers] == [False, True, True]


def test_model_without_moe_layers_needs_no_moe_sizes() -> None:
    config = read(moe_layers_enum="", moe_num_experts=None, moe_top_k=None)
    assert (config.num_experts, config.top_k) == (0, 0)


def test_context_limit_is_found_under_either_name() -> None:
    assert read(max_position_embedding=None).max_model_len == 65536
    assert read(max_position_embedding=8, max_seq_len=None).max_model_len == 8


def test_rope_theta_is_found_where_newer_tools_write_it() -> None:
    nested = {"rope_type": "default", "rope_theta": 10000.0}
    assert read(rope_theta=None, rope_parameters=nested).rope_theta == 10_000
    assert read(rope_parameters={"rope_type": "default"}).rope_theta == 500_000
    assert read(rope_scaling={"type": "default"}).rope_theta == 500_000
    assert read(rope_theta=None).rope_theta == 500_000


def test_block_size_of_the_quantisation_is_taken_as_it_is() -> None:
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40]}
    assert read(quantization_config=quantisation).weight_block_size == (48, 40)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_groups", 8),
        ("head_dim", 255),
        ("hidden_size", True),
        ("hidden_size", 7168.0),
        ("vocab_size", 0),
        ("num_hidden_layers", 10**9),
        ("share_q_dim", None),
        ("rope_theta", float("nan")),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 500000, "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_parameters", [500000]),
        ("rms_norm_eps", -1e-5),
        ("norm_expert_weight", "false"),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("moe_layers_enum", "4,5,x"),
        ("moe_layers_enum", "4,4"),
        ("moe_layers_enum", "4,61"),
        ("moe_layers_enum", [4, -1]),
        ("moe_layers_enum", 4),
        ("moe_top_k", 49),
        ("model_type", "step3p5"),
        ("eos_token_id", "128805"),
        ("quantization_config", {"quant_method": "awq", "weight_block_size": [128, 128]}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 0]}),
    ],
)
def test_unusable_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {key}"):
        read(**{key: value})


@pytest.mark.parametrize("name", wrong_model.CONFIG_CORRUPTIONS)
def test_damaged_config_file_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    corruption = wrong_model.CONFIG_CORRUPTIONS[name]
    damaged_copy(tiny_checkpoint.directory, tmp_path / "bad", corruption)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Step3Config.from_directory(tmp_path / "bad")


def test_repeated_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "step3_text", "model_type": "x"}')
    with pytest.raises(ConfigError, match="'model_type' occurs twice"):
        Step3Config.from_directory(tmp_path)
