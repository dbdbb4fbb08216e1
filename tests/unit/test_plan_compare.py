"""Result files are read, compared, and fitted; the fit recovers what made them.

The result files here are synthetic: the simulator makes them with known efficiencies, and they
exist only while a test runs. They say that the fit works, not that any hardware is like this.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step3rt.errors import ConfigError, InvalidArgument
from step3rt.plan.compare import compare, fit, median_error, predict
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.measurement import Measurement, load_measurement
from step3rt.plan.profile import load_profile
from step3rt.plan.simulate import simulate
from step3rt.plan.workload import Workload

CARDS = load_hardware()
STEP3 = load_model("step3")
STATED = load_profile("peers-h200")
# A machine that is unlike its profile in everything that the runs below depend on.
TRUTH = replace(
    STATED,
    attention_bytes_fp8=0.48,
    linear_bytes=0.70,
    attention_fixed_us=45.0,
    moe_bytes=0.60,
    moe_flops=0.36,
    ffn_fixed_us=33.0,
    nvlink_latency_us=14.0,
    step_fixed_us=400.0,
)
# run, batch, context: the placements and contexts of the decode benchmark on four H200
RUNS = (
    ("2a2f-slice", 512, 4096),
    ("2a2f-slice", 1024, 4096),
    ("2a2f-slice", 512, 8192),
    ("2a2f-slice", 64, 32768),
    ("full-colocated-4", 512, 4096),
    ("full-colocated-4", 900, 4096),
    ("full-colocated-4", 400, 8192),
    ("full-colocated-4", 96, 32768),
    ("full-1a3f", 128, 4096),
    ("full-1a3f", 256, 4096),
    ("full-1a3f", 96, 8192),
    ("full-1a3f", 32, 32768),
)


def result_file(path: Path, run: str, **changes: Any) -> Path:
    """A result file of a decode run, without readings unless given."""
    values = {
        "run": run,
        "machine": "4x NVIDIA H200 141GB HBM3e",
        "date": "2026-01-01",
        "commit": "0" * 40,
        "command": "synthetic",
        "gpus": 4,
        "context": 4096,
        "batch": 512,
        "lanes": 2,
        "layers": 61,
        "kv_dtype": "fp8",
        "weight_dtype": "fp8",
        "natural_routing": True,
        "scheduler_in_loop": True,
        "steps": 200,
        "tokens_per_s_per_gpu": 1000.0,
        "tpot_ms": {"p50": 30.0, "p99": 31.0, "max": 33.0},
        "stages": {},
    }
    path.write_text(json.dumps(values | changes))
    return path


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    directory = tmp_path_factory.mktemp("results")
    measurements = []
    for index, (run, batch, context) in enumerate(RUNS):
        path = result_file(directory / f"{index}.json", run, batch=batch, context=context)
        asked = load_measurement(path, CARDS)
        model = STEP3 if asked.num_experts is None else STEP3.with_num_experts(asked.num_experts)
        workload = Workload(batch=batch, context_tokens=context, lengths="spread")
        result = simulate(
            model, asked.deployment, TRUTH, workload, asked.precision, steps=16, seed=index
        )
        result_file(
            path,
            run,
            batch=batch,
            context=context,
            tokens_per_s_per_gpu=result.tokens_per_s_per_gpu,
            tpot_ms=result.tpot_ms,
            stages={name: {"us": us} for name, us in result.stage_us.items()},
        )
        measurements.append(load_measurement(path, CARDS))
    return measurements


def test_runs_name_their_placement(tmp_path: Path) -> None:
    sliced = load_measurement(result_file(tmp_path / "a.json", "2a2f-slice"), CARDS)
    assert sliced.deployment.label == "2A+2F h200 ep x2"
    assert sliced.num_experts == 6
    full = load_measurement(result_file(tmp_path / "b.json", "full-1a3f"), CARDS)
    assert (full.deployment.label, full.num_experts) == ("1A+3F h200 ep x2", None)
    colocated = load_measurement(result_file(tmp_path / "c.json", "full-colocated-4"), CARDS)
    assert colocated.deployment.is_colocated
    hosts = load_measurement(
        result_file(tmp_path / "d.json", "paper 2A2F", gpus=32), CARDS, CARDS["h800"]
    )
    assert hosts.deployment.label == "16A+16F h800 tp_ep x2"


def test_the_model_fits_half_of_the_runs_and_predicts_the_others(
    synthetic: list[Measurement],
) -> None:
    seen, unseen = synthetic[::2], synthetic[1::2]
    before = median_error(compare(STEP3, unseen, STATED))
    fitted = fit(STEP3, seen, STATED)
    after = median_error(compare(STEP3, unseen, fitted))
    assert before > 0.15
    assert after < 0.05
    assert all(abs(row.error) < 0.10 for row in compare(STEP3, unseen, fitted))


def test_the_fit_recovers_the_efficiencies(synthetic: list[Measurement]) -> None:
    fitted = fit(STEP3, synthetic, STATED)
    for name in ("attention_bytes_fp8", "moe_bytes", "moe_flops"):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUTH, name), rel=0.10), name


def test_the_fit_leaves_alone_what_no_run_depends_on(synthetic: list[Measurement]) -> None:
    fitted = fit(STEP3, synthetic, STATED)
    assert fitted.nic_share == pytest.approx(STATED.nic_share)
    assert fitted.attention_bytes_bf16 == pytest.approx(STATED.attention_bytes_bf16)
    assert "fitted to 2a2f-slice" in fitted.source


def test_a_faster_head_says_nothing_of_projections(tmp_path: Path) -> None:
    truth = replace(STATED, head_bytes=0.95, head_flops=0.95)
    runs = []
    for batch in (256, 512, 1024):
        path = result_file(tmp_path / f"{batch}.json", "2a2f-slice", batch=batch)
        expected = predict(STEP3, load_measurement(path, CARDS), truth)
        whole = {name: expected.pop(name) for name in ("tokens_per_s_per_gpu", "tpot_ms")}
        result_file(
            path,
            "2a2f-slice",
            batch=batch,
            tokens_per_s_per_gpu=whole["tokens_per_s_per_gpu"],
            tpot_ms={name: whole["tpot_ms"] for name in ("p50", "p99", "max")},
            stages={name: {"us": us} for name, us in expected.items()},
        )
        runs.append(load_measurement(path, CARDS))
    fitted = fit(STEP3, runs, STATED)
    assert median_error(compare(STEP3, runs, fitted)) < 0.01
    for name in ("linear_bytes", "linear_flops", "attention_bytes_fp8"):
        assert getattr(fitted, name) == pytest.approx(getattr(STATED, name), rel=0.03), name


def test_a_perfect_profile_needs_no_fit(synthetic: list[Measurement]) -> None:
    assert median_error(compare(STEP3, synthetic, TRUTH)) < 0.03
    refitted = fit(STEP3, synthetic, TRUTH)
    assert refitted.moe_bytes == pytest.approx(TRUTH.moe_bytes, rel=0.05)


def test_transfer_may_be_one_reading(tmp_path: Path) -> None:
    path = result_file(tmp_path / "a.json", "2a2f-slice", stages={"transfer": 40.0, "wait": 3.0})
    rows = compare(STEP3, [load_measurement(path, CARDS)], STATED)
    assert [row.quantity for row in rows] == ["tokens_per_s_per_gpu", "tpot_ms", "transfer"]
    assert 20 < rows[2].predicted < 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "3x"}, "names neither a colocated run nor one like 2a2f"),
        ({"gpus": 5}, "gpus = 5, which is neither 4 nor 32"),
        ({"machine": "my laptop"}, "names no card"),
        ({"batch": 0}, "batch = 0, which has no number above 0"),
        ({"batch": float("nan")}, "no number above 0"),
        ({"tpot_ms": 30}, "no number above 0 as p50"),
        ({"kv_dtype": "int3"}, "is not one of fp8"),
        ({"batch": 10**400}, "no number above 0"),
        ({"batch": 0.5}, "batch = 0.5, which is not from 1 to"),
        ({"experts": "all"}, "experts = 'all', which has no number above 0"),
        ({"experts": -3}, "experts = -3, which has no number above 0"),
        ({"layers": [61]}, "which has no number above 0"),
        ({"lanes": 9}, r"a.json' cannot be used. The deployment has 9 lanes"),
    ],
)
def test_impossible_result_files_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = changes.pop("run", "2a2f-slice")
    path = result_file(tmp_path / "a.json", run, **changes)
    with pytest.raises(ConfigError, match=message):
        load_measurement(path, CARDS)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_files_that_are_no_results_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_measurement(path, CARDS)


def test_a_run_of_another_depth_is_refused(tmp_path: Path) -> None:
    path = result_file(tmp_path / "a.json", "2a2f-slice", layers=4)
    with pytest.raises(InvalidArgument, match="had 4 layers, the model 'step3' has 61"):
        compare(STEP3, [load_measurement(path, CARDS)], STATED)


def test_a_run_of_fewer_experts_than_a_token_takes_is_named(tmp_path: Path) -> None:
    path = result_file(tmp_path / "a.json", "2a2f-slice", experts=2)
    with pytest.raises(InvalidArgument, match=r"'2a2f-slice \(a.json\)' .* has 2 routed experts"):
        compare(STEP3, [load_measurement(path, CARDS)], STATED)


def test_more_last_steps_than_steps_do_not_make_a_context_negative(tmp_path: Path) -> None:
    over = {"steps": 10, "stages_over": {"steps": 10**6}}
    path = result_file(tmp_path / "a.json", "2a2f-slice", **over)
    measured = load_measurement(path, CARDS)
    assert measured.stage_context_tokens >= measured.context_tokens


def test_fitting_to_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no measurement to fit to"):
        fit(STEP3, [], STATED)
