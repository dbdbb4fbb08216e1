"""Each disagreement that the planner reports is there, by the paper's own numbers."""

import pytest

from step3rt.plan.cost import afd_cost, token_cost
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.paper import DISAGREEMENTS

CARDS = load_hardware()


def usd(name: str, context: int, card: str) -> float:
    cost = token_cost(load_model(name), context)
    return cost.attention_usd(CARDS[card]) + cost.ffn_usd(CARDS[card])


def afd_usd(name: str, context: int) -> float:
    cards = [CARDS[key] for key in ("h800", "h20", "a800", "910b")]
    return afd_cost(token_cost(load_model(name), context), cards).usd


def test_mla_flops_count_the_rotary_part_of_the_values() -> None:
    counted = token_cost(load_model("deepseek-v3"), 8192).attn_flops
    exact = 61 * 8192 * 2 * 128 * (576 + 512)
    assert counted / exact == pytest.approx(1.059, abs=5e-4)
    assert exact / token_cost(load_model("deepseek-v3"), 8192).kv_bytes == pytest.approx(484, abs=1)


def test_minimax_states_cost_ten_flops_an_element_and_move_twice() -> None:
    state = 70 * 64 * 128 * 128
    full_flops, full_bytes = 10 * 8192 * 4 * 64 * 128, 10 * 8192 * 2 * 8 * 128 * 2
    assert (3.42e9 - full_flops) / state == pytest.approx(10, rel=0.01)
    assert (9.23e8 - full_bytes) / (4 * state) == pytest.approx(2, rel=0.01)
    groups = {g.attention.kind: g.count for g in load_model("minimax-m1").groups}
    assert groups == {"linear": 70, "gqa": 10}


def test_qwen_on_h20_against_deepseek_on_h800() -> None:
    at_8k, at_32k = (
        usd("qwen3-235b-a22b", context, "h20") / usd("deepseek-v3", context, "h800") - 1
        for context in (8192, 32768)
    )
    assert at_8k == pytest.approx(0.10, abs=0.015)
    assert at_32k == pytest.approx(-0.02, abs=0.005)
    assert afd_usd("qwen3-235b-a22b", 8192) / afd_usd("deepseek-v3", 8192) - 1 == pytest.approx(
        -0.09, abs=0.005
    )


def test_what_step3_saves() -> None:
    saved = [
        round(100 * (1 - afd_usd("step3", context) / afd_usd(other, context)))
        for context in (8192, 32768)
        for other in ("deepseek-v3", "qwen3-235b-a22b")
    ]
    assert saved == [19, 11, 39, 33]


def test_tokens_of_4a2f_by_the_number_of_gpus() -> None:
    assert round(4039 * (2 + 2) / (4 + 2)) == 2693


def test_tokens_that_the_network_sustains() -> None:
    step3 = load_model("step3")
    stage_s = 0.0166 / step3.num_layers
    host_bytes_per_s = 8 * CARDS["h800"].nic_bytes_per_s
    assert round(stage_s * host_bytes_per_s / (3 * step3.hidden_size)) == 5062
    needed_us = 1e6 * 4 * 1024 * 3 * step3.hidden_size / (8 * 40e9)
    assert needed_us == pytest.approx(275, abs=0.5)


def test_every_entry_names_known_models() -> None:
    for entry in DISAGREEMENTS:
        for name in entry.models:
            assert load_model(name).name == name
