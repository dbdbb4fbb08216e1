import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.ops.linear import linear, weight_dtype
from step3rt.ops.mfa_attention import append_kv, paged_mfa_attention
from step3rt.ops.moe import ExpertStack, grouped_experts, swiglu
from step3rt.ops.norm import rms_norm
from step3rt.ops.quantize import (
    dequantize_blocks,
    dequantize_groups,
    quantize_groups,
    to_e4m3,
)
from step3rt.ops.rotary import rotary_tables, rotate
from step3rt.ops.router import route
from tests.oracle import step3_numpy as oracle


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_rms_norm_equals_the_oracle() -> None:
    # Small inputs, where eps matters.
    x, weight = 1e-3 * random(5, 48), random(48, seed=1)
    expected = oracle.rms_norm(x.numpy(), weight.numpy(), 1e-5)
    assert np.allclose(rms_norm(x, weight, 1e-5).numpy(), expected, rtol=1e-13)


def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = random(3, 64, dtype=torch.bfloat16), random(64, seed=1, dtype=torch.bfloat16)
    unit = rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5), unit * weight)


def test_rotation_equals_the_oracle() -> None:
    x, positions = random(6, 3, 32), torch.tensor([0, 1, 2, 300, 4000, 65535])
    cos, sin = rotary_tables(positions, 32, 5e5)
    expected = oracle.rotate(x.numpy(), positions.numpy()[:, None], 5e5)
    assert np.abs(rotate(x, cos, sin).numpy() - expected).max() < 1e-14


def test_rotation_at_position_zero_changes_nothing() -> None:
    x = random(1, 2, 8)
    assert torch.equal(rotate(x, *rotary_tables(torch.tensor([0]), 8, 1e4)), x)


@pytest.mark.parametrize("is_normalised", [False, True])
def test_router_equals_the_oracle(is_normalised: bool) -> None:
    logits = random(20, 9)
    ids, weights = route(logits, 3, is_normalised=is_normalised)
    expected_ids, expected_weights = oracle.choose_experts(logits.numpy(), 3, is_normalised)
    assert ids.tolist() == expected_ids.tolist()
    assert np.allclose(weights.numpy(), expected_weights, rtol=1e-13)
    assert ids.dtype == torch.int32


def test_router_prefers_the_lower_of_equal_experts() -> None:
    ids, _ = route(torch.zeros(1, 5), 2, is_normalised=False)
    assert ids.tolist() == [[0, 1]]


def test_router_softmax_of_bf16_is_computed_in_float32() -> None:
    logits = random(4, 48, dtype=torch.bfloat16)
    _, weights = route(logits, 3, is_normalised=False)
    assert weights.dtype == torch.float32
    expected = torch.softmax(logits.float(), dim=-1).topk(3).values
    assert torch.equal(weights, expected)


def test_float32_products_do_not_depend_on_batch_mates() -> None:
    weight = random(200, 384).float().to(weight_dtype(torch.float32))
    x = random(67, 384, seed=1, dtype=torch.float32)
    together = linear(x, weight)
    alone = torch.cat([linear(row[None], weight) for row in x])
    assert torch.equal(together, alone)
    assert together.dtype == torch.float32


# --- quantize ---


