"""SIGTERM drains: running streams finish, new ones are refused, and nothing is left."""

import os
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from step3rt import Client, LocalCluster, RequestOutput
from step3rt.config import ServeConfig
from step3rt.errors import Unavailable
from tests.e2e.clusters import is_running, processes_with, running_cluster, snapshot, wait_until
from tests.e2e.commands import Commands
from tests.fixtures.checkpoint import Checkpoint


def shared_memory_of(pid: int) -> list[str]:
    """Memfds that a process maps."""
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if "memfd:" in line]
    return []


def test_sigterm_lets_running_streams_finish_and_refuses_new_ones(
    tiny_checkpoint: Checkpoint, commands: Commands, tmp_path: Path
) -> None:
    model = tiny_checkpoint.directory
    coordinator = commands.serve(model)
    nodes = [commands.node(role, model, coordinator) for role in ("ffn", "attention")]
    wait_until(lambda: snapshot(coordinator.control_address)["is_serving"], "serving")
    assert all(shared_memory_of(node.process.pid) for node in nodes), "the fabric is shared memory"
    shm_before = set(Path("/dev/shm").iterdir())

    outputs: list[RequestOutput] = []
    with Client(coordinator.address) as client, Client(coordinator.address) as late:
        late.model_info()
        stream = client.generate([10], temperature=0, max_tokens=400, ignore_eos=True)
        next(stream)
        reader = threading.Thread(target=lambda: outputs.append(stream.result()))
        reader.start()
        coordinator.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "rain" in coordinator.output(), "the drain")
        with pytest.raises(Unavailable) as caught:
            late.generate([10], max_tokens=1, timeout_s=2).result()
        assert caught.value.reason == "DRAINING"
        assert reader.is_alive(), "the running stream goes on meanwhile"
        reader.join(120)
    assert len(outputs[0].outputs[0].token_ids) == 400
    assert outputs[0].outputs[0].finish_reason == "length"

    assert coordinator.process.wait(60) == 0
    assert [node.process.wait(60) for node in nodes] == [0, 0]
    # Others on the machine make files there, too, which come and go.
    wait_until(lambda: set(Path("/dev/shm").iterdir()) <= shm_before, "the end of shared memory")
    assert not list(tmp_path.rglob("*.sock"))


def test_a_drain_that_takes_too_long_ends_streams_as_draining(
    tiny_checkpoint: Checkpoint, commands: Commands
) -> None:
    model = tiny_checkpoint.directory
    coordinator = commands.serve(model, "--drain-timeout-s=0.2")
    nodes = [commands.node(role, model, coordinator) for role in ("ffn", "attention")]
    wait_until(lambda: snapshot(coordinator.control_address)["is_serving"], "serving")
    with Client(coordinator.address) as client:
        stream = client.generate([10], temperature=0, max_tokens=1000, ignore_eos=True)
        next(stream)
        coordinator.process.send_signal(signal.SIGTERM)
        with pytest.raises(Unavailable) as caught:
            stream.result()
    assert caught.value.reason == "DRAINING"
    assert coordinator.process.wait(60) == 0
    assert [node.process.wait(60) for node in nodes] == [0, 0]


def test_leaving_a_local_cluster_leaves_no_process_and_no_file(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with running_cluster(tiny_checkpoint.directory) as cluster:
        marker = f"--exit-with-parent={os.getpid()}"
        pids = [int(str(item["pid"])) for item in cluster.instances()]
        assert set(pids) < set(processes_with(marker))
        begun = time.monotonic()
        cluster.close()
        elapsed_s = time.monotonic() - begun
    assert not any(is_running(pid) for pid in pids)
    assert not set(pids) & set(processes_with(marker))
    assert list(tmp_path.iterdir()) == []
    assert elapsed_s < 10, "nobody had to be killed"


def test_a_cluster_outlives_the_thread_that_made_it(tiny_checkpoint: Checkpoint) -> None:
    made: list[LocalCluster] = []
    serve = ServeConfig(model=tiny_checkpoint.directory, listen="127.0.0.1:0")
    maker = threading.Thread(target=lambda: made.append(LocalCluster(serve, kv_blocks=64)))
    maker.start()
    maker.join()
    [cluster] = made
    with cluster, Client(cluster.address) as client:
        pids = [item["pid"] for item in cluster.instances()]
        # A child that the kernel ends with its thread is gone by the time that an answer takes.
        for _ in range(3):
            assert client.generate([10], max_tokens=2, ignore_eos=True).result().finished
        cluster.check()
        assert [item["pid"] for item in cluster.instances()] == pids


def test_a_dead_child_is_reported_with_its_log(tiny_checkpoint: Checkpoint) -> None:
    with running_cluster(tiny_checkpoint.directory) as cluster:
        cluster.check()
        [ffn] = [item for item in cluster.instances() if item["role"] == "ffn"]
        os.kill(int(str(ffn["pid"])), signal.SIGKILL)

        def has_failed() -> bool:
            try:
                cluster.check()
            except Unavailable as error:
                return "ffn-0" in str(error)
            return False

        wait_until(has_failed, "the report")
