"""What `step3rt bench decode` makes of a coordinator's log, and of a real cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from step3rt.bench.decode_figures import read_steps, summarise
from step3rt.bench.decode_load import DecodeLoad
from step3rt.bench.decode_path import LaneStep
from step3rt.bench.decode_stages import stage_report
from step3rt.bench.decode_work import Shape
from step3rt.config import resolve_model
from step3rt.errors import Unavailable
from step3rt.model.config import Step3Config
from step3rt.plan.compare import compare
from step3rt.plan.decode_table import load_points
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.plan.measurement import load_measurement
from step3rt.plan.profile import load_profile
from step3rt.trace.recording import load_all
from tests.e2e.clusters import processes_with, wait_until

# As in the end-to-end tests: clusters start here, which takes long on a busy machine.
START_TIMEOUT_S = 400
pytestmark = pytest.mark.timeout(START_TIMEOUT_S)


def step(instance: int, lane: int, at_ms: float, num_tokens: int) -> LaneStep:
    return LaneStep(instance, lane, int(at_ms * 1e6), num_tokens, 600_000, 400_000, 1_100_000)


def run_bench(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "step3rt", "bench", "decode", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=START_TIMEOUT_S - 20, check=False
    )


def test_only_steps_with_every_sequence_count() -> None:
    load = DecodeLoad(batch=6, context_tokens=100, steps=3, warmup_steps=1)
    steps = [
        step(0, 0, 1, 2),  # one of lane 0's sequences has not begun
        step(0, 0, 2, 3),
        step(0, 1, 3, 3),  # from here on all decode
        *[step(0, lane, 10 * index + 5 * lane, 3) for index in range(1, 6) for lane in (0, 1)],
        step(0, 0, 500, 2),  # the first one has ended
        step(0, 1, 900, 3),
    ]
    report = summarise(steps, load, num_lanes=2, num_layers=2)
    assert report["tpot_ms"] == {"p50": 10.0, "p99": 10.0, "max": 10.0}
    assert report["tokens_per_s"] == 600.0
    assert report["stages"]["attention"] == {"us": 300.0}
    assert report["steps"] == 3
    assert report["step_ms"] == report["tpot_ms"]
    assert report["jitter_ms"] == 0.0


def test_what_growing_contexts_add_to_steps_is_no_jitter_about_the_trend() -> None:
    load = DecodeLoad(batch=1, context_tokens=1000, steps=200, warmup_steps=0)
    ends, gap = [0.0], 10.0
    for index in range(210):
        ends.append(ends[-1] + gap + 0.01 * index + (0.5 if index % 50 == 7 else 0.0))
    report = summarise([step(0, 0, at, 1) for at in ends], load, num_lanes=1, num_layers=1)
    assert report["jitter_ms"] == pytest.approx(1.0, abs=0.1)
    assert report["jitter_about_trend_ms"] == pytest.approx(0.5, abs=0.05)


def test_a_token_counts_as_often_as_it_was_waited_for() -> None:
    load = DecodeLoad(batch=100, context_tokens=100, steps=2, warmup_steps=0)
    # 99 of 100 sequences wait 1 ms, and one 30 ms: the median is that of the sequences.
    steps = [step(0, 0, at, 99) for at in (0, 1, 2, 3)]
    steps += [step(1, 0, at, 1) for at in (0.5, 30.5, 60.5, 90.5)]
    steps.sort(key=lambda each: each.at_ns)
    report = summarise(steps, load, num_lanes=2, num_layers=1)
    assert report["tpot_ms"] == {"p50": 1.0, "p99": 1.0, "max": 30.0}


def test_too_few_common_steps_are_no_measurement() -> None:
    load = DecodeLoad(batch=4, context_tokens=100, steps=3, warmup_steps=0)
    steps = [step(0, lane, at, 2) for at in range(3) for lane in (0, 1)]
    with pytest.raises(Unavailable, match=r"Only \[2, 3\] steps of 2 lanes"):
        summarise(steps, load, num_lanes=2, num_layers=1)
    with pytest.raises(Unavailable, match="of 2 lanes"):
        summarise(steps[::2], load, num_lanes=2, num_layers=1)


def test_lines_of_other_events_are_passed_over() -> None:
    values = {
        "instance": 3, "lane": 1, "step": 9, "at_ns": 5, "num_tokens": 4,
        "compute_ns": 1, "wait_ns": 2, "total_ns": 3,
    }  # fmt: skip
    lines = [
        json.dumps({"level": "WARN", "fields": {"message": "step failed", "reason": "step done"}}),
        json.dumps({"level": "DEBUG", "fields": {"message": "step done", **values}}),
        "not JSON at all",
    ]
    assert read_steps(lines) == [LaneStep(3, 1, 5, 4, 1, 2, 3, 9)]


def test_lengths_reach_the_context_half_way_and_spread_around_it() -> None:
    load = DecodeLoad(batch=400, context_tokens=1000, spread=0.5, steps=100, warmup_steps=10)
    lengths = load.prompt_lengths()
    middle = sum(lengths) / len(lengths) + 48 + 10 + 50
    assert middle == pytest.approx(1000, rel=0.03)
    assert min(lengths) < 500
    assert max(lengths) > 1280
    assert lengths == load.prompt_lengths()


@pytest.mark.parametrize(("command", "name"), [("node ffn", "ffn-0"), ("serve", "coordinator")])
def test_a_run_that_loses_a_process_ends_at_once_and_says_which(
    tmp_path: Path, command: str, name: str
) -> None:
    # Nobody takes a process's place here, however long streams would wait for that.
    flags = (
        "--batch=2", "--context=400", "--lanes=1", "--devices=cpu", "--dtype=bfloat16",
        "--precision=production", "--recovery-timeout-ms=60000", f"--log-dir={tmp_path}",
    )  # fmt: skip
    bench = subprocess.Popen(
        [sys.executable, "-m", "step3rt", "bench", "decode", *flags],
        env={**os.environ, "STEP3RT_TEST_RUN": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "coordinator.log"
    wait_until(lambda: log.exists() and log.read_text().count("step done") > 3, "some steps")
    processes = processes_with(str(tmp_path))
    [victim] = [pid for pid, line in processes.items() if f"step3rt {command}" in line]
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    _, errors = bench.communicate(timeout=60)
    assert bench.returncode != 0
    assert f"error: The {name} process ended with code -9" in errors
    assert "Traceback" not in errors
    # Most of it to stop the others, one by one.
    assert time.monotonic() - killed_s < 20
    assert not processes_with(str(tmp_path))


def test_a_real_cluster_is_measured() -> None:
    result = run_bench(
        "--batch=4", "--context=256", "--steps=20", "--warmup-steps=2",
        "--attention=2", "--ffn=1", "--lanes=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["run"] == "2a1f-nano"
    assert report["steps"] == 20
    assert report["contexts_are_random_kv"] is True
    assert report["fabrics"] == ["shm"]
    tpot = report["tpot_ms"]
    assert 0 < tpot["p50"] <= tpot["p99"] <= tpot["max"]
    assert list(report["path"]) == ["coordinator", "first_token", "last_token"]
    # 4 streams, whose mean TPOT is not known here, but is no longer than the longest.
    assert report["tokens_per_s"] > 0.99 * 4e3 / tpot["max"]


def test_a_colocated_cluster_is_measured_as_such() -> None:
    result = run_bench(
        "--batch=4", "--context=200", "--steps=10", "--warmup-steps=2", "--lanes=2",
        "--placement=colocated", "--devices=cpu", "--dtype=bfloat16", "--precision=production",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["run"], report["placement"]) == ("colocated-1-nano", "colocated")
    assert (report["gpus"], report["devices"], report["instances"]) == (0, ["cpu"], 2)
    assert (report["fabrics"], report["weight_dtype"]) == (["cuda_ipc"], "fp8")
    assert report["tokens_per_s"] > 0


def leave_an_earlier_run(directory: Path) -> None:
    """What a run of 2A3F leaves in its log directory: 100 of the fastest steps, and recordings."""
    line = {"message": "step done", "lane": 0, "num_tokens": 2, "compute_ns": 1, "wait_ns": 1}
    with (directory / "coordinator.log").open("w") as log:
        for step, instance in product(range(100), range(2)):
            values = {"instance": instance, "step": step, "at_ns": step, "total_ns": 1}
            log.write(json.dumps({"fields": {**line, **values}}) + "\n")
    (directory / "trace").mkdir()
    for name in ("attention-1.npz", "ffn-2.npz", "steps-1.npy"):
        (directory / "trace" / name).write_bytes(b"another run's")


def test_stages_are_put_beside_the_work_of_their_own_steps() -> None:
    load = DecodeLoad(batch=4, context_tokens=4096, steps=1000)
    # The mean of the run is at its middle, 628 steps before the first stream ends.
    first, last = load.prompt_lengths()[0], load.max_new_tokens
    ends = [first + last - step for step in range(load.stage_steps)]
    assert load.stage_context_tokens == pytest.approx(sum(ends) / len(ends), abs=1)
    assert load.stage_context_tokens == 4096 + 484


def test_devices_say_what_a_step_consists_of(tmp_path: Path) -> None:
    leave_an_earlier_run(tmp_path)
    result = run_bench(
        "--batch=4", "--context=256", "--steps=4", "--warmup-steps=1", "--devices=cpu",
        "--attention=1", "--ffn=2", "--lanes=2", "--dtype=bfloat16", "--precision=production",
        f"--log-dir={tmp_path}", f"--trace={tmp_path / 'out.pftrace'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "bench decode: " in result.stderr
    report = json.loads(result.stdout)
    assert "stages_missing" not in report, report["stages_missing"]
    stages = report["stages"]
    for name in ("attention", "head", "a2f", "ffn", "f2a"):
        assert 0 <= stages[name]["us"] <= stages[name]["elapsed_us"] + 0.01, name
    shares = [stages[name]["share"] for name in ("attention", "head", "a2f", "ffn", "f2a", "wait")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert stages["transfer"]["us"] > 0
    assert stages["wait"]["us"] > 0
    assert list(report["bubble_share"]["by_gpu"]) == ["attention 0", "ffn 0", "ffn 1"]
    assert report["bubble_share"]["mean"] == stages["wait"]["share"]
    assert 1 <= report["stages_over"]["steps"] <= 4.5
    load, config = report["expert_load"], report["model"]
    rows = 2 * config["moe_top_k"]  # of a micro-batch
    # Ranks are looked at in different steps, whose routing differs.
    assert load["rows_per_expert"]["mean"] * report["experts"] == pytest.approx(rows, rel=0.05)
    assert load["max_over_mean"] >= 1
    assert report["bytes_per_step"]["f2a"] > 0
    assert "roofline" not in report  # no card is known
    device = report["device_step_ms"]
    assert 0 < device["p50"] <= device["p99"] <= device["max"]
    assert report["jitter_ms"] == pytest.approx(
        report["step_ms"]["p99"] - report["step_ms"]["p50"], abs=1e-3
    )
    path = report["path"]
    assert list(path) == [
        "device", "seen", "reported", "coordinator", "first_token", "last_token", "launch_ms",
        "lanes_apart_ms",
    ]  # fmt: skip
    assert 0 < path["reported"]["after_ms"]["p50"] <= path["reported"]["after_ms"]["max"] < 1e3
    seen = report["client_tpot_ms"]
    assert 0 < seen["p50"] <= seen["p99"] <= seen["max"]
    assert set(report["trace"]["instances"]) == {"attention 0", "ffn 0", "ffn 1"}
    assert (tmp_path / "out.pftrace").stat().st_size > 0
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == [
        "attention-0.npz", "ffn-0.npz", "ffn-1.npz", "steps-0.npy",
    ]  # fmt: skip
    the_planner_takes(report, tmp_path / "decode-nano.json")


def test_without_stages_nothing_is_noted(tmp_path: Path) -> None:
    result = run_bench(
        "--batch=2", "--context=200", "--steps=4", "--warmup-steps=1", "--devices=cpu",
        "--lanes=1", "--dtype=bfloat16", "--precision=production", "--no-stages",
        f"--log-dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert list(report["stages"]) == ["lane_step"]
    assert "--no-stages" in report["stages_missing"]
    assert report["tokens_per_s"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attention-0.log", "coordinator.log", "ffn-0.log",
    ]  # fmt: skip
    # What the planner cannot learn from it is no reason to refuse the file.
    file = tmp_path / "decode-nano.json"
    on_gpus = {"gpus": 2, "machine": "2 x NVIDIA H200", "tokens_per_s_per_gpu": 1.0}
    file.write_text(json.dumps(report | on_gpus))
    assert load_measurement(file, load_hardware()).deployment.label.startswith("1A+1F")


def the_planner_takes(report: dict[str, Any], path: Path) -> None:
    """What is written here is what is read there; only GPUs are missing."""
    on_gpus = {
        "gpus": 3, "machine": "3 x NVIDIA H200", "tokens_per_s_per_gpu": report["tokens_per_s"] / 3
    }  # fmt: skip
    path.write_text(json.dumps(report | on_gpus))
    measurement = load_measurement(path, load_hardware())
    assert measurement.deployment.label == "1A+2F h200 ep x2"
    over = report["stages_over"]
    assert measurement.stage_context_tokens == pytest.approx(over["context"], abs=1.5)
    kv = report["batch"] / 2 * over["context"] * 2 * 128  # 2 lanes, K and V of one head, FP8
    assert report["stages"]["attention"]["bytes"] > kv
    profile = load_profile("peers-h200")
    rows = compare(load_model("step3"), [measurement], profile)
    quantities = {row.quantity for row in rows}
    assert quantities >= {"tpot_ms", "attention", "a2f", "ffn", "f2a", "transfer"}
    (point,) = load_points([path])
    assert point.jitter_ms == (report["jitter_ms"], report["jitter_about_trend_ms"])
    assert point.idle == report["bubble_share"]["mean"]
    assert point.stages[0][0] == report["stages"]["attention"]["us"]
    card = load_hardware()["h200"]
    recordings = load_all(path.parent / "trace")
    sizes = Shape(
        config=Step3Config.from_directory(resolve_model(Path("nano"))),
        num_attention=1, num_ffn=2, num_lanes=2, batch=4, context_tokens=256, kv_dtype="fp8",
    )  # fmt: skip
    again = stage_report(recordings, sizes, card, 4)
    assert again["roofline"]["card"] == "h200"
    assert again["stages"]["ffn"]["us"] == report["stages"]["ffn"]["us"]
    assert again["stages"]["ffn"]["roofline_us"] > 0
    assert again["stages"]["a2f"]["roofline_limit"] == "bytes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch=5", "--attention=2"), "cannot be spread over 6 lanes"),
        (("--batch=6", "--context=4096"), "would reach"),
        (("--batch=6", "--spread=1"), "spread"),
        (("--batch=6", "--steps=0"), "steps=0"),
        (("--placement=colocated",), "a device is 'reference'"),
        (("--batch=6", "--no-stages", "--trace=x"), "Leave out --trace or --no-stages"),
        (("--batch=6", "--trace=x"), "a device is 'reference'"),
        (("--batch=6", "--context=240"), "would begin with -8 tokens"),
        (("--batch=6", "--context=200", "--spread=0.5"), "a smaller spread"),
        (("--batch=6", "--out=no-such-directory/x.json"), "--out 'no-such-directory/x.json'"),
        (("--batch=6", "--trace=no-such-directory/x", "--devices=cpu"), "--trace 'no-such-"),
        (("--batch=6", "--out=."), "--out '.' cannot be written"),
    ],
)
def test_loads_that_cannot_be_measured_are_refused(flags: tuple[str, ...], message: str) -> None:
    result = run_bench(*flags)
    assert result.returncode != 0
    assert message in result.stderr
