"""`step3rt plan` as a user runs it: its JSON keys, its files, its refusals."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from step3rt.cli import EX_CONFIG, EX_USAGE, main
from step3rt.cli.flags import cluster_from
from step3rt.config import ServeConfig, build
from step3rt.plan.cost import token_cost
from step3rt.plan.hardware import load_hardware
from step3rt.plan.hf_config import load_model
from step3rt.setting import load_toml

HUGE = "1" + "0" * 400
SIMULATE = ["simulate", "--colocated-gpus", "8", "--batch", "64", "--lengths", "stationary"]

RESULT = {
    "run": "full-colocated-4",
    "machine": "4x NVIDIA H200",
    "gpus": 4,
    "context": 4096,
    "batch": 900,
    "lanes": 2,
    "layers": 61,
    "kv_dtype": "fp8",
    "tokens_per_s_per_gpu": 3000.0,
    "tpot_ms": {"p50": 75.0},
    "stages": {"attention": {"us": 150.0}, "ffn": {"us": 400.0}},
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that a successful command prints."""
    code = main(["plan", *arguments, "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def test_cost_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "cost", "--model", "step3", "--context", "8192", "--hardware", "h800")
    cost = token_cost(load_model("step3"), 8192)
    promised = {
        "model": "step3",
        "context": 8192,
        "kv_bytes": cost.kv_bytes,
        "attn_flops": cost.attn_flops,
        "linear_flops": cost.linear_flops,
        "ffn_flops": cost.ffn_flops,
        "arithmetic_intensity": 128.0,
        "usd_per_1m_tokens": {
            "h800": {
                "attention": cost.attention_usd(load_hardware()["h800"]),
                "ffn": cost.ffn_usd(load_hardware()["h800"]),
            }
        },
    }
    assert {key: values[key] for key in promised} == promised


def test_cost_without_a_choice_is_on_the_papers_cards(capsys: pytest.CaptureFixture[str]) -> None:
    values = run(capsys, "cost")
    assert list(values["usd_per_1m_tokens"]) == ["h800", "h20", "a800", "910b"]
    assert values["afd_usd_per_1m_tokens"]["total"] == pytest.approx(0.055, abs=5e-4)
    least = [round(value, 3) for value in values["min_moe_sparsity"].values()]
    assert least == [0.058, 0.007, 0.031, 0.034]
    every = run(capsys, "cost", "--hardware", "all")
    assert set(every["usd_per_1m_tokens"]) == set(load_hardware())


def test_a_batch_beyond_memory_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    unit = ["--colocated-gpus", "8", "--batch", "4000", "--steps", "8", "--context", "4096"]
    assert main(["plan", "simulate", *unit]) == 0
    assert "warning: 801 sequences fit in memory, 4000 were" in capsys.readouterr().out


def test_cost_tells_where_the_paper_disagrees_with_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "cost", "--model", "deepseek-v3"]) == 0
    assert "note, tables 2, 3: MLA's attention FLOPs count 576" in capsys.readouterr().out


def test_simulate_prints_what_the_search_emits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    search = ("search", "--gpus", "h800:32", "--context", "4096")
    found = run(
        capsys, *search, "--emit", str(file), "--serve-model", '/srv/"step3"', "--placement",
        "disaggregated", "--ffn-parallelism", "ep",
    )  # fmt: skip
    config = build(ServeConfig, load_toml(file), str(file))
    choice = found["choices"][0]
    assert str(config.model) == '/srv/"step3"'
    assert (config.attention, config.ffn) == (choice["attention_gpus"], choice["ffn_gpus"])
    assert config.wire_dtypes() == ("fp8", "bfloat16", "fp8")
    batch = config.attention * config.lanes * config.max_sequences_per_lane
    assert batch == choice["batch"]
    again = run(
        capsys, "simulate", "--context", "4096", "--attention-gpus", str(config.attention),
        "--ffn-gpus", str(config.ffn), "--lanes", str(config.lanes), "--batch", str(batch),
        "--steps", "64",
    )  # fmt: skip
    rate = choice["tokens_per_s_per_gpu"] * 32 / choice["units"]
    assert again["tokens_per_s"] == pytest.approx(rate, rel=0.02)


