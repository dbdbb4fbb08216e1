import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from step3rt import _core
from step3rt.bench import scheduler
from step3rt.cli import main
from tests.fixtures.core_processes import wait_until

FAULTS = {
    "cancel", "stop_string", "invalid_request", "repeated_request", "deadline", "crash",
    "unnoticed_restart", "stale_registration", "slow_node", "lost_plan", "lost_answer",
    "delayed_message", "duplicated_answer", "reordered_answer", "stale_answer", "torn_answer",
    "corrupt_logits", "failed_step", "lost_experts", "kv_exhaustion", "clock_jump",
    "clock_stall", "drain",
}  # fmt: skip

NANO_VLLM_SCHEDULER = """
from nanovllm.config import Config

class Scheduler:
    def __init__(self, config: Config):
        self.waiting, self.running = [], []

    def add(self, sequence):
        self.waiting.append(sequence)

    def schedule(self):
        is_prefill = bool(self.waiting)
        if is_prefill:
            self.running, self.waiting = self.running + self.waiting, []
        return list(self.running), is_prefill

    def postprocess(self, batch, tokens, is_prefill):
        for sequence, token in zip(batch, tokens):
            sequence.tokens.append(token)
        self.running = [s for s in self.running if len(s.tokens) < s.max_tokens]
"""

NANO_VLLM_SEQUENCE = """
class Sequence:
    block_size = 256

    def __init__(self, prompt, sampling):
        self.tokens, self.max_tokens = [], sampling.max_tokens
"""

NANO_VLLM_SAMPLING = """
class SamplingParams:
    def __init__(self, max_tokens, ignore_eos):
        self.max_tokens = max_tokens
"""


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "flags",
    [
        ["scheduler", "--sequences", "1000000000"],
        ["scheduler", "--attention", "1000000000"],
        ["replay", "--trace", "bursty", "--requests", "1000000000"],
    ],
)
def test_what_would_take_all_memory_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert "held in memory. Use at most" in capsys.readouterr().err


