"""Clusters that several end-to-end tests share: to start one costs more than all they ask of it.

A test that harms its cluster starts one of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from step3rt import Client, LocalCluster
    from tests.e2e.commands import Commands
    from tests.fixtures.checkpoint import Checkpoint
    from tests.oracle.step3_numpy import Step3Oracle

# Starting a cluster imports torch once per instance: seconds each, many on a busy machine.
START_TIMEOUT_S = 400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests that may start clusters the time for it."""
    for item in items:
        if "tests/e2e" in item.path.as_posix() and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))


@pytest.fixture(scope="module")
def one_thread() -> "Iterator[None]":
    """Has torch compute in one thread, beside the instances of the module's clusters."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chat_cluster(chat_checkpoint: "Checkpoint") -> "Iterator[LocalCluster]":
    """1A1F with a tokenizer, 64 KV blocks and a context of 1,024 tokens, for any good use."""
    from tests.e2e.clusters import running_cluster

    with running_cluster(chat_checkpoint.directory, model_name="chat") as cluster:
        yield cluster


@pytest.fixture
def client(chat_cluster: "LocalCluster") -> "Iterator[Client]":
    """A client of `chat_cluster`."""
    from step3rt import Client

    with Client(chat_cluster.address) as connected:
        yield connected


@pytest.fixture(scope="session")
def chat_oracle(chat_checkpoint: "Checkpoint") -> "Step3Oracle":
    """The float64 model of `chat_checkpoint`."""
    from tests.oracle.step3_numpy import Step3Oracle

    return Step3Oracle.load(chat_checkpoint.directory)


@pytest.fixture
def commands(tmp_path: Path) -> "Iterator[Commands]":
    """Starts `step3rt` commands that do not outlive the test."""
    from tests.e2e.commands import Commands

    with Commands(tmp_path) as running:
        yield running


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose temporary directory is the test's own, to see what is left in it.

    The directory's name also marks every process that inherits the environment.
    """
    directory = tmp_path_factory.mktemp("tmpdir")
    return {**os.environ, "TMPDIR": str(directory), "STEP3RT_NO_PROGRESS": "1"}
