"""An `LLM` one of whose processes dies: nobody replaces it, so nobody need wait for that."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from step3rt import LLM, SamplingParams
from step3rt.errors import Unavailable
from tests.e2e.clusters import pid_of, processes_with, wait_until
from tests.e2e.commands import Commands

# Long enough that it is not done when its process dies.
PARAMS = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
# `recovery_timeout_ms` is 30 s. A fraction of it, on a machine that is busy.
SOON_S = 15.0


def killed_at_a_deadly_moment(llm: LLM, role: str, run: Callable[[], object]) -> tuple[str, float]:
    """What `run` raises when `role`'s first process is killed meanwhile, and after how long."""
    killed_s = 0.0

    def kill() -> None:
        nonlocal killed_s
        killed_s = time.monotonic()
        os.kill(pid_of(llm._cluster, role), signal.SIGKILL)

    timer = threading.Timer(2.0, kill)
    timer.start()
    with pytest.raises(Unavailable) as error:
        run()
    ended_s = time.monotonic()
    timer.join()
    return str(error.value), ended_s - killed_s


@pytest.mark.timeout(300)
def test_a_death_that_nobody_can_make_good_ends_generation_at_once_and_says_who_died() -> None:
    with LLM("nano", use_progress=False) as llm:
        text, waited_s = killed_at_a_deadly_moment(
            llm, "ffn", lambda: llm.generate(["Once upon a time", "It was"], PARAMS)
        )
        assert "The ffn-0 process ended with code -9" in text
        assert waited_s < SOON_S
        # Another call finds the same, not what the coordinator knows.
        with pytest.raises(Unavailable, match="The ffn-0 process ended with code -9"):
            llm.chat([{"role": "user", "content": "Hello"}], PARAMS)


@pytest.mark.timeout(300)
def test_a_command_with_a_cluster_of_its_own_says_so_at_once(commands: Commands) -> None:
    mark = f"STEP3RT_TEST_MARK={os.urandom(8).hex()}"
    name, value = mark.split("=")
    environment = os.environ | {name: value}
    command = commands.start(
        "generate", "--max-tokens=1500", "--ignore-eos", "Once upon a time", environment=environment
    )
    wait_until(lambda: "Once upon a time" in command.output(), "the first token")
    (pid,) = (pid for pid, line in processes_with(mark).items() if "ffn" in line)
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    assert command.process.wait(60) == 69
    assert time.monotonic() - killed_s < SOON_S
    assert "The ffn-0 process ended with code -9" in command.output()


@pytest.mark.timeout(300)
def test_a_death_that_others_make_good_changes_nothing() -> None:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    with LLM("nano", attention=2, use_progress=False) as llm:
        [expected] = llm.generate("Once upon a time", params)
        pid = pid_of(llm._cluster, "attention")
        timer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
        timer.start()
        outputs = llm.generate(["Once upon a time"] * 4, params)
        timer.join()
    assert {tuple(item.outputs[0].token_ids) for item in outputs} == {
        tuple(expected.outputs[0].token_ids)
    }