def catches_ctrl_c(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    [caught] = [line for line in lines if line.startswith("SigCgt:")]
    return bool(int(caught.split()[1], 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize(
    "flags",
    [["scheduler", "--steps", "10000000"], ["replay", "--trace=bursty", "--requests=1000000"]],
)
def test_ctrl_c_ends_what_only_computes(flags: list[str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "step3rt", "bench", *flags])
    try:
        for is_caught in (True, False):  # Python's start, and the call that looks for no signal
            wait_until(lambda is_caught=is_caught: catches_ctrl_c(process.pid) is is_caught)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()


def test_many_seeds_keep_every_promise_and_meet_every_fault(capsys):
    assert main(["sim", "--seeds", "600"]) == 0
    report = last_line(capsys)
    assert (report["seeds"], report["violations"]) == (600, 0)
    assert {name for name, count in report["faults"].items() if count > 0} == FAULTS
    assert report["ends"]["Finished"] > 1_000
    judged = report["steps_with_decodes_and_prompts"]
    assert judged > 500
    assert report["pushed_past_target"] < judged / 20


def test_a_broken_promise_is_printed_with_its_seed_and_replays(capsys):
    broken = ["--sabotage", "lost-cancel"]
    assert main(["sim", "--first-seed", "100", "--seeds", "40", *broken]) == 1
    lines = capsys.readouterr().out.splitlines()
    seed, _, what = lines[0].removeprefix("seed ").partition(": ")
    assert "goes on after its cancel" in what
    assert json.loads(lines[-1])["violations"] >= 1
    assert main(["sim", "--seed", seed, "--trace", *broken]) == 1
    first = capsys.readouterr().out.splitlines()[:-1]
    assert any(f"VIOLATION: {what}" in line for line in first)
    assert main(["sim", "--seed", seed, "--trace", *broken]) == 1
    assert capsys.readouterr().out.splitlines()[:-1] == first
    assert main(["sim", "--seed", seed]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace"], "Name the seed with --seed"),
        (["--seeds", "0"], "at least one seed"),
        (["--sabotage", "gremlins"], "lost-cancel"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(capsys, arguments, message):
    assert main(["sim", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_scheduler_is_measured_with_the_promised_keys(capsys):
    flags = ["--sequences", "96", "--attention", "2", "--lanes", "3", "--steps", "30"]
    assert main(["bench", "scheduler", *flags, "--no-scaling", "--json"]) == 0
    report = last_line(capsys)
    assert set(report["schedule_apply_us"]) == {"p50", "p99", "max"}
    assert report["schedule_apply_us"]["p50"] > 0
    assert 28 <= report["sequences_per_lane_step"] <= 32
    assert report["machine"]
    assert report["scaling"] == []
    assert report["peers"] == []


def test_the_scaling_reaches_from_256_to_65536_sequences():
    options = {"sequences": 16, "attention": 16, "lanes": 3, "steps": 3, "scaling": True}
    report = json.loads(_core.bench_scheduler(json.dumps(options)))
    sizes = [point["sequences"] for point in report["scaling"]]
    assert (min(sizes), max(sizes)) == (256, 65_536)
    assert all(point["p50_us"] > 0 for point in report["scaling"])


def test_a_peer_is_measured_from_its_sources_and_leaves_no_modules(tmp_path, capsys):
    engine = tmp_path / "nanovllm" / "engine"
    engine.mkdir(parents=True)
    (engine / "scheduler.py").write_text(NANO_VLLM_SCHEDULER)
    (engine / "sequence.py").write_text(NANO_VLLM_SEQUENCE)
    (tmp_path / "nanovllm" / "sampling_params.py").write_text(NANO_VLLM_SAMPLING)
    load = scheduler.Load(num_sequences=30, num_attention=2, num_lanes=3)
    peers = {"nano-vllm": str(tmp_path)}
    report = scheduler.measure(load, num_steps=10, has_scaling=False, peers=peers)
    (peer,) = report["peers"]
    assert peer["ratio_p50"] == peer["p50_us"] / report["schedule_apply_cpu_us"]["p50"]
    with pytest.raises(ModuleNotFoundError):
        __import__("nanovllm")


def test_lives_are_those_that_the_rust_side_computes():
    lives = [scheduler.life_steps(request) for request in (0, 1, 2, 3, 1_000, 99_999)]
    assert lives == [50, 53, 120, 124, 77, 122]


def test_an_absent_peer_is_skipped_with_a_reason(tmp_path: Path):
    load = scheduler.Load(num_sequences=30, num_attention=2, num_lanes=3)
    peers = {"nano-vllm": str(tmp_path)}
    report = scheduler.measure(load, num_steps=3, has_scaling=False, peers=peers)
    assert "scheduler.py" in report["peers"][0]["skipped"]


def test_a_peer_whose_interpreter_is_absent_is_skipped_with_a_reason(tmp_path: Path):
    load = scheduler.Load(num_sequences=30, num_attention=2, num_lanes=3)
    peers = {"vllm": str(tmp_path / "python")}
    report = scheduler.measure(load, num_steps=3, has_scaling=False, peers=peers)
    assert "cannot be run" in report["peers"][0]["skipped"]


def test_an_unknown_peer_is_refused(capsys):
    assert main(["bench", "scheduler", "--peer", "other=/tmp"]) == 2
    assert "nano-vllm=DIR" in capsys.readouterr().err
    assert main(["bench", "scheduler", "--peer", "nano-vllm"]) == 2


@pytest.mark.parametrize("trace", ["bursty", "reasoning", "mixed"])
def test_a_trace_is_replayed_alike_and_beside_first_come_first_served(trace, capsys):
    flags = ["bench", "replay", "--trace", trace, "--requests", "60", "--json"]
    assert main(flags) == 0
    first = last_line(capsys)
    assert main(flags) == 0
    assert last_line(capsys) == first
    for policy in ("step3rt", "fcfs"):
        report = first[policy]
        assert (report["completed"], report["refused"]) == (60, 0)
        assert 0 < report["kv_utilisation"] <= 1
        assert 0 < report["fairness"] <= 1
        assert report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"]


def test_a_cluster_too_small_for_the_trace_is_refused(capsys):
    assert main(["bench", "replay", "--trace", "bursty", "--kv-blocks", "8"]) == 2
    assert "Raise what is too small" in capsys.readouterr().err
