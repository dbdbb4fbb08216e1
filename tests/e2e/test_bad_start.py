"""What cannot start says why in one line and exits with 78; what is missing is waited for."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from step3rt import Client, LocalCluster
from step3rt.config import ServeConfig
from step3rt.errors import ConfigError, Unavailable
from tests.e2e.clusters import PATIENCE_S, snapshot, wait_until
from tests.e2e.commands import Commands, free_address, run
from tests.fixtures import corruption
from tests.fixtures.checkpoint import Checkpoint

EX_UNAVAILABLE = 69
EX_CONFIG = 78


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_an_address_that_cannot_be_had_yet_is_not_a_wrong_setting(
    tiny_checkpoint: Checkpoint, commands: Commands
) -> None:
    # 192.0.2.0/24 is nobody's. A service manager tries again unless it reads 78.
    ended = run("serve", f"--listen={free_address()}", "--control-listen=192.0.2.1:0",
                "--insecure-bind", str(tiny_checkpoint.directory))  # fmt: skip
    assert (ended.returncode, "cannot be bound" in last_line(ended.stderr)) == (
        EX_UNAVAILABLE,
        True,
    )
    coordinator = commands.serve(tiny_checkpoint.directory, "--fabric=tcp")
    ended = run("node", "ffn", f"--model={tiny_checkpoint.directory}", "--data-host=192.0.2.1",
                f"--coordinator={coordinator.control_address}")  # fmt: skip
    assert (ended.returncode, "cannot be bound" in last_line(ended.stderr)) == (1, True)


def health(address: str, service: str = "") -> str:
    """What grpc.health.v1 says."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def assert_names(damage: corruption.Damage, ended: "subprocess.CompletedProcess[str]") -> None:
    """One line of error with file and tensor, and the exit code for bad configuration."""
    assert ended.returncode == EX_CONFIG
    assert ended.stdout == ""
    line = last_line(ended.stderr)
    assert line.startswith("error: ")
    assert damage.file_name in line
    assert damage.tensor_name is None or damage.tensor_name in line
    assert "Traceback" not in ended.stderr


