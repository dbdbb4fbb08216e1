"""`step3rt generate`: the interface that other programs compare against, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from step3rt import LocalCluster
from tests.e2e.clusters import processes_with, wait_until
from tests.e2e.commands import COMMAND, free_address, run
from tests.e2e.reference import TOLERANCE, expected
from tests.fixtures.checkpoint import Checkpoint
from tests.oracle.step3_numpy import Step3Oracle

PROMPTS = ([10, 20, 30], [9] * 70)


@pytest.fixture(scope="module")
def answer(tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON object of two prompts on 2A2F, from a checkpoint without a tokenizer."""
    ended = run(
        "generate", f"--model={tiny_checkpoint.directory}", "--attention=2", "--ffn=2",
        "--lanes=3", "--fabric=shm", "--dtype=float32",
        *(f"--prompt-token-ids={','.join(map(str, prompt))}" for prompt in PROMPTS),
        "--max-tokens=8", "--temperature=0", "--logprobs=5", "--prompt-logprobs=0", "--ignore-eos",
        "--output=json", "--kv-blocks=64",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    [line] = ended.stdout.splitlines()
    return dict(json.loads(line))


def test_json_has_a_result_for_each_prompt_in_order(
    answer: dict[str, Any], tiny_oracle: Step3Oracle
) -> None:
    assert [item["prompt_token_ids"] for item in answer["results"]] == list(PROMPTS)
    for prompt, result in zip(PROMPTS, answer["results"], strict=True):
        assert result["finish_reason"] == "length"
        assert len(result["token_ids"]) == 8
        rows = expected(tiny_oracle, prompt, result["token_ids"]).rows
        for position, item in enumerate(result["logprobs"]):
            row = rows[len(prompt) - 1 + position]
            assert item["token_id"] == result["token_ids"][position] == row.argmax()
            assert abs(item["logprob"] - row.max()) < TOLERANCE
            assert len(item["top"]) == 5
            for token_id, logprob in item["top"]:
                assert isinstance(token_id, int)
                assert abs(logprob - row[token_id]) < TOLERANCE
        assert [item["token_id"] for item in result["prompt_logprobs"]] == prompt[1:]
        for position, item in enumerate(result["prompt_logprobs"]):
            assert abs(item["logprob"] - rows[position][item["token_id"]]) < TOLERANCE


def test_json_tells_the_topology_and_what_each_pair_chose(answer: dict[str, Any]) -> None:
    assert answer.keys() == {"results", "topology", "timing"}
    topology = answer["topology"]
    settings = {"attention": 2, "ffn": 2, "lanes": 3, "fabric": "shm", "dtype": "float32"}
    assert {name: topology[name] for name in settings} == settings
    instances = topology["instances"]
    assert sorted((item["role"], item["role_rank"]) for item in instances) == [
        ("attention", 0),
        ("attention", 1),
        ("ffn", 0),
        ("ffn", 1),
    ]
    links = [link for item in instances for link in item["links"]]
    assert [link["fabric"] for link in links] == ["shm"] * 4
    assert all(link["reason"] for link in links)


def test_json_claims_no_settings_of_a_cluster_that_it_did_not_start(
    chat_cluster: LocalCluster,
) -> None:
    ended = run(
        "generate", f"--address={chat_cluster.address}", "--prompt-token-ids=10",
        "--max-tokens=1", "--output=json",
    )  # fmt: skip
    assert json.loads(ended.stdout)["topology"] == {"address": chat_cluster.address}


def test_json_tells_the_times(answer: dict[str, Any]) -> None:
    timing = answer["timing"]
    assert timing["tokens"] == 16
    assert timing["start_s"] > 0
    assert timing["elapsed_s"] > 0
    assert timing["tokens_per_s"] == pytest.approx(16 / timing["elapsed_s"])
    for name in ("ttft_ms", "tpot_ms"):
        assert 0 < timing[name]["p50"] <= timing[name]["p99"]


def test_without_a_tokenizer_token_ids_are_printed_apart(
    tiny_checkpoint: Checkpoint, tiny_oracle: Step3Oracle
) -> None:
    ended = run(
        "generate", f"--model={tiny_checkpoint.directory}", "--prompt-token-ids=10,20,30",
        "--max-tokens=4", "--temperature=0", "--ignore-eos", "--kv-blocks=64",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    token_ids = [int(word) for word in ended.stdout.split()]
    rows = expected(tiny_oracle, [10, 20, 30], token_ids).rows
    assert token_ids == [int(row.argmax()) for row in rows[2:6]]


def test_a_log_directory_that_cannot_be_made_is_exit_code_78() -> None:
    ended = run("generate", "--log-dir=/proc/no-such", "hi")
    assert ended.returncode == 78
    assert "'/proc/no-such' cannot be made" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_several_continuations_of_text_are_printed_under_their_prompts(
    chat_cluster: LocalCluster,
) -> None:
    ended = run(
        "generate", f"--address={chat_cluster.address}", "--max-tokens=5", "--temperature=0",
        "--ignore-eos", "the", "thing",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    headings = [line for line in ended.stdout.splitlines() if line.startswith("--- ")]
    assert headings == ["--- the", "--- thing"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "No prompt"),
        (["--prompt-token-ids=1,x"], "'1,x'"),
        (["--prompt-token-ids=1", "--dtype=float16"], "float16"),
        (["--prompt-token-ids=1", "--max-tokens=-1"], "max_tokens"),
        (["--prompt-token-ids=1", "--ffn=3"], "--ffn was given with --address"),
        (["--prompt-token-ids=1", "--kv-blocks=3"], "--kv-blocks was given with --address"),
        (["--prompt-token-ids=1", "--model=other"], "--model was given with --address"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    chat_cluster: LocalCluster, arguments: list[str], words: str
) -> None:
    ended = run("generate", f"--address={chat_cluster.address}", *arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_request_that_the_server_refuses_is_exit_code_2_with_its_words(
    chat_cluster: LocalCluster,
) -> None:
    ended = run("generate", f"--address={chat_cluster.address}", "--prompt-token-ids=1,5000")
    assert ended.returncode == 2
    assert "5000" in ended.stderr.splitlines()[-1]


def test_a_coordinator_that_is_not_there_is_exit_code_69() -> None:
    address = free_address()
    ended = run("generate", f"--address={address}", "--prompt-token-ids=1")
    assert ended.returncode == 69
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


def start_streaming(
    checkpoint: Checkpoint, environment: dict[str, str], *flags: str
) -> "subprocess.Popen[bytes]":
    """A `generate` of its own cluster, in a process group of its own, past its first tokens."""
    process = subprocess.Popen(
        [
            *COMMAND, "generate", f"--model={checkpoint.directory}", "--fabric=shm",
            "--prompt-token-ids=10", "--max-tokens=1000", "--ignore-eos", "--kv-blocks=64", *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        process_group=0,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(5), process.communicate()
    return process


def test_ctrl_c_leaves_no_process_no_file_and_no_shared_memory(
    tiny_checkpoint: Checkpoint, environment: dict[str, str]
) -> None:
    marker = environment["TMPDIR"]
    shm_before = set(Path("/dev/shm").iterdir())
    process = start_streaming(tiny_checkpoint, environment)
    assert len(processes_with(marker)) == 4  # generate, coordinator, attention, FFN
    # A terminal sends it to the foreground group: the command alone, for its children have theirs.
    os.killpg(process.pid, signal.SIGINT)
    # An impatient person presses it again while the cluster is being stopped.
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert processes_with(marker) == {}
    assert list(Path(marker).iterdir()) == []
    # Others on the machine make files there, too, which come and go.
    wait_until(lambda: set(Path("/dev/shm").iterdir()) <= shm_before, "the end of shared memory")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_command_leaves_nothing_either(
    tiny_checkpoint: Checkpoint, environment: dict[str, str], number: signal.Signals
) -> None:
    marker = environment["TMPDIR"]
    process = start_streaming(tiny_checkpoint, environment)
    os.killpg(process.pid, number)
    # Whoever sent it may send it again while the cluster is being stopped.
    time.sleep(0.1)
    os.killpg(process.pid, number)
    _output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
    assert processes_with(marker) == {}
    assert list(Path(marker).iterdir()) == []


def test_ctrl_c_while_the_cluster_starts_leaves_nothing_either(
    tiny_checkpoint: Checkpoint, environment: dict[str, str]
) -> None:
    marker = environment["TMPDIR"]
    process = subprocess.Popen(
        [*COMMAND, "generate", f"--model={tiny_checkpoint.directory}", "--prompt-token-ids=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        process_group=0,
    )
    wait_until(lambda: len(processes_with(marker)) == 4, "the children")
    os.killpg(process.pid, signal.SIGINT)
    _output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert processes_with(marker) == {}
    assert list(Path(marker).iterdir()) == []


def test_a_child_that_dies_ends_the_command_with_its_name(
    tiny_checkpoint: Checkpoint, environment: dict[str, str]
) -> None:
    marker = environment["TMPDIR"]
    process = start_streaming(tiny_checkpoint, environment, "--recovery-timeout-ms=200")
    [ffn] = [pid for pid, command in processes_with(marker).items() if "node ffn" in command]
    os.kill(ffn, signal.SIGKILL)
    _output, errors = process.communicate(timeout=60)
    assert process.returncode == 69
    assert b"ffn-0 process ended with code -9" in errors
    assert b"Traceback" not in errors
    assert processes_with(marker) == {}


def test_a_killed_command_leaves_no_process(
    tiny_checkpoint: Checkpoint, environment: dict[str, str]
) -> None:
    marker = environment["TMPDIR"]
    process = start_streaming(tiny_checkpoint, environment)
    process.kill()
    process.wait()
    wait_until(lambda: processes_with(marker) == {}, "the end of the children", 20)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()


def test_a_reader_that_leaves_early_ends_the_command_quietly(chat_cluster: LocalCluster) -> None:
    process = subprocess.Popen(
        [
            *COMMAND, "generate", f"--address={chat_cluster.address}", "--prompt-token-ids=10",
            "--max-tokens=900", "--ignore-eos", "--temperature=0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(60) == 1
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors
    process.stderr.close()


def test_python_that_imports_only_the_client_never_loads_torch(chat_cluster: LocalCluster) -> None:
    program = (
        "import sys\n"
        "from step3rt import Client\n"
        f"with Client({chat_cluster.address!r}) as client:\n"
        "    client.generate([10], max_tokens=1).result()\n"
        "print('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr
