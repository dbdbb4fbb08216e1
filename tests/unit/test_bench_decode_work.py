"""What a step has to move and compute, by hand for Step-3, and what the experts' load is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from step3rt.bench.decode_stages import _expert_load, _full_looks, _roofline
from step3rt.bench.decode_work import (
    Shape,
    attention_work,
    ffn_work,
    head_work,
    model_of,
    sizes_of,
    transfer_work,
)
from step3rt.model.config import LayerConfig, Step3Config
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.trace import recording

H200 = load_hardware()["h200"]
EXPERT = 3 * 7168 * 5120
DENSE = 3 * 7168 * 18432


def step3(num_experts: int) -> Step3Config:
    return Step3Config(
        vocab_size=128815, hidden_size=7168, num_heads=64, head_dim=256, query_rank=2048,
        intermediate_size=18432, num_experts=num_experts, top_k=3, moe_intermediate_size=5120,
        share_expert_dim=5120, norm_expert_weight=False, rope_theta=5e5, rms_norm_eps=1e-5,
        max_model_len=65536, bos_token_id=0, eos_token_ids=(1,), weight_block_size=(128, 128),
        layers=tuple(LayerConfig(4 <= index < 60) for index in range(61)),
    )  # fmt: skip


def shape(num_experts: int = 3, **changes: Any) -> Shape:
    values = {
        "config": step3(num_experts), "num_attention": 1, "num_ffn": 1, "num_lanes": 2,
        "batch": 512, "context_tokens": 4096, "kv_dtype": "fp8",
    }  # fmt: skip
    return Shape(**(values | changes))


def test_the_planner_counts_the_same_model() -> None:
    ours, shipped = model_of(step3(48)), load_model("step3")
    assert ours.groups == shipped.groups
    assert ours.embedding_params == shipped.embedding_params
    assert sizes_of(step3(48))["moe_layers_enum"].startswith("4,5,6")


def test_attention_reads_keys_values_and_weights() -> None:
    work = attention_work(shape(), H200)
    kv = 256 * 4096 * 512
    params = 7168 * 2048 + 2048 * 16384 + 2 * 7168 * 256 + 16384 * 7168
    router = 56 / 61 * 7168 * 3
    assert work.num_bytes == pytest.approx(kv + params + router)
    assert work.flops == pytest.approx(256 * 4096 * 65536 + 2 * 256 * (params + router))
    assert work.peak_us == pytest.approx((kv + params + router) / 4.8e6, rel=1e-6)
    assert work.limit == "bytes"
    wide = attention_work(shape(kv_dtype="bfloat16"), H200)
    assert wide.num_bytes == pytest.approx(2 * kv + params + router)
    assert attention_work(shape(), None).peak_us is None


def test_the_head_reads_its_table_once_a_step() -> None:
    work = head_work(shape(), H200)
    assert work.num_bytes == 2 * 128815 * 7168
    assert work.peak_us == pytest.approx(2 * 256 * 128815 * 7168 / 9.89e8)
    assert work.limit == "flops"
    few = head_work(shape(batch=64), H200)
    assert few.peak_us == pytest.approx(2 * 128815 * 7168 / 4.8e6)
    assert few.limit == "bytes"


def test_no_share_of_the_roofline_is_above_1() -> None:
    work = head_work(shape(batch=96), H200)
    assert work.peak_us is not None
    found = _roofline(work, 2 * work.peak_us)
    assert found["roofline_share"] == 0.5
    # As measured at 32K: of what another lane's attention shares with the head, half is its own.
    found = _roofline(work, 262.88)
    assert found["roofline_us"] == 384.73
    assert "roofline_share" not in found
    assert found["roofline_share_missing"].startswith("262.88 us are less than it takes")


def looks(groups: dict[int, list[int]], num_looks: int = 2) -> np.ndarray:
    """i32[looks, layers, groups]: dense and MoE layers of step3."""
    rows = np.zeros((num_looks, 61, 4), dtype=np.int32)
    for layer in range(61):
        found = groups[int(4 <= layer < 60)]
        rows[:, layer, : len(found)] = found
    return rows


def test_experts_read_the_weights_of_groups_that_got_rows() -> None:
    work = ffn_work(shape(), [looks({0: [256], 1: [700, 68, 0, 256]})], H200)
    assert work is not None
    moe_bytes, dense_bytes = 3 * EXPERT, DENSE
    assert work.num_bytes == pytest.approx((56 * moe_bytes + 5 * dense_bytes) / 61)
    moe_flops, dense_flops = 2 * (700 + 68 + 256) * EXPERT, 2 * 256 * DENSE
    assert work.flops == pytest.approx((56 * moe_flops + 5 * dense_flops) / 61)
    each_us = [
        max(num_bytes / 4.8e6, flops / 1.98e9)
        for num_bytes, flops in ((moe_bytes, moe_flops), (dense_bytes, dense_flops))
    ]
    assert work.peak_us == pytest.approx((56 * each_us[0] + 5 * each_us[1]) / 61)
    assert ffn_work(shape(), [np.zeros((0, 61, 4), dtype=np.int32)], H200) is None


def test_a_row_goes_to_its_home_and_to_the_owners_of_its_experts() -> None:
    there, back = transfer_work(shape(), H200)
    assert there.num_bytes == 256 * (7168 * (1 + 4 / 128) + 4 * 8)
    assert back.num_bytes == 256 * 7168 * 2
    assert back.peak_us == pytest.approx(256 * 7168 * 2 / 4.5e5)
    # Of 6 experts on two ranks a row's three are all on one with a chance of 1/20 each.
    two, _ = transfer_work(shape(6, num_attention=2, num_ffn=2), H200)
    copies = 1 + 56 / 61 * (1 - 1 / 20)
    assert two.num_bytes == pytest.approx(128 * (copies * 7168 * (1 + 4 / 128) + 2 * 4 * 8))
    # What one attention GPU gets, three FFN GPUs have sent.
    there, back = transfer_work(shape(3, num_ffn=3), H200)
    assert back.num_bytes == pytest.approx(256 * (1 + 2 * 56 / 61) * 7168 * 2 / 3)


def test_load_is_that_of_the_looks_at_full_lanes() -> None:
    full = looks({0: [16], 1: [30, 12, 6, 16]}, num_looks=5)
    ramp = looks({0: [9], 1: [20, 5, 2, 9]}, num_looks=3)
    idle = np.zeros_like(ramp)
    rows = np.concatenate([idle, ramp, full])[:, None]
    meta = recording.Shape("ffn", 0, 61, 1, 1)
    found = _full_looks(recording.Recording(meta, [], rows), shape())
    assert len(found) == 5
    load = _expert_load([found[:, 0]], shape())
    assert load == {
        "looks": 5,
        "rows_per_expert": {"mean": 16.0, "max": 30, "min": 6},
        "max_over_mean": 1.875,
        "popularity_max_over_mean": 1.875,
        "rank_max_over_mean": 1.0,
    }


def test_load_of_two_ranks_is_over_all_experts() -> None:
    first = looks({0: [8], 1: [20, 10, 6, 8]})
    second = looks({0: [8], 1: [4, 4, 4, 8]})
    load = _expert_load([first, second], replace(shape(6), num_ffn=2))
    assert load is not None
    assert load["rows_per_expert"]["mean"] == 8.0
    assert load["max_over_mean"] == 2.5
    assert load["rank_max_over_mean"] == pytest.approx(44 / 32)
