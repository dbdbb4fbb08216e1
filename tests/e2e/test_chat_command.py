"""`step3rt chat` and `step3rt doctor` against a coordinator that runs."""

import json
import os
import subprocess
import sys

import pytest

from step3rt import LocalCluster
from tests.e2e.clusters import PATIENCE_S
from tests.e2e.commands import free_address, run


def test_chat_answers_each_line_until_an_empty_one(chat_cluster: LocalCluster) -> None:
    ended = run(
        "chat", f"--address={chat_cluster.address}", "--system=be brief", "--temperature=0",
        "--max-tokens=8", stdin="hi\nand now?\n\nnever read\n",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("> ") >= 3
    assert f"chat at {chat_cluster.address}" in ended.stderr
    assert "error" not in ended.stderr


def test_chat_ends_well_at_the_end_of_its_input(chat_cluster: LocalCluster) -> None:
    ended = run(
        "chat", f"--address={chat_cluster.address}", "--temperature=0", "--max-tokens=2",
        stdin="hi",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("> \n"), "the shell's prompt begins a line of its own"


@pytest.mark.parametrize(
    ("pipe", "num_turns"),
    [("<&-", 0), (r"""printf 'caf\351\n' |""", 1)],
    ids=["no standard input", "bytes that are no text"],
)
def test_chat_takes_whatever_its_input_is(
    chat_cluster: LocalCluster, pipe: str, num_turns: int
) -> None:
    command = f"'{sys.executable}' -m step3rt chat --address={chat_cluster.address} --max-tokens=2"
    shell = f"{pipe} {command}" if pipe.endswith("|") else f"{command} {pipe}"
    # The error handler of every locale but C's.
    ended = subprocess.run(
        ["sh", "-c", shell],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == f"chat at {chat_cluster.address}\n"
    assert ended.stdout.count("\n") >= num_turns


def test_a_turn_that_is_refused_does_not_end_the_chat(chat_cluster: LocalCluster) -> None:
    ended = run(
        "chat", f"--address={chat_cluster.address}", "--temperature=0", "--max-tokens=4",
        stdin=f"{'long ' * 300}\nhi\n\n",
    )  # fmt: skip
    assert ended.returncode == 0
    [error] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "1024" in error


def test_chat_without_a_coordinator_is_exit_code_69() -> None:
    ended = run("chat", f"--address={free_address()}", stdin="hi\n")
    assert ended.returncode == 69
    assert "Traceback" not in ended.stderr


def test_doctor_sees_the_coordinator(chat_cluster: LocalCluster) -> None:
    ended = run("doctor", "--json", f"--control-address={chat_cluster.control_address}")
    findings = {item["subject"]: item for item in json.loads(ended.stdout)}
    assert findings["coordinator"]["level"] == "ok"
    assert findings["coordinator"]["found"].startswith("serving: 1 of 1 attention")
    for fabric in ("shm", "tcp"):
        assert findings[fabric]["level"] == "ok"
    assert ended.returncode == 0


@pytest.mark.parametrize("is_json", [False, True])
def test_doctor_fails_when_the_coordinator_is_missing(is_json: bool) -> None:
    address = free_address()
    flags = ["--json"] if is_json else []
    ended = run("doctor", f"--control-address={address}", *flags)
    assert ended.returncode == 1
    assert "step3rt serve MODEL" in ended.stdout
    assert address in ended.stdout
