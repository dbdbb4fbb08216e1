"""The measurement of a step's way to the client, on an instance whose device is a clock."""

import json
import subprocess
import sys


def test_steps_of_a_clock_are_as_long_as_it_says_at_every_point_of_their_way() -> None:
    command = [
        sys.executable, "-m", "step3rt.bench.host_path", "--model=nano", "--batch=8",
        "--context=300", "--steps=20", "--step-ms=60", "--apart-ms=20", "--launch-ms=1",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["steps"] == 20
    path = report["path"]
    assert path["device"]["jitter_ms"] == 0
    assert list(path) == [
        "device", "seen", "reported", "coordinator", "first_token", "last_token", "launch_ms",
        "lanes_apart_ms",
    ]  # fmt: skip
    assert abs(report["tpot_ms"]["p50"] - 60) < 6
    assert abs(report["client_tpot_ms"]["p50"] - 60) < 6
    assert path["launch_ms"]["p50"] >= 1
    assert abs(path["lanes_apart_ms"]["p50"] - 20) < 6