def test_a_damaged_checkpoint_ends_a_whole_cluster_with_file_and_reason(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    damage = corruption.damaged_copy(tiny_checkpoint.directory, model, corruption.truncated_data)
    assert_names(damage, run("generate", f"--model={model}", "--prompt-token-ids=1,2"))


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_damaged_checkpoint_ends_an_instance_with_file_and_tensor(
    tiny_checkpoint: Checkpoint, tmp_path: Path, role: str
) -> None:
    model = tmp_path / "model"
    damage = corruption.damaged_copy(tiny_checkpoint.directory, model, corruption.dims_overflow)
    assert damage.tensor_name is not None
    assert_names(damage, run("node", role, f"--model={model}"))


def test_a_checkpoint_whose_expert_is_missing_ends_its_ffn_instance_with_the_tensor(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def remove(directory: Path) -> corruption.Damage:
        path = directory / corruption.SINGLE_FILE_NAME
        raw = corruption.RawFile.read(path)
        corruption.remove_tensor(raw, corruption.EXPERTS_TARGET)
        raw.write(path)
        return corruption.Damage(corruption.SINGLE_FILE_NAME, corruption.EXPERTS_TARGET)

    corruption.damaged_copy(tiny_checkpoint.directory, tmp_path / "model", remove)
    serve = ServeConfig(model=tmp_path / "model", listen="127.0.0.1:0")
    with pytest.raises(ConfigError, match=corruption.EXPERTS_TARGET), LocalCluster(serve):
        pass


def test_another_revision_of_the_model_is_refused_and_the_same_elsewhere_is_not(
    commands: Commands, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def another_revision(directory: Path) -> corruption.Damage:
        path = directory / corruption.SINGLE_FILE_NAME
        raw = corruption.RawFile.read(path)
        begin, _ = raw.header[corruption.TARGET]["data_offsets"]
        raw.data = raw.data[:begin] + bytes([raw.data[begin] ^ 1]) + raw.data[begin + 1 :]
        raw.write(path)
        return corruption.Damage(corruption.SINGLE_FILE_NAME, corruption.TARGET)

    source = tiny_checkpoint.directory
    corruption.damaged_copy(source, tmp_path / "other", another_revision)
    shutil.copytree(source, tmp_path / "same", copy_function=shutil.copyfile)
    coordinator = commands.serve(source)

    def num_ready() -> int:
        instances = snapshot(coordinator.control_address)["instances"]
        return sum(item["state"] == "ready" for item in instances)

    commands.node("ffn", source, coordinator)
    wait_until(lambda: num_ready() == 1, "the FFN instance")
    refused = commands.node("attention", tmp_path / "other", coordinator)
    assert refused.process.wait(PATIENCE_S) == EX_CONFIG, refused.output()
    assert "Give every instance the same checkpoint" in last_line(refused.output())
    commands.node("attention", tmp_path / "same", coordinator)
    wait_until(lambda: num_ready() == 2, "the attention instance")
    wait_until(lambda: health(coordinator.address) == "SERVING", "serving")


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_a_model_that_does_not_exist_is_said_so(command: str, tmp_path: Path) -> None:
    model = str(tmp_path / "nowhere")
    arguments = [model] if command == "serve" else [f"--model={model}", "text"]
    ended = run(command, *arguments)
    assert ended.returncode == EX_CONFIG
    assert model in last_line(ended.stderr)


def test_an_instance_with_an_unreadable_config_ends_with_the_file(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def cut(directory: Path) -> corruption.Damage:
        os.truncate(directory / "config.json", 40)
        return corruption.Damage("config.json")

    corruption.damaged_copy(tiny_checkpoint.directory, tmp_path / "model", cut)
    for arguments in (
        ("serve", str(tmp_path / "model"), "--listen=127.0.0.1:0", "--control-listen=127.0.0.1:0"),
        ("node", "ffn", f"--model={tmp_path / 'model'}"),
    ):
        ended = run(*arguments)
        assert ended.returncode == EX_CONFIG, ended.stderr
        assert "config.json" in last_line(ended.stderr)
        assert "Traceback" not in ended.stderr


def test_a_ready_file_that_cannot_be_written_is_said_in_one_line(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "nowhere" / "ready.json", tmp_path / "taken"):
        listen = ("--listen=127.0.0.1:0", "--control-listen=127.0.0.1:0")
        ended = run("serve", str(tiny_checkpoint.directory), *listen, f"--ready-file={path}")
        assert ended.returncode == EX_CONFIG
        [line] = ended.stderr.strip().splitlines()
        assert line.startswith(f"error: ready_file = {path} cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"], "and nothing is left"


@pytest.mark.parametrize("flag", ["--listen", "--control-listen"])
def test_a_port_in_use_is_said_so(tiny_checkpoint: Checkpoint, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        others = [f"{other}=127.0.0.1:0" for other in ("--listen", "--control-listen")]
        ended = run("serve", str(tiny_checkpoint.directory), *others, f"{flag}={address}")
    assert ended.returncode == EX_UNAVAILABLE, (
        "whoever has it may go: a service manager tries again"
    )
    line = last_line(ended.stderr)
    assert address in line
    assert "in use" in line


@pytest.mark.parametrize("flag", ["--listen", "--control-listen"])
def test_an_address_beyond_this_host_is_refused(tiny_checkpoint: Checkpoint, flag: str) -> None:
    others = [f"{other}=127.0.0.1:0" for other in ("--listen", "--control-listen")]
    ended = run("serve", str(tiny_checkpoint.directory), *others, f"{flag}=0.0.0.0:0")
    assert ended.returncode == EX_CONFIG
    assert "insecure_bind" in last_line(ended.stderr).replace("-", "_")


def test_an_unknown_key_of_a_file_is_an_error_with_the_nearest_name(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f'model = "{tiny_checkpoint.directory}"\nlane = 2\n', encoding="utf-8")
    ended = run("serve", f"--config={file}")
    assert ended.returncode == EX_CONFIG
    line = last_line(ended.stderr)
    assert "'lane'" in line
    assert "'lanes'" in line
    assert str(file) in line


def test_without_an_ffn_instance_requests_are_told_to_wait_until_one_comes(
    tiny_checkpoint: Checkpoint, commands: Commands
) -> None:
    model = tiny_checkpoint.directory
    coordinator = commands.serve(model)
    commands.node("attention", model, coordinator)
    wait_until(
        lambda: (
            [item["state"] for item in snapshot(coordinator.control_address)["instances"]]
            == ["ready"]
        ),
        "the attention instance",
    )
    with Client(coordinator.address) as client:
        with pytest.raises(Unavailable, match="FFN") as caught:
            client.generate([1, 2], timeout_s=2).result()
        assert caught.value.reason == "ENGINE_NOT_READY"
        assert caught.value.is_retryable
        assert caught.value.retry_after_s is not None
        for service in ("", "step3rt.v1.InferenceService"):
            assert health(coordinator.address, service) == "NOT_SERVING"
        assert client.model_info().vocab_size == 256

        commands.node("ffn", model, coordinator)
        wait_until(lambda: health(coordinator.address) == "SERVING", "serving")
        assert len(client.generate([1, 2], max_tokens=3).result().outputs[0].token_ids) == 3


def test_an_instance_of_another_model_is_refused(
    tiny_checkpoint: Checkpoint, chat_checkpoint: Checkpoint, commands: Commands
) -> None:
    coordinator = commands.serve(tiny_checkpoint.directory)
    stranger = commands.node("ffn", chat_checkpoint.directory, coordinator)
    assert stranger.process.wait(120) == EX_CONFIG
    assert last_line(stranger.output()).startswith("error: ")


def test_an_instance_without_a_coordinator_gives_up_as_unavailable(
    tiny_checkpoint: Checkpoint,
) -> None:
    address = free_address()
    ended = run(
        "node", "ffn", f"--model={tiny_checkpoint.directory}", f"--coordinator={address}",
        "--connect-timeout-s=0.5",
    )  # fmt: skip
    assert ended.returncode == 69
    assert f"Looking for the coordinator at {address}, for up to 0.5 s" in ended.stderr
    assert address in last_line(ended.stderr)
