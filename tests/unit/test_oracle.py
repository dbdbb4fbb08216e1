"""Shows that the float64 oracle is Step-3, and that it can tell Step-3 from near misses."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures.checkpoint import Checkpoint, make_weights
from tests.oracle import step3_numpy
from tests.oracle.config import OracleConfig, parse_moe_layers
from tests.oracle.near_misses import map_weights, relative_difference
from tests.oracle.step3_numpy import Step3Oracle, choice_gap, choose_experts, rms_norm, rotate
from tests.oracle.tensor_file import E4M3_VALUES, Array, decode_bf16, dequantise

TOKEN_IDS = np.random.default_rng(5).integers(0, 256, 24).tolist()


# --- Worked examples ---


def one_layer_config(**changes: Any) -> OracleConfig:
    config = OracleConfig(
        vocab_size=3,
        hidden_size=2,
        num_layers=1,
        num_heads=1,
        head_dim=2,
        query_rank=2,
        num_experts=3,
        top_k=2,
        moe_layers=frozenset(),
        norm_expert_weight=False,
        rope_theta=500_000.0,
        rms_norm_eps=0.0,
        max_position=16,
        eos_token_ids=frozenset(),
        weight_block_size=None,
    )
    return dataclasses.replace(config, **changes)


def one_layer_weights(**layer: list[object]) -> dict[str, Array]:
    weights = {
        "model.embed_tokens.weight": [[1, 1], [1, -1], [9, 9]],
        "model.norm.weight": [1, 1],
        "lm_head.weight": [[1, 0], [0, 1], [1, 1]],
        "model.layers.0.input_layernorm.weight": [1, 2],
        "model.layers.0.self_attn.q_proj.weight": [[1, 1], [1, -1]],
        "model.layers.0.self_attn.inter_norm.weight": [math.sqrt(5), 2 * math.sqrt(5)],
        "model.layers.0.self_attn.wq.weight": [[0.1, 0], [0, 0.1]],
        "model.layers.0.self_attn.k_proj.weight": [[1, 0], [0, 1]],
        "model.layers.0.self_attn.v_proj.weight": [[0, 1], [1, 0]],
        "model.layers.0.self_attn.o_proj.weight": [[1, 0], [0, 2]],
        "model.layers.0.post_attention_layernorm.weight": [1, 1],
    }
    weights |= {f"model.layers.0.{key.replace('__', '.')}.weight": w for key, w in layer.items()}
    return {name: np.array(weight, dtype=np.float64) for name, weight in weights.items()}


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def normalised(x: list[float]) -> list[float]:
    rms = math.sqrt((x[0] ** 2 + x[1] ** 2) / 2)
    return [x[0] / rms, x[1] / rms]


def test_one_dense_layer_equals_the_calculation_by_hand() -> None:
    oracle = Step3Oracle(
        one_layer_config(),
        one_layer_weights(
            mlp__gate_proj=[[2, 0]], mlp__up_proj=[[0, 3]], mlp__down_proj=[[1], [-1]]
        ),
    )
    # Embeddings (1, 1) and (1, -1) have rms 1, so h = (1, 2), (1, -2) after the norm weights.
    # k = h; v = h swapped = (2, 1), (-2, 1); latent = (3, -1), (-1, 3) with rms sqrt(5), so that
    # inter_norm gives (3, -2), (-1, 6) and wq a tenth of it. Position 1 is turned by 1 radian:
    # its score against itself is that of the unturned vectors, against position 0 it is
    # (-0.1 cos 1 - 0.6 sin 1) * 1 + (0.6 cos 1 - 0.1 sin 1) * 2; both over sqrt(2).
    score_0 = (1.1 * math.cos(1) - 0.8 * math.sin(1)) / math.sqrt(2)
    score_1 = (-0.1 * 1 + 0.6 * -2) / math.sqrt(2)
    p0 = 1 / (1 + math.exp(score_1 - score_0))

    after_attention = [[1 + 2.0, 1 + 2.0], [1 + 2 * p0 - 2 * (1 - p0), -1 + 2.0]]
    expected = []
    for x in after_attention:
        h = normalised(x)
        y = silu(2 * h[0]) * 3 * h[1]
        final = normalised([x[0] + y, x[1] - y])
        expected.append([final[0], final[1], final[0] + final[1]])

    np.testing.assert_allclose(oracle.logits([0, 1]), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("norm_expert_weight", "expert_weights"),
    [(False, (4 / 7, 2 / 7)), (True, (2 / 3, 1 / 3))],
)
def test_one_moe_layer_equals_the_calculation_by_hand(
    norm_expert_weight: bool, expert_weights: tuple[float, float]
) -> None:
    oracle = Step3Oracle(
        one_layer_config(moe_layers=frozenset([0]), norm_expert_weight=norm_expert_weight),
        one_layer_weights(
            # Router logits of h = (1, 1): 0, ln 4, ln 2. Probabilities: 1/7, 4/7, 2/7.
            moe__gate=[[0, 0], [math.log(4), 0], [0, math.log(2)]],
            moe__gate_proj=[[[1, 0]], [[2, 0]], [[3, 0]]],
            moe__up_proj=[[[0, 1]], [[0, 1]], [[0, 2]]],
            moe__down_proj=[[[1], [0]], [[1], [0]], [[0], [1]]],
            share_expert__gate_proj=[[4, 0]],
            share_expert__up_proj=[[0, 1]],
            share_expert__down_proj=[[1], [1]],
        ),
    )
    first, second = expert_weights
    shared = silu(4)
    # The attention of one token is v = (2, 1), so x = (1, 1) + (2, 2) and h = (1, 1).
    x = [3 + first * silu(2) + shared, 3 + second * silu(3) * 2 + shared]
    final = normalised(x)
    expected = [[final[0], final[1], final[0] + final[1]]]
    np.testing.assert_allclose(oracle.logits([0]), expected, rtol=1e-14)


# --- Properties of the architecture ---


def test_logits_do_not_depend_on_later_tokens(tiny_oracle: Step3Oracle) -> None:
    before = tiny_oracle.logits(TOKEN_IDS)
    changed = [*TOKEN_IDS[:10], (TOKEN_IDS[10] + 1) % 256, *TOKEN_IDS[11:]]
    after = tiny_oracle.logits(changed)

    assert relative_difference(after[:10], before[:10]) < 1e-13
    moved = np.max(np.abs(after - before), axis=-1)
    assert np.all(moved[10:] > 1e-3)


def test_logits_of_a_prefix_are_the_prefix_of_the_logits(tiny_oracle: Step3Oracle) -> None:
    whole = tiny_oracle.logits(TOKEN_IDS)
    for length in (1, 2, 13):
        assert relative_difference(tiny_oracle.logits(TOKEN_IDS[:length]), whole[:length]) < 1e-13


def test_only_relative_positions_matter(tiny_oracle: Step3Oracle) -> None:
    at_0 = tiny_oracle.logits(TOKEN_IDS)
    # The angles are float32 values, exact to about 1e-7 of a turn at these positions.
    at_1 = tiny_oracle.forward(TOKEN_IDS, first_position=1).logits
    at_40 = tiny_oracle.forward(TOKEN_IDS, first_position=40).logits
    assert relative_difference(at_1, at_0) < 1e-6
    assert relative_difference(at_40, at_0) < 1e-6
    assert not np.array_equal(at_40, at_0)  # the shift did reach the angles


@given(
    st.integers(1, 64),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.integers(0, 2**32 - 1),
)
def test_rope_scores_depend_on_the_distance_alone(
    half: int, q_position: int, k_position: int, shift: int, seed: int
) -> None:
    q, k = np.random.default_rng(seed).standard_normal((2, 2 * half))

    def score(q_at: int, k_at: int) -> float:
        turned_q, turned_k = (
            rotate(x, np.array(at), 500_000.0) for x, at in ((q, q_at), (k, k_at))
        )
        return float(turned_q @ turned_k)

    here, there = score(q_position, k_position), score(q_position + shift, k_position + shift)
    # Each of the four angles is a float32 below 4096 radians, so it is off by 2.4e-4 at most.
    assert abs(here - there) <= 2e-3 * np.linalg.norm(q) * np.linalg.norm(k)


def test_rope_turns_dim_j_with_dim_j_plus_half() -> None:
    # Head dim 4, theta 100: frequencies 1 and 0.1. At position 2, dims 0 and 2 turn by 2 radians,
    # dims 1 and 3 by 0.2.
    turned = rotate(np.array([1.0, 10.0, 0.0, 0.0]), np.array(2), 100.0)
    expected = [math.cos(2), 10 * math.cos(0.2), math.sin(2), 10 * math.sin(0.2)]
    np.testing.assert_allclose(turned, expected, rtol=1e-7)

    unturned = rotate(np.array([1.0, 2.0, 3.0, 4.0]), np.array(0), 100.0)
    np.testing.assert_array_equal(unturned, [1, 2, 3, 4])


def test_one_token_attends_to_its_value_alone(tiny_oracle: Step3Oracle) -> None:
    queries_and_keys = ("self_attn.q_proj.weight", "self_attn.wq.weight", "self_attn.k_proj.weight")
    other = map_weights(tiny_oracle, lambda w: w[::-1], *queries_and_keys)

    assert relative_difference(other.logits([7]), tiny_oracle.logits([7])) < 1e-13
    assert relative_difference(other.logits([7, 8]), tiny_oracle.logits([7, 8])) > 1e-3


def test_permuted_heads_give_the_same_logits(tiny_oracle: Step3Oracle) -> None:
    heads = np.random.default_rng(0).permutation(tiny_oracle.config.num_heads)
    dims = np.arange(128).reshape(4, 32)[heads].ravel()
    wq_only = map_weights(tiny_oracle, lambda w: w[dims], "self_attn.wq.weight")
    both = map_weights(wq_only, lambda w: w[:, dims], "self_attn.o_proj.weight")

    expected = tiny_oracle.logits(TOKEN_IDS)
    assert relative_difference(both.logits(TOKEN_IDS), expected) < 1e-12
    assert relative_difference(wq_only.logits(TOKEN_IDS), expected) > 1e-3


def test_permuted_experts_give_the_same_logits(tiny_oracle: Step3Oracle) -> None:
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    stacks = tuple(f"moe.{name}_proj.weight" for name in ("gate", "up", "down"))
    router_only = map_weights(tiny_oracle, lambda w: w[order], "moe.gate.weight")
    both = map_weights(router_only, lambda w: w[order], *stacks)

    expected = tiny_oracle.logits(TOKEN_IDS)
    assert relative_difference(both.logits(TOKEN_IDS), expected) < 1e-12
    assert relative_difference(router_only.logits(TOKEN_IDS), expected) > 1e-3


def test_inter_norm_removes_the_scale_of_q_proj(tiny_oracle: Step3Oracle) -> None:
    without_eps = dataclasses.replace(
        tiny_oracle, config=dataclasses.replace(tiny_oracle.config, rms_norm_eps=0.0)
    )
    scaled = map_weights(without_eps, lambda w: 3 * w, "self_attn.q_proj.weight")
    assert relative_difference(scaled.logits(TOKEN_IDS), without_eps.logits(TOKEN_IDS)) < 1e-12


@pytest.mark.parametrize(
    ("doubled", "halved"),
    [
        ("self_attn.v_proj.weight", "self_attn.o_proj.weight"),
        ("self_attn.wq.weight", "self_attn.k_proj.weight"),
        ("up_proj.weight", "down_proj.weight"),
    ],
)
def test_a_factor_moves_freely_between_linear_partners(
    tiny_oracle: Step3Oracle, doubled: str, halved: str
) -> None:
    moved = map_weights(tiny_oracle, lambda w: 2 * w, doubled)
    moved = map_weights(moved, lambda w: w / 2, halved)
    assert relative_difference(moved.logits(TOKEN_IDS), tiny_oracle.logits(TOKEN_IDS)) < 1e-13


def test_rms_norm_adds_eps_inside_the_root() -> None:
    x = np.array([[3e-3, 4e-3]])  # mean square 1.25e-5
    expected = x / math.sqrt(1.25e-5 + 1e-5) * [1.0, 2.0]
    np.testing.assert_allclose(rms_norm(x, np.array([1.0, 2.0]), 1e-5), expected, rtol=1e-15)


def test_equal_experts_are_chosen_by_lower_id() -> None:
    topk_ids, topk_weights = choose_experts(np.zeros((1, 4)), top_k=2, norm_expert_weight=False)
    np.testing.assert_array_equal(topk_ids, [[0, 1]])
    np.testing.assert_array_equal(topk_weights, [[0.25, 0.25]])


def test_choice_gap_is_between_the_last_chosen_and_the_first_rejected() -> None:
    router_logits = np.array([[9.0, 1.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(choice_gap(router_logits, top_k=2), [2.0, 0.0])
    np.testing.assert_array_equal(choice_gap(router_logits, top_k=4), [np.inf, np.inf])


def test_router_gap_is_the_smallest_of_the_moe_layers(
    tiny_oracle: Step3Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = iter([np.array([1.0, 4.0]), np.array([2.0, 3.0])])
    monkeypatch.setattr(step3_numpy, "choice_gap", lambda router_logits, top_k: next(gaps))
    np.testing.assert_array_equal(tiny_oracle.forward([3, 4]).router_gap, [1.0, 3.0])


# --- Greedy decoding ---


def test_greedy_tokens_are_the_best_of_the_teacher_forced_logits(tiny_oracle: Step3Oracle) -> None:
    prompt = TOKEN_IDS[:5]
    greedy = tiny_oracle.generate_greedy(prompt, max_tokens=6)

    logits = tiny_oracle.logits([*prompt, *greedy.token_ids])
    probabilities = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)
    assert greedy.finish_reason == "length"
    assert greedy.token_ids == np.argmax(logits, axis=-1)[4:10].tolist()
    np.testing.assert_allclose(np.exp(greedy.logprobs), probabilities[4:10], rtol=1e-11)
    expected_prompt = [probabilities[t, prompt[t + 1]] for t in range(4)]
    np.testing.assert_allclose(np.exp(greedy.prompt_logprobs), expected_prompt, rtol=1e-11)
    best_two = np.sort(logits[4:10], axis=-1)[:, -2:]
    np.testing.assert_allclose(greedy.margins, best_two[:, 1] - best_two[:, 0], rtol=1e-9)


def test_greedy_ends_with_the_stop_token(tiny_oracle: Step3Oracle) -> None:
    free = tiny_oracle.generate_greedy(TOKEN_IDS[:5], max_tokens=6)
    stop = free.token_ids[3]
    stopped = tiny_oracle.generate_greedy(TOKEN_IDS[:5], max_tokens=6, stop_token_ids={stop})

    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


@pytest.mark.parametrize("token_ids", [[], [-1], [0, 256]])
def test_ids_outside_the_vocabulary_are_refused(
    tiny_oracle: Step3Oracle, token_ids: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"0\.\.255"):
        tiny_oracle.logits(token_ids)


# --- Number formats and config ---


def test_e4m3_bytes_have_the_values_of_the_standard() -> None:
    known = {
        0x00: 0.0,
        0x01: 2.0**-9,
        0x07: 7 * 2.0**-9,
        0x08: 2.0**-6,
        0x38: 1.0,
        0x3C: 1.5,
        0x7E: 448.0,
        0xB8: -1.0,
        0xFE: -448.0,
    }
    assert {byte: E4M3_VALUES[byte] for byte in known} == known
    assert np.flatnonzero(np.isnan(E4M3_VALUES)).tolist() == [0x7F, 0xFF]
    assert np.all(np.diff(E4M3_VALUES[:0x7F]) > 0)


def test_bf16_is_the_upper_half_of_float32() -> None:
    bits = np.array([0x3F80, 0xC049, 0x0001], dtype=np.uint16)
    np.testing.assert_array_equal(decode_bf16(bits), [1.0, -3.140625, 2.0**-133])


def test_dequantise_gives_each_block_its_scale() -> None:
    scales = np.array([[[1.0, 10.0], [100.0, 1000.0]]])
    expected = [[[1, 1, 1, 10], [1, 1, 1, 10], [100, 100, 100, 1000]]]
    np.testing.assert_array_equal(dequantise(np.ones((1, 3, 4)), scales, (2, 3)), expected)
    with pytest.raises(ValueError, match="scale shape"):
        dequantise(np.ones((1, 3, 4)), scales, (1, 3))


def test_fp8_weights_are_dequantised_to_within_one_step(tiny_fp8_checkpoint: Checkpoint) -> None:
    oracle = Step3Oracle.load(tiny_fp8_checkpoint.directory)
    assert oracle.config.weight_block_size == (32, 32)
    exact = make_weights(tiny_fp8_checkpoint.spec)
    for name, weight in oracle.weights.items():
        # One step of e4m3 is at most 1/16 of the value, or 2^-10 of the block's largest.
        tolerance = np.abs(exact[name]) / 16 + np.max(np.abs(exact[name])) / 448 / 512
        assert np.all(np.abs(weight - exact[name]) <= tolerance), name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4,5", {4, 5}),
        (" 4, 5 ", {4, 5}),
        ("", set()),
        ([1, 3], {1, 3}),
        ((1, 3), {1, 3}),
        (None, {1, 2, 3, 4, 5}),
    ],
)
def test_moe_layers_are_read_from_every_spelling(value: Any, expected: set[int]) -> None:
    assert parse_moe_layers(value, num_layers=6) == expected
