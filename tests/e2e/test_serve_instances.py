"""`step3rt serve` with --devices: a coordinator that keeps its own instances."""

import json
import os
import re
import signal
import tomllib
from pathlib import Path

import pytest

from tests.e2e.clusters import is_running, snapshot, wait_until
from tests.e2e.commands import Commands, Running, run
from tests.e2e.device_clusters import SETTINGS, generate, setting_flags
from tests.fixtures.device_reference import assert_agrees, reference_decoder
from tests.kernels.decoder_inputs import NANO

pytestmark = pytest.mark.usefixtures("one_thread")


def pids(coordinator: Running) -> set[int]:
    return {item["pid"] for item in snapshot(coordinator.control_address)["instances"]}


def num_ready(coordinator: Running) -> int:
    instances = snapshot(coordinator.control_address)["instances"]
    return sum(item["state"] == "ready" for item in instances)


def test_instances_of_a_cluster_file_serve_are_replaced_and_end_with_the_coordinator(
    commands: Commands, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    placed = {**SETTINGS, "placement": "colocated", "devices": ["cpu", "cpu"], "kv_blocks": 64}
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in placed.items()))
    coordinator = commands.serve(NANO, f"--config={file}")
    texts = generate(coordinator)
    assert_agrees(reference_decoder(), texts)
    before = pids(coordinator)
    assert len(before) == 2
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in pids(coordinator), "the loss")
    wait_until(lambda: num_ready(coordinator) == 4, "the return")
    after = pids(coordinator)
    assert len(before & after) == 1
    assert_agrees(reference_decoder(), generate(coordinator))
    coordinator.process.terminate()
    assert coordinator.process.wait(60) == 0, coordinator.output()
    assert not any(is_running(pid) for pid in before | after)
    assert "ended with code -9 and is started again" in coordinator.output()


@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
def test_a_plan_that_was_emitted_serves(commands: Commands, tmp_path: Path, placement: str) -> None:
    """On CPUs instead of the GPUs that were planned for, whose memory is as small as nano."""
    cards, file = tmp_path / "cards.toml", tmp_path / "cluster.toml"
    cards.write_text("[h200]\nmemory_bytes = 4.5e9\n")
    search = ["plan", "search", f"--model={NANO}", "--gpus=h200:2", "--context=1024"]
    ended = run(
        *search, f"--hardware-file={cards}", f"--placement={placement}", f"--emit={file}",
        "--profile=step3rt-h200",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    text = re.sub(r"^# (devices|kv_blocks) =", r"\1 =", file.read_text(), flags=re.MULTILINE)
    file.write_text(re.sub(r"cuda:\d+", "cpu", text))
    coordinator = commands.serve(NANO, f"--config={file}")
    assert_agrees(reference_decoder(), generate(coordinator))
    instances = snapshot(coordinator.control_address)["instances"]
    planned = tomllib.loads(file.read_text())
    assert len(instances) == planned["attention"] + planned["ffn"]
    blocks = {item["num_kv_blocks"] for item in instances if item["role"] == "attention"}
    assert blocks == {planned["kv_blocks"]}


def test_instances_that_refuse_their_configuration_end_the_coordinator() -> None:
    # In float32, which no device computes.
    ended = run("serve", str(NANO), "--listen=127.0.0.1:0", "--control-listen=127.0.0.1:0",
                "--devices=cpu")  # fmt: skip
    assert ended.returncode == 78
    assert "compute_dtype is float32" in ended.stderr


def test_settings_of_instances_that_nobody_starts_are_refused() -> None:
    ended = run("serve", str(NANO), *setting_flags({"kv_blocks": 8, "listen": "127.0.0.1:0"}))
    assert ended.returncode == 78
    assert "'kv_blocks' is 8 and 'devices' is not set" in ended.stderr
