"""The cost model gives the Step-3 paper's tables 2 to 7 and its headlines, from configs alone.

Expected values are the paper's (arXiv 2507.19427v1). "Within rounding" is half a unit of the last
digit that it prints.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3rt.errors import ConfigError
from step3rt.plan.cost import afd_cost, min_moe_sparsity, token_cost
from step3rt.plan.hardware import Hardware, load_hardware, pick_hardware
from step3rt.plan.hf_config import load_model, parse_config, shipped_models

PAPER_CARDS = ("h800", "h20", "a800", "910b")

# model: KV bytes and attention FLOPs at 8K and 32K, linear FLOPs, FFN FLOPs (tables 2 and 3)
PER_TOKEN = {
    "deepseek-v3": (2.88e8, 1.47e11, 1.15e9, 5.89e11, 2.28e10, 4.84e10),
    "kimi-k2": (2.88e8, 7.37e10, 1.15e9, 2.95e11, 1.23e10, 4.84e10),
    "qwen3-235b-a22b": (7.89e8, 2.52e10, 3.15e9, 1.01e11, 1.34e10, 2.84e10),
    "qwen3-32b": (1.07e9, 1.72e10, 4.29e9, 6.87e10, 1.21e10, 5.03e10),
    "llama4-maverick": (1.01e9, 8.05e9, 2.21e9, 1.41e10, 6.04e9, 2.42e10),
    "minimax-m1": (9.23e8, 3.42e9, 1.93e9, 1.15e10, 3.75e10, 5.44e10),
    "ernie-4.5": (9.06e8, 1.45e10, 3.62e9, 5.80e10, 1.63e10, 7.61e10),
    "pangu-pro-moe": (8.05e8, 8.05e9, 3.22e9, 3.22e10, 6.04e9, 2.38e10),
    "step3": (2.56e8, 3.27e10, 1.02e9, 1.31e11, 2.07e10, 5.33e10),
}

# model: attention USD at 8K, at 32K, FFN USD, each on the four cards (table 6)
USD = {
    "deepseek-v3": (
        (0.054, 0.128, 0.114, 0.113),
        (0.197, 0.460, 0.409, 0.407),
        (0.014, 0.036, 0.032, 0.032),
    ),
    "kimi-k2": (
        (0.051, 0.065, 0.057, 0.057),
        (0.194, 0.231, 0.205, 0.204),
        (0.014, 0.036, 0.032, 0.032),
    ),
    "qwen3-235b-a22b": (
        (0.135, 0.054, 0.091, 0.101),
        (0.527, 0.185, 0.338, 0.376),
        (0.008, 0.021, 0.019, 0.019),
    ),
    "qwen3-32b": (
        (0.181, 0.069, 0.120, 0.133),
        (0.716, 0.248, 0.455, 0.508),
        (0.014, 0.038, 0.034, 0.033),
    ),
    "llama4-maverick": (
        (0.169, 0.060, 0.109, 0.121),
        (0.369, 0.128, 0.235, 0.262),
        (0.007, 0.018, 0.016, 0.016),
    ),
    "minimax-m1": (
        (0.164, 0.079, 0.121, 0.132),
        (0.330, 0.135, 0.226, 0.249),
        (0.015, 0.041, 0.036, 0.036),
    ),
    "ernie-4.5": (
        (0.155, 0.063, 0.105, 0.116),
        (0.606, 0.214, 0.388, 0.432),
        (0.021, 0.057, 0.051, 0.051),
    ),
    "pangu-pro-moe": (
        (0.135, 0.049, 0.088, 0.098),
        (0.536, 0.183, 0.340, 0.379),
        (0.007, 0.018, 0.016, 0.016),
    ),
    "step3": (
        (0.048, 0.040, 0.040, 0.043),
        (0.176, 0.114, 0.120, 0.133),
        (0.015, 0.040, 0.036, 0.035),
    ),
}

# advertised total and active parameters in billions
PARAMETERS = {
    "deepseek-v3": (671, 37),
    "kimi-k2": (1026, 32),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-32b": (32.8, 32.8),
    "llama4-maverick": (400, 17),
    "minimax-m1": (456, 46),
    "ernie-4.5": (300, 47),
    "pangu-pro-moe": (72, 16.5),
    "step3": (316, 38),
}


CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "share_q_dim",
    "kv_lora_rank",
    "q_lora_rank",
    "v_head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "first_k_dense_replace",
    "moe_layer_freq",
    "moe_layers_enum",
    "attn_type_list",
    "no_rope_layers",
    "attention_chunk_size",
    "layer_types",
    "sliding_window",
    "mlp_only_layers",
    "text_config",
)


@pytest.fixture(scope="module")
def cards() -> list[Hardware]:
    known = load_hardware()
    return [known[key] for key in PAPER_CARDS]


def rounds_to(value: float, printed: float) -> bool:
    """Whether `value` has `printed`'s three digits."""
    return f"{value:.2e}" == f"{printed:.2e}"


