"""What the planner says of this project's kernels and runs on H200, whatever files there are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from step3rt.bench.decode_work import Shape, transfer_work
from step3rt.cli import main
from step3rt.plan.compare import predict_run
from step3rt.plan.cost import Precision
from step3rt.plan.cross_validation import cross_validate
from step3rt.plan.deployment import Deployment
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.kernel_profile import profile_from_kernels
from step3rt.plan.measurement import Measurement, load_measurement, result_files
from step3rt.plan.profile import load_profile
from step3rt.plan.simulate import simulate
from step3rt.plan.stages import stage_times, step_us
from step3rt.plan.workload import Workload
from tests.unit.test_bench_decode_work import step3
from tests.unit.test_plan_compare import result_file

CARDS = load_hardware()
STEP3 = load_model("step3")
OURS = load_profile("step3rt-h200")
QUIET = replace(OURS, jitter_us=0.0, expert_skew=0.0)
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def apart(attention: int, ffn: int, lanes: int = 2) -> Deployment:
    return Deployment(
        placement="disaggregated",
        attention_card=CARDS["h200"],
        ffn_card=CARDS["h200"],
        num_attention_gpus=attention,
        num_ffn_gpus=ffn,
        lanes=lanes,
    )


def colocated(gpus: int, lanes: int) -> Deployment:
    return replace(apart(gpus, 1, lanes), placement="colocated", num_ffn_gpus=0)


def measured() -> list[Measurement]:
    return [load_measurement(path, CARDS) for path in result_files([RESULTS])]


def test_runs_that_a_fit_has_not_seen_are_predicted_within_ten_percent() -> None:
    found = cross_validate(STEP3, measured(), OURS)
    assert found.rows
    for quantity in ("tokens_per_s_per_gpu", "tpot_ms"):
        error = found.median(quantity)
        assert error is not None
        assert error <= 0.10, quantity


def test_halves_are_the_same_every_time_and_each_counts_once() -> None:
    runs = measured()
    assert cross_validate(STEP3, runs, OURS, 3) == cross_validate(STEP3, runs[::-1], OURS, 3)
    two = cross_validate(STEP3, runs[:2], OURS)
    assert 1 <= len(two.rows) <= 2
    assert cross_validate(STEP3, runs[:1], OURS).median() is None


def test_the_shipped_profile_is_what_the_kernels_give() -> None:
    file = RESULTS / "kernels-h200-2026-11-22.json"
    found = profile_from_kernels(file, CARDS["h200"], OURS)
    for name in (
        "attention_bytes_bf16",
        "attention_bytes_fp8",
        "linear_bytes",
        "linear_flops",
        "attention_fixed_us",
        "moe_bytes",
        "moe_flops",
    ):
        assert getattr(found, name) == pytest.approx(getattr(OURS, name), rel=0.02), name


@pytest.mark.parametrize(("attention", "ffn", "experts"), [(1, 1, 3), (2, 2, 6), (1, 3, 48)])
def test_rows_go_to_as_many_ranks_as_the_benchmark_counts(
    attention: int, ffn: int, experts: int
) -> None:
    model = STEP3.with_num_experts(experts)
    deployment = apart(attention, ffn)
    no_fixed = replace(QUIET, a2f_fixed_us=0.0, f2a_fixed_us=0.0, nvlink_share=1.0)
    times = stage_times(model, deployment, no_fixed, np.array([256.0]), 4096, Precision())
    shape = Shape(
        config=step3(experts),
        num_attention=attention,
        num_ffn=ffn,
        num_lanes=2,
        batch=512 * attention,
        context_tokens=4096,
        kv_dtype="fp8",
    )
    there, back = transfer_work(shape, CARDS["h200"])
    moe = int(times.counts.argmax())
    # The benchmark's mean is over dense layers, too.
    assert there.peak_us is not None
    assert back.peak_us is not None
    assert times.a2f_stores[moe, 0] == pytest.approx(there.peak_us, rel=0.12)
    assert times.f2a_stores[moe, 0] == pytest.approx(back.peak_us, rel=0.12)


@pytest.mark.parametrize("deployment", [apart(1, 1), colocated(4, 2)], ids=lambda each: each.label)
def test_stores_take_the_time_of_the_gpu_that_sends(deployment: Deployment) -> None:
    model = STEP3.with_num_experts(3)
    step = []
    for fixed_us in (0.0, 100.0):
        profile = replace(QUIET, a2f_fixed_us=fixed_us)
        times = stage_times(model, deployment, profile, np.array([192.0]), 8192, Precision())
        step.append(float(step_us(times, deployment)[0]))
    num_sent = times.counts @ (times.a2f[:, 0] > 0)
    assert num_sent > 50
    assert step[1] - step[0] == pytest.approx(num_sent * 2 * 100.0, rel=0.01)


@pytest.mark.parametrize(("attention", "ffn"), [(1, 3), (3, 1), (2, 2)])
def test_a_gpu_that_stores_spends_time_on_its_own_bytes_alone(attention: int, ffn: int) -> None:
    profile = replace(QUIET, a2f_fixed_us=0.0, f2a_fixed_us=0.0)
    deployment = apart(attention, ffn)
    times = stage_times(STEP3, deployment, profile, np.array([192.0]), 4096, Precision())
    # Three that send to one: the transfer takes as long as the one receives, a sender a third.
    assert times.a2f_stores == pytest.approx(times.a2f * min(1.0, ffn / attention))
    assert times.f2a_stores == pytest.approx(times.f2a * min(1.0, attention / ffn))
    predicted = predict_run(STEP3, deployment, profile, 384 * attention, Precision(), 4096)
    weights = times.counts / times.counts.sum()
    assert predicted["f2a"] == pytest.approx(float(weights @ times.f2a_stores[:, 0]))
    wire_us = float(weights @ (times.a2f + times.f2a)[:, 0])
    assert predicted["transfer"] == pytest.approx(wire_us + 2 * profile.nvlink_latency_us)


def test_lanes_of_few_rows_leave_a_gap() -> None:
    model, deployment = STEP3.with_num_experts(3), apart(1, 1)
    what = (96, Precision(), 32768)
    turns = predict_run(model, deployment, replace(OURS, sharing_rows=0.0), *what)
    shared = predict_run(model, deployment, OURS, *what)
    assert turns["tpot_ms"] < 36
    assert shared["tpot_ms"] == pytest.approx(40.0, rel=0.05)
    assert shared["busy_share"] < turns["busy_share"]
    three = predict_run(model, replace(deployment, lanes=3), OURS, 144, *what[1:])
    assert three["tpot_ms"] == pytest.approx(1.5 * turns["tpot_ms"], rel=0.02)


@pytest.mark.parametrize(
    ("deployment", "experts", "batch", "context"),
    [
        (apart(2, 2), 6, 768, 8192),
        (apart(2, 2), 6, 192, 32768),
        (apart(1, 3), 48, 512, 4096),
        (colocated(4, 1), 48, 1024, 4096),
        (colocated(4, 2), 48, 1024, 4096),
    ],
)
def test_the_simulator_agrees_with_the_means_that_are_compared(
    deployment: Deployment, experts: int, batch: int, context: int
) -> None:
    model = STEP3.with_num_experts(experts)
    predicted = predict_run(model, deployment, OURS, batch, Precision(), context)
    workload = Workload(batch=batch, context_tokens=context)
    result = simulate(model, deployment, OURS, workload, Precision(), steps=40)
    assert result.tpot_ms["mean"] == pytest.approx(predicted["tpot_ms"], rel=0.03)
    for stage in ("a2f", "f2a"):
        assert result.stage_us[stage] == pytest.approx(predicted[stage], rel=0.01)


def test_colocated_lanes_add_up_and_read_all_weights_each() -> None:
    one, two = (
        predict_run(STEP3, colocated(4, lanes), OURS, 1024, Precision(), 4096) for lanes in (1, 2)
    )
    # 13 groups of 110 MB at 4.8 TB/s: half the rows do not halve that.
    assert two["ffn"] > 0.85 * one["ffn"]
    assert two["tpot_ms"] > 1.3 * one["tpot_ms"]
    assert two["busy_share"] == pytest.approx(1.0, abs=0.02)
    assert one["busy_share"] < 0.99


def test_what_a_run_says_of_itself_is_taken(tmp_path: Path) -> None:
    path = result_file(
        tmp_path / "a.json",
        "2a2f-slice",
        experts=6,
        steps=1000,
        stages={"wait": {"us": 1.0, "share": 0.25}},
        stages_over={"seconds": 5.0, "steps": 128.0},
        expert_load={"popularity_max_over_mean": 1.5},
    )
    run = load_measurement(path, CARDS)
    assert run.stage_context_tokens == 4096 + (1000 - 128) / 2 + 48
    assert run.busy_share == 0.75
    assert run.expert_skew == pytest.approx(0.5 / 1.28, rel=0.02)
    bare = load_measurement(result_file(tmp_path / "b.json", "2a2f-slice"), CARDS)
    assert (bare.stage_context_tokens, bare.busy_share, bare.expert_skew) == (4096, None, None)


def test_one_deployment_is_predicted_by_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    unit = ["predict", "--colocated-gpus=4", "--hardware=h200", "--lanes=1", "--context=4096"]
    assert main(["plan", *unit, "--profile=step3rt-h200", "--batch=1024"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 colocated h200 x1, 1024 sequences\n")
    assert "per GPU, TPOT" in text
    assert main(["plan", *unit, "--profile=step3rt-h200", "--batch=9999"]) == 0
    assert "sequences fit in memory" in capsys.readouterr().out
    assert main(["plan", *unit, "--batch=3"]) != 0
    assert "Each of 4 lanes" in capsys.readouterr().err
