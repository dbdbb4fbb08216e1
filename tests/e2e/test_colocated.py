"""Both roles of the device pipeline in one process per device, on the CPU and on GPUs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from step3rt import LLM, LocalCluster, SamplingParams
from step3rt.config import ServeConfig
from step3rt.errors import ConfigError
from tests.e2e.clusters import (
    PATIENCE_S,
    assert_all_blocks_return,
    pid_of,
    snapshot,
    wait_until,
)
from tests.e2e.commands import Commands, Running, run
from tests.e2e.device_clusters import (
    SETTINGS,
    Texts,
    assert_same_while_decided,
    device_cluster,
    generate,
    generate_through_a_kill,
    setting_flags,
)
from tests.fixtures.device_reference import assert_agrees, reference_decoder
from tests.fixtures.failing_role import MESSAGE
from tests.kernels.decoder_inputs import NANO

pytestmark = pytest.mark.usefixtures("one_thread")

MANY_TOKENS = 108
"""As many as all prompts have room for: GPUs give them in a fraction of a second."""

ENDED_WITHIN_S = 30.0
"""After a signal."""


def assert_one_process_has_both_roles(cluster: LocalCluster, num_processes: int) -> None:
    roles: dict[int, list[str]] = {}
    for item in cluster.instances():
        roles.setdefault(int(str(item["pid"])), []).append(str(item["role"]))
    assert sorted(map(sorted, roles.values())) == [["attention", "ffn"]] * num_processes


@dataclass(slots=True)
class Drained:
    """One process, started as an operator does, what it gave, and how it ended at a signal."""

    commands: Commands
    coordinator: Running
    node: Running
    texts: Texts
    exit_code: int


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drained]:
    """Its coordinator goes on, without an instance."""
    with Commands(tmp_path_factory.mktemp("one")) as commands:
        coordinator = commands.serve(NANO, *setting_flags(SETTINGS))
        node = commands.node("colocated", NANO, coordinator, "--device=cpu")
        texts = generate(coordinator)
        node.process.terminate()
        exit_code = node.process.wait(ENDED_WITHIN_S)
        yield Drained(commands, coordinator, node, texts, exit_code)


def test_one_process_gives_the_decoders_tokens_and_drains_at_a_signal(drained: Drained) -> None:
    assert_agrees(reference_decoder(), drained.texts)
    assert drained.exit_code == 0, drained.node.output()
    assert drained.node.output().count("Stopped, as it was told") == 2


def test_a_process_outlives_a_killed_coordinator_and_serves_the_next_one(drained: Drained) -> None:
    first = drained.coordinator
    node = drained.commands.node("colocated", NANO, first, "--device=cpu")
    wait_until(lambda: snapshot(first.control_address)["is_serving"], "serving")
    first.process.kill()
    first.process.wait()
    addresses = {"listen": first.address, "control-listen": first.control_address}
    second = drained.commands.serve(NANO, *setting_flags({**SETTINGS, **addresses}))
    # One rank: tokens do not depend on batch mates, not even in the last bit.
    assert generate(second) == drained.texts
    assert node.process.poll() is None
    second.process.terminate()
    assert second.process.wait(ENDED_WITHIN_S) == 0
    assert node.process.wait(ENDED_WITHIN_S) == 0, node.output()


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_no_half_of_a_process_lives_on_when_the_other_fails(commands: Commands, role: str) -> None:
    coordinator = commands.serve(NANO, *setting_flags(SETTINGS))
    arguments = [role, str(NANO), coordinator.control_address]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.failing_role", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert MESSAGE in ended.stderr
    wait_until(
        lambda: all(
            item["state"] not in ("ready", "loading")
            for item in snapshot(coordinator.control_address)["instances"]
        ),
        "the loss of both instances",
    )


def test_a_process_that_no_coordinator_takes_ends_with_one_error(commands: Commands) -> None:
    coordinator = commands.serve(NANO)  # in float32: no device computes that
    node = commands.node("colocated", NANO, coordinator, "--device=cpu")
    assert node.process.wait(PATIENCE_S) == 78
    assert "compute_dtype is float32" in node.output().strip().splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_one_process(commands: Commands) -> None:
    coordinator = commands.serve(NANO, *setting_flags(SETTINGS))
    first = commands.node("colocated", NANO, coordinator, "--device=cuda:0")
    wait_until(lambda: snapshot(coordinator.control_address)["is_serving"], "serving")
    second = commands.node("colocated", NANO, coordinator, "--device=cuda:0")
    assert second.process.wait(PATIENCE_S) == 69
    assert "Another colocated process has cuda" in second.output()
    assert first.process.poll() is None


@pytest.fixture(scope="module")
def two() -> Iterator[LocalCluster]:
    """Two processes; every test here leaves it whole again."""
    with device_cluster(2, 2, placement="colocated") as cluster:
        yield cluster


def test_two_processes_give_the_same_tokens(two: LocalCluster) -> None:
    assert_one_process_has_both_roles(two, 2)
    assert_agrees(reference_decoder(), generate(two))
    assert_all_blocks_return(two)


def test_streams_go_on_after_a_process_is_killed_and_replaced(two: LocalCluster) -> None:
    pids = {item["pid"] for item in two.instances()}
    texts, _ = generate_through_a_kill(two, pid_of(two, "attention"), "colocated")
    assert_agrees(reference_decoder(), texts)
    wait_until(lambda: sum(item["state"] == "ready" for item in two.instances()) == 4, "the return")
    assert_one_process_has_both_roles(two, 2)
    assert len(pids & {item["pid"] for item in two.instances()}) == 1, "the other one lived on"
    assert_all_blocks_return(two)


def test_four_processes_give_the_same_tokens() -> None:
    with device_cluster(4, 4, placement="colocated") as cluster:
        assert_one_process_has_both_roles(cluster, 4)
        texts = generate(cluster)
    assert_agrees(reference_decoder(), texts)


@pytest.mark.parametrize(
    ("num_devices", "kill"),
    [
        pytest.param(1, False, marks=pytest.mark.gpu),
        pytest.param(2, True, marks=pytest.mark.multi_gpu),
        pytest.param(4, True, marks=pytest.mark.multi_gpu),
    ],
)
def test_gpus_give_the_same_tokens(num_devices: int, kill: bool) -> None:
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"{num_devices} GPUs are needed")
    devices = [f"cuda:{index}" for index in range(num_devices)]
    with device_cluster(1, 1) as smallest:
        expected = generate(smallest)
    with device_cluster(num_devices, num_devices, devices, "colocated") as cluster:
        assert_one_process_has_both_roles(cluster, num_devices)
        texts = generate(cluster)
        if kill:
            pid = pid_of(cluster, "ffn")
            killed, _ = generate_through_a_kill(cluster, pid, "colocated", MANY_TOKENS)
            assert_agrees(reference_decoder(), killed)
    assert_agrees(reference_decoder(), texts)
    assert_same_while_decided(expected, texts)


def test_the_sdk_and_generate_take_the_placement(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in SETTINGS.items()]
    file.write_text("\n".join([*lines, 'placement = "colocated"', 'devices = ["cpu"]']) + "\n")
    prompt, params = [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    ended = run(
        "generate", "--model=nano", f"--config={file}", "--output=json", "--ignore-eos",
        "--prompt-token-ids=5,6,7,8", "--temperature=0", "--max-tokens=6",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    [result] = report["results"]
    assert len({item["pid"] for item in report["topology"]["instances"]}) == 1
    with LLM(
        placement="colocated", devices=["cpu"], dtype="bfloat16", precision="production", lanes=1
    ) as llm:
        [output] = llm.generate([prompt], params)
    # One rank: tokens do not depend on the lanes.
    assert output.outputs[0].token_ids == result["token_ids"]
    assert_agrees(reference_decoder(), [(prompt, result["token_ids"])])


@pytest.mark.parametrize(
    ("settings", "devices", "message"),
    [
        ({"attention": 2, "ffn": 1}, ["cpu"], "2 attention and 1 FFN instances"),
        ({}, ["reference"], "a device is 'reference'"),
        ({}, [], "on 0 devices"),
        ({"attention": 2, "ffn": 2}, ["cuda:0"], "2 processes on cuda:0"),
    ],
)
def test_placements_that_cannot_be_are_refused(
    settings: dict[str, int], devices: list[str], message: str
) -> None:
    serve = ServeConfig(model=NANO, **settings)
    with pytest.raises(ConfigError, match=message):
        LocalCluster(serve, placement="colocated", devices=devices)