def test_every_model_of_the_paper_ships() -> None:
    assert set(shipped_models()) == set(PER_TOKEN)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_bytes_and_flops_are_those_of_tables_2_and_3(name: str) -> None:
    kv_8k, attn_8k, kv_32k, attn_32k, linear, ffn = PER_TOKEN[name]
    model = load_model(name)
    at_8k, at_32k = token_cost(model, 8192), token_cost(model, 32768)
    assert rounds_to(at_8k.kv_bytes, kv_8k)
    assert rounds_to(at_8k.attn_flops, attn_8k)
    assert rounds_to(at_32k.kv_bytes, kv_32k)
    assert rounds_to(at_32k.attn_flops, attn_32k)
    assert rounds_to(at_8k.linear_flops, linear)
    assert rounds_to(at_32k.ffn_flops, ffn)


@pytest.mark.parametrize("name", USD)
def test_usd_per_token_are_those_of_table_6(name: str, cards: list[Hardware]) -> None:
    model = load_model(name)
    at_8k, at_32k = token_cost(model, 8192), token_cost(model, 32768)
    attention_8k, attention_32k, ffn = USD[name]
    for index, card in enumerate(cards):
        assert at_8k.attention_usd(card) == pytest.approx(attention_8k[index], abs=5e-4)
        assert at_32k.attention_usd(card) == pytest.approx(attention_32k[index], abs=5e-4)
        assert at_8k.ffn_usd(card) == pytest.approx(ffn[index], abs=5e-4)


def test_unit_prices_and_rooflines_are_those_of_tables_4_and_5(cards: list[Hardware]) -> None:
    expected = ((2.80e-19, 1.66e-16, 591), (7.51e-19, 5.56e-17, 74))
    expected += ((6.68e-19, 1.04e-16, 156), (6.65e-19, 1.16e-16, 175))
    for card, (usd_per_flop, usd_per_byte, roofline) in zip(cards, expected, strict=True):
        assert card.usd_per_flop == pytest.approx(usd_per_flop, rel=0.003)
        assert card.usd_per_byte == pytest.approx(usd_per_byte, rel=0.003)
        assert round(card.roofline) == roofline


@pytest.mark.parametrize(
    ("name", "usd_8k", "usd_32k"),
    [
        ("step3", 0.055, 0.129),
        ("deepseek-v3", 0.068, 0.211),
        ("qwen3-235b-a22b", 0.062, 0.193),
    ],
)
def test_headline_costs(name: str, usd_8k: float, usd_32k: float, cards: list[Hardware]) -> None:
    model = load_model(name)
    assert afd_cost(token_cost(model, 8192), cards).usd == pytest.approx(usd_8k, abs=5e-4)
    assert afd_cost(token_cost(model, 32768), cards).usd == pytest.approx(usd_32k, abs=5e-4)


def test_step3_is_cheapest_with_attention_on_h20_and_ffn_on_h800(cards: list[Hardware]) -> None:
    best = afd_cost(token_cost(load_model("step3"), 8192), cards)
    assert (best.attention_card, best.ffn_card) == ("h20", "h800")


def test_minimum_sparsity_is_that_of_table_7(cards: list[Hardware]) -> None:
    step3 = load_model("step3")
    found = [round(min_moe_sparsity(step3.hidden_size, 61, card), 3) for card in cards]
    assert found == [0.058, 0.007, 0.031, 0.034]


def test_intensity_rank_and_sparsity_are_those_of_section_5() -> None:
    intensity = {name: token_cost(load_model(name), 8192).arithmetic_intensity for name in USD}
    assert intensity["step3"] == pytest.approx(128)
    assert intensity["deepseek-v3"] == pytest.approx(512)
    assert intensity["qwen3-235b-a22b"] == pytest.approx(32)
    assert load_model("step3").effective_rank == load_model("deepseek-v3").effective_rank == 16384
    assert load_model("qwen3-235b-a22b").effective_rank == 8192
    assert load_model("step3").sparsity == pytest.approx(0.08, abs=0.002)
    assert load_model("deepseek-v3").sparsity == pytest.approx(9 / 257)
    assert load_model("qwen3-32b").sparsity is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_advertised_ones(name: str) -> None:
    total, active = PARAMETERS[name]
    model = load_model(name)
    assert model.total_params / 1e9 == pytest.approx(total, rel=0.005)
    # Publishers disagree on whether the embedding and the LM head are "active".
    assert model.active_params / 1e9 == pytest.approx(active, rel=0.06)