def test_a_colocated_plan_is_emitted_with_its_placement(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    found = run(
        capsys, "search", "--gpus", "h200:4", "--context", "4096", "--profile", "peers-h200",
        "--emit", str(file),
    )  # fmt: skip
    assert found["advice"] == "colocate"
    arguments = argparse.Namespace(config=file)
    settings, host = cluster_from(arguments)
    assert (settings.attention, settings.ffn, host.placement) == (4, 4, "colocated")
    assert "step3rt node colocated" in file.read_text()


def test_what_is_emitted_has_the_kv_and_the_target_that_were_planned_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    search = ("search", "--gpus", "h200:4", "--context", "4000", "--profile", "step3rt-h200")
    found = run(capsys, *search, "--tpot-ms", "62.5", "--emit", str(file))
    text = file.read_text()
    # With the two lines that are in it as comments, `serve` starts the instances.
    file.write_text(re.sub(r"^# (devices|kv_blocks) =", r"\1 =", text, flags=re.MULTILINE))
    settings, host = cluster_from(argparse.Namespace(config=file))
    assert settings.target_tpot_ms == 62
    assert host.used_devices(settings) == [f"cuda:{index}" for index in range(4)]
    sequences = found["choices"][0]["batch"] / 4
    assert host.kv_blocks is not None
    assert sequences * 4064 / 64 < host.kv_blocks <= sequences * 4128 / 64
    assert f"give it --kv-blocks {host.kv_blocks}" in text
    room = found["choices"][0]["max_batch"] / 4 * 4000 / 64
    assert host.kv_blocks < 1.02 * room


def test_emitting_says_what_was_written_and_what_does_not_run_yet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    search = ("plan", "search", "--gpus", "h800:32", "--context", "4096", "--emit", str(file))
    assert main([*search, "--placement", "disaggregated"]) == 0
    output = capsys.readouterr()
    label = re.search(r"One unit: (.*);", file.read_text())
    assert label is not None
    # What is best splits experts, which instances do not.
    assert label[1] not in output.out.splitlines()[1]
    assert f"wrote {file}: {label[1]} (not the best), " in output.err
    assert "links instances on GPUs within one host only" in file.read_text()


def test_nothing_is_emitted_when_nothing_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    code = main(["plan", "search", "--gpus", "h800:2", "--emit", str(file)])
    assert code == EX_USAGE
    assert "No cluster file was written" in capsys.readouterr().err
    assert not file.exists()


def test_the_report_says_that_it_is_a_prediction(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "report.md"
    run(capsys, "search", "--gpus", "h800:16", "--context", "4096", "--report", str(file))
    text = file.read_text()
    assert text.startswith("# step3: p99 TPOT 50 ms at 4096 tokens")
    assert "Predicted, not measured" in text


def test_a_fitted_profile_is_saved_and_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result, profile = tmp_path / "r.json", tmp_path / "fitted.toml"
    result.write_text(json.dumps(RESULT))
    stated = ("compare", str(result), "--profile", "peers-h200")
    first = run(capsys, *stated, "--save", str(profile))
    assert first["fitted"]["median_error"] < 0.05 < first["stated"]["median_error"]
    second = run(capsys, "compare", str(result), "--profile", str(profile))
    assert second["stated"]["median_error"] == pytest.approx(
        first["fitted"]["median_error"], abs=1e-4
    )


def test_a_profile_that_was_kept_is_used_the_next_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    result = tmp_path / "r.json"
    result.write_text(json.dumps(RESULT))
    search = ("search", "--gpus", "h200:4", "--context", "4096", "--json")
    before = run(capsys, *search)
    run(capsys, "compare", str(result), "--profile", "peers-h200", "--save")
    kept = tmp_path / "config" / "step3rt" / "fitted.toml"
    assert kept.is_file()
    after = run(capsys, *search)
    assert after == run(capsys, *search, "--profile", str(kept))
    assert after != before
    assert before == run(capsys, *search, "--profile", "paper-h800")


def test_a_user_without_a_home_directory_can_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_at_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody_at_home)
    predict = ("predict", "--colocated-gpus", "8", "--batch", "64")
    assert run(capsys, *predict) == run(capsys, *predict, "--profile", "paper-h800")
    result = tmp_path / "r.json"
    result.write_text(json.dumps(RESULT))
    assert main(["plan", "compare", str(result), "--save"]) == EX_CONFIG
    assert "Name a file: --save FILE" in capsys.readouterr().err


def test_holdout_compares_with_files_that_the_fit_has_not_seen(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = []
    for index, (batch, rate) in enumerate(((900, 3000.0), (500, 2100.0), (300, 1450.0))):
        file = tmp_path / f"{index}.json"
        tpot = {"p50": batch / rate / 4 * 1e3}
        values = {"batch": batch, "tokens_per_s_per_gpu": rate, "tpot_ms": tpot, "stages": {}}
        file.write_text(json.dumps(RESULT | values))
        files.append(str(file))
    found = run(capsys, "compare", *files, "--profile", "peers-h200")
    runs = [f"full-colocated-4 ({index}.json)" for index in range(3)]
    assert [row["run"] for row in found["stated"]["rows"]][::2] == runs
    test = found["test"]
    assert sorted(test["fitted_to"] + test["tested_on"]) == runs
    assert len(test["tested_on"]) == 1
    assert {row["run"] for row in found["fitted"]["rows"]} == set(test["tested_on"])
    errors = test["median_errors"]
    assert errors["fitted"]["tokens_per_s_per_gpu"] < errors["stated"]["tokens_per_s_per_gpu"]
    assert errors["fitted"]["stages"] is None
    assert main(["plan", "compare", *files, "--profile", "peers-h200"]) == 0
    assert "fitted to 2 runs and tested on the other 1" in capsys.readouterr().out
    everything = run(capsys, "compare", *files, "--profile", "peers-h200", "--fit-all")
    assert "test" not in everything
    assert [row["run"] for row in everything["fitted"]["rows"]][::2] == runs


@pytest.mark.parametrize("figure", ["1", "2", "5"])
def test_figures_of_the_paper_are_drawn_the_same_every_time(tmp_path: Path, figure: str) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{index}.svg" for index in range(2)]
    for file in files:
        assert main(["plan", "cost", "--plot", str(file), "--figure", figure]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"</svg>" in files[0].read_bytes()


def test_front_and_timeline_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    front, timeline = tmp_path / "front.png", tmp_path / "timeline.svg"
    search = ["plan", "search", "--gpus", "h800:16", "--context", "4096", "--plot", str(front)]
    assert main(search) == 0
    simulate = ["plan", "simulate", "--colocated-gpus", "8", "--batch", "800", "--steps", "8"]
    assert main([*simulate, "--plot", str(timeline)]) == 0
    assert front.read_bytes()[:4] == b"\x89PNG"
    assert timeline.read_text().count("<path") > 20


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["cost", "--model", "step4"], EX_CONFIG, "neither one that the planner ships"),
        (["cost", "--context", "0"], EX_USAGE, "--context is 0"),
        (["cost", "--context", HUGE], EX_USAGE, "from 1 to 1000000000"),
        (["cost", "--hardware", "h8000"], EX_CONFIG, "Did you mean 'h800'"),
        (["cost", "--plot", "figure.pdf"], EX_CONFIG, "unknown suffix"),
        (["search", "--gpus", "h800"], EX_USAGE, "Write it like h20:8,h800:8"),
        (["search", "--gpus", "h800:8,h800:8"], EX_USAGE, "comes once"),
        (["search", "--gpus", "h800:0"], EX_USAGE, "count above 0"),
        (["search", "--gpus", "h800:8", "--lanes", "0"], EX_USAGE, "has 0 lanes"),
        (
            ["simulate", "--batch", "1000000000000", "--colocated-gpus", "8"],
            EX_USAGE,
            "a batch at most 10000000",
        ),
        (["simulate", "--batch", "8"], EX_USAGE, "incomplete or given twice"),
        ([*SIMULATE, "--context", HUGE], EX_USAGE, "the others at most 1000000000"),
        ([*SIMULATE, "--output-tokens", HUGE], EX_USAGE, "the others at most 1000000000"),
        ([*SIMULATE, "--arrivals-per-step", "inf"], EX_USAGE, "a number above 0, at most"),
        ([*SIMULATE, "--seed", "-1"], EX_USAGE, "The seed is -1. Seeds count from 0"),
        ([*SIMULATE, "--experts", "2"], EX_USAGE, "takes 3 different ones"),
        (["predict", "--colocated-gpus", "8", "--batch", HUGE], EX_USAGE, "at most 10000000"),
        (["search", "--gpus", "h800:8", "--seed", "-1"], EX_USAGE, "The seed is -1"),
        (["search", "--gpus", "h800:8", "--tpot-ms", "inf"], EX_USAGE, "the TPOT finite"),
        (
            ["search", "--gpus", "h800:8", "--model", "qwen3-32b", "--emit", "never.toml"],
            EX_USAGE,
            "cannot be written into a cluster file",
        ),
        (["simulate", "--batch", "8", "--ffn-gpus", "8"], EX_USAGE, "incomplete"),
        (["simulate", "--batch", "8", "--colocated-gpus", "-1"], EX_USAGE, "Correct the counts"),
        (["compare", "absent.json"], EX_CONFIG, "cannot be read"),
        (["plot", "docs/results", "--tpot-ms", "nan"], EX_USAGE, "--tpot-ms is nan"),
    ],
)
def test_mistakes_are_named_with_a_remedy(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["plan", *arguments]) == code
    assert message in capsys.readouterr().err


def test_planning_needs_neither_torch_nor_matplotlib_nor_the_extension() -> None:
    program = (
        "import pkgutil, sys, importlib, step3rt.plan\n"
        "for module in pkgutil.iter_modules(step3rt.plan.__path__):\n"
        "    importlib.import_module('step3rt.plan.' + module.name)\n"
        "print([m for m in ('torch', 'matplotlib', 'cupy', 'step3rt._core') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