@given(
    st.integers(1, 4),
    st.integers(1, 300),
    st.floats(-30, 30),
    st.integers(0, 2**31),
)
def test_group_quantisation_is_within_one_step_of_e4m3(
    num_tokens: int, width: int, exponent: float, seed: int
) -> None:
    x = random(num_tokens, width, seed=seed, dtype=torch.float32) * 2.0**exponent
    values, scales = quantize_groups(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (num_tokens, math.ceil(width / 128))
    back = dequantize_groups(values, scales, torch.float32)
    for first in range(0, width, 128):
        group = slice(first, first + 128)
        amax = x[:, group].abs().amax(dim=1, keepdim=True)
        # Half a step: 2^-4 of the value, or of the smallest normal value that the scale allows.
        bound = torch.maximum(x[:, group].abs() * 2**-4, amax / 448 * 2**-10)
        assert bool(((back[:, group] - x[:, group]).abs() <= bound * 1.0001).all())


def test_group_of_zeros_stays_zero() -> None:
    values, scales = quantize_groups(torch.zeros(2, 130))
    assert torch.equal(scales, torch.ones(2, 2))
    assert torch.equal(dequantize_groups(values, scales, torch.float32), torch.zeros(2, 130))


def test_group_that_is_not_finite_comes_back_as_nan_alone() -> None:
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = torch.nan, torch.inf
    back = dequantize_groups(*quantize_groups(x), torch.float32)
    assert torch.isnan(back[0, :128]).any()
    assert torch.isnan(back[1, 128:]).any()
    assert torch.equal(back[0, 128:], torch.ones(128))
    assert torch.equal(back[1, :128], torch.ones(128))


def test_cast_to_e4m3_saturates() -> None:
    cast = to_e4m3(torch.tensor([1e9, -1e9, 448.0, 0.3])).float()
    assert cast.tolist() == [448.0, -448.0, 448.0, 0.3125]
    assert torch.isnan(to_e4m3(torch.tensor([torch.nan])).float()).all()


def test_blocks_of_any_size_get_their_own_scale() -> None:
    values = torch.ones(5, 7).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    weight = dequantize_blocks(values, scales, (3, 3), torch.float32)
    assert weight[0].tolist() == [1, 1, 1, 2, 2, 2, 3]
    assert weight[:, 0].tolist() == [1, 1, 1, 4, 4]
    assert weight[4, 6] == 6


# --- experts ---


def test_grouped_experts_equal_the_oracle_token_by_token() -> None:
    hidden, gate, up = random(11, 24), random(6, 40, 24, seed=1), random(6, 40, 24, seed=2)
    down = random(6, 24, 40, seed=3)
    ids = torch.randint(-1, 6, (11, 3), generator=torch.Generator().manual_seed(4)).int()
    weights = random(11, 3, seed=5)
    stack = ExpertStack(0, torch.cat((gate, up), dim=1), down)
    result = grouped_experts(hidden, ids, weights, (stack,))
    for token in range(11):
        expected = np.zeros(24)
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert >= 0:
                expected += (
                    weight
                    * oracle.swiglu(
                        hidden[token : token + 1].numpy(),
                        gate=gate[expert].numpy(),
                        up=up[expert].numpy(),
                        down=down[expert].numpy(),
                    )[0]
                )
        assert np.allclose(result[token].numpy(), expected, atol=1e-11)


def test_experts_that_no_stack_holds_add_nothing() -> None:
    stack = ExpertStack(2, random(2, 8, 6), random(2, 6, 4, seed=1))
    ids = torch.tensor([[-1, 0, 1, 4]], dtype=torch.int32)
    result = grouped_experts(random(1, 6), ids, torch.ones(1, 4), (stack,))
    assert torch.equal(result, torch.zeros(1, 6, dtype=result.dtype))


def test_several_stacks_of_different_width_are_summed() -> None:
    routed = ExpertStack(0, random(2, 8, 6), random(2, 6, 4, seed=1))
    shared = ExpertStack(2, random(1, 20, 6, seed=2), random(1, 6, 10, seed=3))
    hidden = random(3, 6, seed=4)
    ids = torch.tensor([[1, 2]] * 3, dtype=torch.int32)
    weights = torch.tensor([[0.25, 1.0]] * 3, dtype=torch.float64)
    expected = 0.25 * swiglu(hidden, routed.gate_up[1], routed.down[1])
    expected = expected + swiglu(hidden, shared.gate_up[0], shared.down[0])
    result = grouped_experts(hidden, ids, weights, (routed, shared))
    assert torch.allclose(result, expected, atol=1e-13)


def test_a_token_that_is_nan_spoils_no_other() -> None:
    stack = ExpertStack(0, random(2, 8, 6), random(2, 6, 4, seed=1))
    hidden = random(3, 6, seed=2)
    ids = torch.tensor([[0, 1]] * 3, dtype=torch.int32)
    good = grouped_experts(hidden, ids, torch.ones(3, 2), (stack,))
    hidden[1] = torch.nan
    result = grouped_experts(hidden, ids, torch.ones(3, 2), (stack,))
    assert torch.isnan(result[1]).all()
    assert torch.equal(result[[0, 2]], good[[0, 2]])


# --- attention ---


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [Q, N, D] are the last Q of the tokens k, v [L, D]."""
    num_queries, length = q.shape[0], k.shape[0]
    output = torch.empty_like(q)
    for i in range(num_queries):
        visible = length - num_queries + i + 1
        for head in range(q.shape[1]):
            scores = (k[:visible] @ q[i, head]) / math.sqrt(q.shape[2])
            output[i, head] = torch.softmax(scores, dim=0) @ v[:visible]
    return output


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    num_queries=st.integers(1, 6),
    block_size=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_paged_attention_equals_attention_without_pages(
    lengths: list[int], num_queries: int, block_size: int, seed: int
) -> None:
    lengths = [max(length, num_queries) for length in lengths]
    num_blocks = sum(-(-length // block_size) for length in lengths) + 2
    kv = torch.full((num_blocks, 2, block_size, 16), torch.nan, dtype=torch.float64)
    order = np.random.default_rng(seed).permutation(num_blocks).tolist()
    width = max(-(-length // block_size) for length in lengths)
    table, expected, queries = [], [], []
    for index, length in enumerate(lengths):
        k, v = random(length, 16, seed=seed + index), random(length, 16, seed=seed + index + 50)
        q = random(num_queries, 3, 16, seed=seed + index + 100)
        blocks = [order.pop() for _ in range(-(-length // block_size))]
        slots = [blocks[i // block_size] * block_size + i % block_size for i in range(length)]
        append_kv(kv, k, v, torch.tensor(slots))
        table.append(blocks + [order[0]] * (width - len(blocks)))
        queries.append(q)
        expected.append(naive_attention(q, k, v))
    result = paged_mfa_attention(
        torch.stack(queries), kv, torch.tensor(table), torch.tensor(lengths)
    )
    assert torch.allclose(result, torch.stack(expected), atol=1e-12)


def test_attention_over_a_long_context_is_tiled_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv, q = random(4, 2, 8, 16), random(2, 9, 3, 16, seed=1)
    arguments = (q, kv, torch.tensor([[0, 1], [3, 2]]), torch.tensor([16, 12]))
    whole = paged_mfa_attention(*arguments)
    monkeypatch.setattr("step3rt.ops.mfa_attention.MAX_SCORES", 200)
    assert torch.allclose(paged_mfa_attention(*arguments), whole, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_kv_is_kept_in_the_dtype_of_the_cache(dtype: torch.dtype) -> None:
    kv = torch.zeros(2, 2, 4, 8, dtype=dtype)
    k, v = random(1, 8, dtype=torch.float32) * 1000, random(1, 8, seed=1, dtype=torch.float32)
    append_kv(kv, k, v, torch.tensor([5]))
    rounded = k.clamp(-448, 448) if dtype == torch.float8_e4m3fn else k
    assert torch.equal(kv[1, 0, 1].float(), rounded[0].to(dtype).float())
    assert torch.equal(kv[1, 1, 1].float(), v[0].to(dtype).float())
    assert int((kv.float() != 0).sum()) == int((k.to(dtype).float() != 0).sum()) + 8
    attended = paged_mfa_attention(
        random(1, 1, 2, 8, seed=2, dtype=torch.float32),
        kv,
        torch.tensor([[1]]),
        torch.tensor([2]),
    )
    assert torch.isfinite(attended).all()
