"""Experts are whole: where they do not divide, the GPU with the most sets pace and memory."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step3rt.errors import InvalidArgument
from step3rt.model.placement import expert_range
from step3rt.plan.cost import Precision
from step3rt.plan.deployment import Deployment, ffn_weight_bytes_per_gpu, most_experts
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.profile import load_profile
from step3rt.plan.simulate import simulate
from step3rt.plan.stages import stage_times
from step3rt.plan.workload import Workload

H800 = load_hardware()["h800"]
STEP3 = load_model("step3")
QUIET = replace(load_profile("paper-h800"), jitter_us=0.0, expert_skew=0.0)
EXPERT_BYTES = 3 * 7168 * 5120
NUM_MOE_LAYERS = 56


def apart(ffn: int) -> Deployment:
    return Deployment(
        placement="disaggregated",
        attention_card=H800,
        ffn_card=H800,
        num_attention_gpus=32,
        num_ffn_gpus=ffn,
        lanes=3,
    )


def colocated(gpus: int) -> Deployment:
    return replace(apart(1), placement="colocated", num_attention_gpus=gpus, num_ffn_gpus=0)


@given(num_experts=st.integers(1, 300), places=st.integers(1, 400))
def test_the_fullest_place_is_that_of_the_instances(num_experts: int, places: int) -> None:
    held = [len(expert_range(num_experts, rank, places)) for rank in range(places)]
    assert most_experts(num_experts, places) == max(held)


@pytest.mark.parametrize(("gpus", "experts"), [(5, 10), (16, 3), (20, 3), (32, 2), (64, 1)])
def test_a_gpu_has_room_for_whole_experts_and_dense_layers(gpus: int, experts: int) -> None:
    beside = sum(
        group.count * group.ffn.dense_params  # of an MoE layer, the shared expert
        for group in STEP3.groups
    )
    expected = NUM_MOE_LAYERS * experts * EXPERT_BYTES + beside
    for deployment in (apart(gpus), colocated(gpus)):
        assert ffn_weight_bytes_per_gpu(STEP3, deployment) == expected


@pytest.mark.parametrize(("more", "enough"), [(32, 24), (64, 48), (20, 16)])
def test_gpus_that_do_not_lower_the_most_experts_do_not_help(more: int, enough: int) -> None:
    """48 experts in 32 places are 2 in half of them, as in all of 24."""
    moe = [group.ffn.num_experts > 0 for group in STEP3.groups].index(True)
    size = np.array([32.0, 128.0])
    times = [
        stage_times(STEP3, apart(gpus), QUIET, size, 4096, Precision()).ffn[moe]
        for gpus in (more, enough)
    ]
    # All that is spread evenly is the shared expert's rows.
    assert times[0] == pytest.approx(times[1], rel=0.05)
    workload = Workload(batch=32 * 3 * 128, context_tokens=512)
    ffn_bound = replace(QUIET, moe_bytes=0.1, moe_flops=0.1)
    means = [
        simulate(STEP3, apart(gpus), ffn_bound, workload, Precision(), steps=8).tpot_ms["mean"]
        for gpus in (more, enough)
    ]
    assert means[0] == pytest.approx(means[1], rel=0.05)


@pytest.mark.parametrize("num_experts", [-1, 0, 2, 10**30])
def test_a_slice_has_as_many_experts_as_a_token_takes(num_experts: int) -> None:
    with pytest.raises(InvalidArgument, match="takes 3 different ones"):
        STEP3.with_num_experts(num_experts)
