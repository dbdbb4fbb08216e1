"""`ucx_perftest` beside a link: a program with its interface stands in where it is missing."""

import json
from pathlib import Path

import pytest

from step3rt.bench import ucx
from step3rt.cli import main

# Serves until it is killed; as a client prints what ucx_perftest -f -v does.
_PROGRAM = """#!/bin/sh
[ "$1" = 127.0.0.1 ] || exec sleep 60
[ "$UCX_TLS" = posix ] || { echo "no such transport" >&2; exit 1; }
echo "iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr"
echo " 5,0.280,0.319,0.319,191.33,191.33,3134756,3134756"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "ucx_perftest"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


@pytest.mark.usefixtures("installed")
def test_a_link_is_reported_beside_ucx_where_that_is_installed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ["--fabric", "shm", "--bytes", "64", "--rounds", "2", "--json"]
    assert main(["bench", "link", *flags]) == 0
    assert json.loads(capfd.readouterr().out)["ucx"] == {
        "name": "ucx_perftest, ucp_am_lat, UCX_TLS=posix",
        "one_way_us": {"p50": 0.28},
        "gb_per_s": 0.23,
    }


def test_what_ucx_says_when_it_does_not_measure_is_passed_on(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ucx, "_START_LIMIT_S", 0.0)
    perftest = ucx.find("tcp")
    assert perftest is not None
    assert perftest.program == installed
    with pytest.raises(ucx.UcxError, match="no such transport"):
        perftest.one_way_us("tcp", 64, 5, [None, None])


def test_ucx_is_not_measured_beside_other_fabrics() -> None:
    assert ucx.find("rdma") is None