def test_a_checkpoint_directory_is_a_model(tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    directory.mkdir()
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps({"text_config": config}))
    model = load_model(str(directory))
    assert model.name == "tiny"
    cost = token_cost(model, 10)
    assert cost.kv_bytes == 2 * 10 * (2 * 2 * 16)
    assert cost.attn_flops == 2 * 10 * (4 * 4 * 16)
    assert cost.ffn_flops == 2 * 2 * (3 * 64 * 128)


def test_llama4_without_a_list_of_layers_is_full_in_every_fourth() -> None:
    sizes = {"hidden_size": 64, "vocab_size": 10, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 8, "num_attention_heads": 4, "attention_chunk_size": 16}
    model = parse_config("x", sizes | {"no_rope_layers": []})
    assert {g.attention.kind: g.count for g in model.groups} == {"gqa": 2, "window": 6}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "num_hidden_layers = nothing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000; at most 10000"),
        ({"num_hidden_layers": 2, "num_attention_heads": "4"}, "num_attention_heads = '4'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        (
            {"num_hidden_layers": 2, "layer_types": ["mamba", "mamba"]},
            "'mamba' .*of no known family",
        ),
        ({"num_hidden_layers": 2, "attn_type_list": [1]}, "no list of 2 entries"),
    ],
)
def test_impossible_configs_are_refused(config: dict[str, object], message: str) -> None:
    sizes = {"hidden_size": 64, "vocab_size": 10, "intermediate_size": 8}
    with pytest.raises(ConfigError, match=message):
        parse_config("x", sizes | config)


@given(
    st.dictionaries(
        st.sampled_from(CONFIG_KEYS),
        st.integers(-1, 70)
        | st.sampled_from([None, True, 1.5, "1,2", [0, 1], [1] * 70, "x", 1 << 50]),
    )
)
def test_any_config_is_a_model_with_a_cost_or_an_error(config: dict[str, object]) -> None:
    sizes = {"hidden_size": 64, "vocab_size": 10, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    try:
        model = parse_config("x", sizes | config)
    except ConfigError:
        return
    cost = token_cost(model, 100)
    assert cost.kv_bytes > 0
    assert cost.attn_flops > 0
    assert model.sparsity is None or 0 < model.sparsity <= 1


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"deepseek-v3.*or give the path"):
        load_model("step4")


def test_a_user_changes_a_price_and_adds_a_card(tmp_path: Path) -> None:
    file = tmp_path / "cards.toml"
    file.write_text(
        "[h800]\nusd_per_hour = 1.0\n[mine]\nusd_per_hour = 1\nbf16_flops = 1e14\n"
        "bytes_per_s = 1e12\nmemory_bytes = 24e9\nnic_bytes_per_s = 1e10\ngpus_per_host = 4\n"
    )
    cards = load_hardware(file)
    cost = token_cost(load_model("step3"), 8192)
    assert cost.ffn_usd(cards["h800"]) == pytest.approx(cost.ffn_usd(load_hardware()["h800"]) / 2)
    assert cards["mine"].peak_flops == 1e14
    assert cards["h800"].bytes_per_s == 3.35e12


def test_a_card_that_ships_is_changed_however_its_name_is_written(tmp_path: Path) -> None:
    file = tmp_path / "cards.toml"
    file.write_text("[H800]\nusd_per_hour = 1.0\n")
    cards = load_hardware(file)
    assert set(cards) == set(load_hardware())
    assert cards["h800"].usd_per_hour == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mine]\nusd_per_hour = 1\n", "'bf16_flops' of card 'mine' is missing"),
        ("[h800]\nprice = 1\n", "'price' of card 'h800' does not exist"),
        ("[h800]\nusd_per_hour = '2'\n", "must be a number above 0"),
        ("[h800]\nusd_per_hour = nan\n", "must be a number above 0"),
        ("[h800]\nusd_per_hour = inf\n", "must be a number above 0, and finite"),
        ("[h800]\nmemory_bytes = 1e308\n", "from 1e-09 to 1e\\+21"),
        ("[h800]\ngpus_per_host = 0.5\n", "must be a whole number above 0"),
        ("h800 = 2\n", "'h800' of .* is not a table"),
    ],
)
def test_wrong_hardware_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cards.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_hardware(file)


def test_unknown_card_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'h800'"):
        pick_hardware("h80", load_hardware())
