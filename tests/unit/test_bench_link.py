"""`step3rt bench link` measures real links between two processes."""

import json
import os

import pytest

from step3rt import _core
from step3rt.cli import main


@pytest.mark.parametrize(
    ("fabric", "baseline"), [("shm", "memcpy and a flag"), ("tcp", "plain socket")]
)
def test_a_link_and_its_baseline_are_measured(
    fabric: str, baseline: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--fabric", fabric, "--bytes", "65536", "--peers", "2", "--rounds", "40"]
    assert main(["bench", "link", *flags, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["fabric"], report["bytes"], report["peers"]) == (fabric, 65_536, 2)
    times = report["one_way_us"]
    assert 0 < times["p50"] <= times["p99"] <= times["max"]
    assert report["gb_per_s"] == pytest.approx(65.536 / times["p50"], rel=0.1, abs=0.01)
    assert report["baseline"]["name"] == baseline
    assert report["baseline"]["one_way_us"]["p50"] > 0
    assert report["baseline"]["gb_per_s"] > 0
    assert report["cpu"]["us_per_round"] > 0
    above = times["p50"] - report["baseline"]["one_way_us"]["p50"]
    assert report["above_baseline_us"]["p50"] == pytest.approx(above, abs=0.01)
    ratios = report["baseline_over_link"]
    assert len(ratios["turns"]) == 8
    assert min(ratios["turns"]) <= ratios["p50"] <= max(ratios["turns"])
    assert report["placement"] in ("a core each", "shared cores")
    assert "cores of" in report["machine"]


def test_more_processes_than_cores_are_measured_two_by_two(
    capfd: pytest.CaptureFixture[str],
) -> None:
    num_peers = len(os.sched_getaffinity(0)) // 2 * 2 + 2
    flags = ["--fabric", "shm", "--bytes", "64", "--peers", str(num_peers), "--rounds", "2"]
    assert main(["bench", "link", *flags, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["peers"], report["placement"]) == (num_peers, "shared cores")


def test_without_json_a_line_for_people_comes_first(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "link", "--fabric", "shm", "--bytes", "64", "--rounds", "2"]) == 0
    line, report = capfd.readouterr().out.splitlines()
    assert line.startswith("shm, 64 bytes one way: p50 ")
    assert json.loads(report)["rounds"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fabric", "shm", "--peers", "3"], "Use an even number"),
        (["--fabric", "cuda_ipc", "--peers", "4"], "Use --peers 2"),
        (["--fabric", "tcp", "--bytes", "0"], "Use --bytes 1 or more"),
        (["--fabric", "shm", "--bytes", str(1 << 50)], "Use fewer bytes"),
        (["--fabric", "tcp", "--bytes", str(1 << 28), "--peers", "65536"], "Use fewer bytes"),
        (["--fabric", "tcp", "--rounds", "0"], "Use --rounds 1 or more"),
        (["--fabric", "cuda_ipc", "--rounds", "9"], "Leave --rounds out"),
    ],
)
def test_flags_that_cannot_be_measured_are_refused(
    flags: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "link", *flags]) != 0
    assert words in capfd.readouterr().err


def test_rdma_without_a_device_says_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    fixes = [fix for is_good, _, fix in _core.rdma_findings() if not is_good]
    if not fixes:
        pytest.skip("this host has RDMA")
    assert main(["bench", "link", "--fabric", "rdma"]) != 0
    assert fixes[0] in capfd.readouterr().err
