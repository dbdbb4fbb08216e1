"""nano on two attention and two FFN processes over a real RDMA device, against shared memory.

Owns how instances are started where a processor is emulated; `make test-rdma` runs it there.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from step3rt import Client, SamplingParams
from step3rt.config import resolve_model
from tests.e2e.clusters import snapshot, wait_until
from tests.e2e.commands import Commands

# An emulated processor takes a minute for what a real one does in seconds.
pytestmark = [pytest.mark.rdma, pytest.mark.timeout(900)]
START_TIMEOUT_S = 400.0

PROMPT = "It was a fine morning"
TOKENS = 16
HOST = os.environ.get("STEP3RT_RDMA_HOST", "127.0.0.1")


def _run(arguments: list[str], log: str) -> None:
    """The whole life of an instance's process."""
    with Path(log).open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    from step3rt.cli import main

    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Makes processes by forking one that has imported torch, for importing takes the longest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["step3rt.cli", "step3rt.instance", "torch"])
    return context


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Starts coordinators that do not outlive the test."""
    with Commands(tmp_path) as running:
        yield running


def _generate(
    forks: ForkServerContext, commands: Commands, fabric: str
) -> tuple[list[int], list[dict[str, Any]]]:
    """The tokens that nano continues `PROMPT` with, and what its links are."""
    model = resolve_model(Path("nano"))
    # Leases of the default length would end where a heartbeat takes seconds.
    coordinator = commands.serve(
        model, "--attention=2", "--ffn=2", f"--fabric={fabric}", "--lease-ms=60000",
        "--step-timeout-ms=300000",
    )  # fmt: skip
    logs = [str(commands.directory / f"{fabric}-{number}.log") for number in range(4)]
    instances = []
    for log, role in zip(logs, ("ffn", "ffn", "attention", "attention"), strict=True):
        arguments = [
            "node", role, f"--model={model}", f"--coordinator={coordinator.control_address}",
            f"--data-host={HOST}", "--kv-blocks=64", "--threads=1",
        ]  # fmt: skip
        instances.append(forks.Process(target=_run, args=(arguments, log)))
    try:
        for instance in instances:
            instance.start()

        def is_serving() -> bool:
            for instance, log in zip(instances, logs, strict=True):
                assert instance.is_alive(), Path(log).read_text(encoding="utf-8")
            return bool(snapshot(coordinator.control_address)["is_serving"])

        wait_until(is_serving, "the start of the cluster", START_TIMEOUT_S)
        seen = snapshot(coordinator.control_address)["instances"]
        links = [link for instance in seen for link in instance["links"]]
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        with Client(coordinator.address) as client, client.generate(PROMPT, params) as stream:
            for _event in stream:
                pass
            return stream.result().outputs[0].token_ids, links
    finally:
        for instance in instances:
            if instance.pid is not None:
                instance.kill()
                instance.join()


def test_tokens_over_rdma_are_those_over_shared_memory(
    forks: ForkServerContext, commands: Commands
) -> None:
    expected, _links = _generate(forks, commands, "shm")
    assert len(expected) == TOKENS
    tokens, links = _generate(forks, commands, "rdma")
    assert [link["fabric"] for link in links] == ["rdma"] * 4
    devices = [device.name for device in Path("/sys/class/infiniband").iterdir()]
    for link in links:
        assert link["reason"].startswith("chosen by the `fabric` setting; ")
        assert any(f"; {device} port 1, GID " in link["reason"] for device in devices)
        if HOST != "127.0.0.1":
            assert link["reason"].endswith(", the address of the control connection")
    assert tokens == expected
