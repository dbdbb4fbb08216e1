"""The command line as people meet it: help that teaches, versions, and exit codes for mistakes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from step3rt import _core, cli
from step3rt.cli import generate
from step3rt.config import NodeConfig, ServeConfig

EX_USAGE = 2
EX_CONFIG = 78
COMMANDS = ("serve", "node", "generate", "chat", "doctor", "version")


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_shows_how_to_start_and_names_every_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(capsys)
    assert "Start here:" in text
    for command in COMMANDS:
        assert f"step3rt {command}" in text or f"    {command} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_each_of_its_flags(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = help_of(capsys, command)
    assert text.startswith(f"usage: step3rt {command}")
    _usage, *blocks = re.split(r"^  (?=-)", text, flags=re.MULTILINE)
    for block in blocks:
        # A flag with its values, two spaces or a line's end, and what it is for.
        flag, _, explanation = re.sub(r"\s{2,}", "\0", block).partition("\0")
        assert len(explanation) > 5, f"{flag} explains nothing"


@pytest.mark.parametrize(
    ("command", "kind", "positional"),
    [("serve", ServeConfig, "model"), ("node", NodeConfig, "role")],
)
def test_every_setting_has_a_flag(
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: type[ServeConfig] | type[NodeConfig],
    positional: str,
) -> None:
    text = help_of(capsys, command)
    for item in fields(kind):
        if item.name != positional:
            assert f"--{item.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    "arguments", [[], ["sevre"], ["serve", "--lanez=1"], ["node", "gpu"], ["serve", "--ffn=two"]]
)
def test_wrong_usage_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == EX_USAGE
    assert "usage: step3rt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], "'model' is missing"),
        (["serve", "no-such-model"], "'no-such-model' does not exist"),
        (["serve", "nano", "--lanes=0"], "'lanes' is 0"),
        (["serve", "nano", "--lanes=9"], "from 1 to 8"),
        (["serve", "nano", "--listen=nowhere"], "nowhere"),
        (["serve", "--config=/no/such.toml"], "/no/such.toml"),
        (["node", "ffn"], "'model' is missing"),
        (["node", "--model=nano"], "'role' is missing"),
    ],
)
def test_bad_configuration_is_exit_code_78_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(arguments) == EX_CONFIG
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_mistake_in_a_file_is_blamed_on_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "nano"\nmax_waiting_request = 5\n', encoding="utf-8")
    assert cli.main(["serve", f"--config={file}", "--lanes=1"]) == EX_CONFIG
    message = capsys.readouterr().err
    assert str(file) in message
    assert "Did you mean 'max_waiting_requests'?" in message


def test_a_file_and_a_flag_are_judged_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "no-such-model"\nstep_timeout_ms = 1000\n', encoding="utf-8")
    assert cli.main(["serve", f"--config={file}"]) == EX_CONFIG
    assert "'step_timeout_ms' is 1000 and 'lease_ms' is 3000" in capsys.readouterr().err
    assert cli.main(["serve", f"--config={file}", "--lease-ms=1000"]) == EX_CONFIG
    assert "'no-such-model' does not exist" in capsys.readouterr().err


def run_into(stdout: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of the command in a shell that opens `stdout` so."""
    # As users have it: what a command prints is written when the buffer is full, or at its end.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -m step3rt "$@" {stdout}', sys.executable, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("arguments", [("version",), ("serve", "--help"), ("sim", "--seeds=2")])
def test_a_reader_that_reads_nothing_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody_reads:
        ended = subprocess.run(
            [sys.executable, "-m", "step3rt", *arguments],
            env=kept,
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            timeout=100,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(("version",), {}), (("serve", "--help"), {}), (("version",), {"PYTHONUNBUFFERED": "1"})],
)
def test_a_full_disk_is_said_in_one_line(
    arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    code, errors = run_into(">/dev/full", *arguments, **environment)
    assert code == 1
    [line] = errors.splitlines()
    assert line.startswith("error: The operating system refused: No space left on device.")


def test_what_the_terminal_cannot_show_is_replaced() -> None:
    # The help of `serve` has an ellipsis.
    assert run_into("", "serve", "--help", PYTHONIOENCODING="ascii") == (0, "")


def test_a_command_without_standard_output_ends_well() -> None:
    assert run_into(">&-", "version") == (0, "")


def test_version_is_that_of_the_extension_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"step3rt {_core.__version__}\n"
    assert cli.main(["version", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step3rt"] == _core.__version__
    assert report.keys() == {"step3rt", "python", "platform", "packages"}
    assert report["packages"]["grpcio"]
    assert {"cupy-cuda12x", "cupy-cuda13x"} <= report["packages"].keys()


def test_doctor_reports_findings_with_fixes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--model=no-such-model"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert all(item.keys() == {"level", "subject", "found", "fix"} for item in findings)
    by_subject = {item["subject"]: item for item in findings}
    assert {"host", "extension", "shm", "tcp", "rdma", "checkpoint"} <= by_subject.keys()
    assert by_subject["checkpoint"]["level"] == "missing"
    assert "no-such-model" in by_subject["checkpoint"]["found"]

    assert cli.main(["doctor", "--model=nano"]) == 0
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ("node", "ffn", "--model=nano"),
        ("bench", "decode"),
        ("bench", "engine"),
        ("bench", "kernels"),
        ("bench", "link", "--fabric=cuda_ipc"),
    ],
    ids=" ".join,
)
def test_a_command_that_needs_an_extra_names_it(command: tuple[str, ...]) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import step3rt.cli; "
        f"sys.exit(step3rt.cli.main({list(command)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (EX_CONFIG, "")
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'step3rt[worker]'" in done.stderr


@pytest.mark.parametrize("bench", ["engine", "kernels"])
def test_a_bench_that_finds_no_gpu_is_exit_code_69(bench: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "step3rt", "bench", bench],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.returncode, done.stdout) == (os.EX_UNAVAILABLE, "")
    assert re.fullmatch(r"error: No GPU .* was found.*\n", done.stderr)


def test_a_child_whose_parent_is_another_does_not_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Pid 1 is not the parent of this process, as after the death of the one that started it.
    program = "from step3rt.cli import main; raise SystemExit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", program, "serve", "nano", f"--exit-with-parent={os.getppid()}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 69
    assert str(os.getppid()) in ended.stderr


def test_the_status_line_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step3rt.cli.generate.shows_progress", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    generate._show_status("waiting for instances: 0 of 3 attention linked")
    assert capsys.readouterr().err == "\r\x1b[Kwaiting for instanc"
