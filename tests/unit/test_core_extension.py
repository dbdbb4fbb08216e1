"""The extension module as Python sees it: its stub, its import, its sessions and its errors."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step3rt import _core
from step3rt.errors import ConfigError, InvalidArgument, Unavailable
from tests.fixtures.core_processes import (
    MODEL,
    Coordinator,
    join_cluster,
    next_events,
    node_options,
    wait_until,
)


def test_the_stub_is_true() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "step3rt._core"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_importing_loads_no_library_beyond_the_c_runtime() -> None:
    script = (
        "import re\n"
        "def mapped():\n"
        "    with open('/proc/self/maps') as maps:\n"
        "        return set(re.findall(r'(/\\S+\\.so\\S*)', maps.read()))\n"
        "before = mapped()\n"
        "import step3rt._core\n"
        "print('\\n'.join(mapped() - before))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    libraries = {Path(line).name for line in output.splitlines() if "cpython" not in line}
    c_runtime = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt"}
    names = {name.split(".so")[0] for name in libraries}
    assert names - c_runtime == {"_core.abi3"}


def test_this_host_can_do_shared_memory_and_tcp() -> None:
    found = _core.host_capabilities()
    assert [(name, is_usable) for name, (is_usable, _why) in found.items()] == [
        ("shm", True),
        ("tcp", True),
        ("limits", True),
    ]


def test_rdma_findings_say_what_is_missing_and_what_to_do() -> None:
    findings = _core.rdma_findings()
    assert findings
    for is_good, found, fix in findings:
        assert found
        assert bool(fix) is not is_good
    has_device = any(Path("/sys/class/infiniband").glob("*"))
    assert ("no RDMA device" in findings[0][1]) is not has_device


def test_a_session_knows_who_it_is_and_what_the_cluster_runs_with(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    first, second = (
        loop(lambda role=role: _core.NodeSession(coordinator.options(role)))
        for role in ("ffn", "attention")
    )
    assert first.instance_id != second.instance_id
    assert first.role_rank == 0
    assert second.epoch > first.epoch > 0
    settings = second.settings
    assert (settings.num_lanes, settings.max_tokens_per_micro_batch) == (2, 8)
    assert (settings.max_model_len, settings.ep_size, settings.fabric) == (256, 1, "auto")
    assert settings.compute_dtype == "float32"
    assert {item["state"] for item in coordinator.instances()} == {"loading"}
    loop(lambda: first.set_status("loading weights 43 %"))
    wait_until(
        lambda: "loading weights 43 %" in {item["status"] for item in coordinator.instances()}
    )
    loop(first.close)
    loop(second.close)


def test_a_killed_coordinator_ends_the_session_within_a_second(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    def instance() -> None:
        session = join_cluster(coordinator.options("ffn"))
        coordinator.process.kill()
        killed = time.monotonic()
        [lost] = next_events(session)
        assert time.monotonic() - killed < 1.0
        assert lost.kind == "session_lost"
        assert lost.reason
        with pytest.raises(Unavailable, match="session with the coordinator is over"):
            session.fail_step(0, 0, "the coordinator is gone")
        session.close()

    loop(instance)


def test_waiting_releases_the_gil(coordinator: Coordinator, loop: Callable[..., Any]) -> None:
    session = loop(lambda: join_cluster(coordinator.options("ffn")))
    ticks = 0
    polling = threading.Thread(target=session.poll, args=(1.0,))
    polling.start()
    while polling.is_alive():
        ticks += 1
        time.sleep(0.01)
    assert ticks > 20
    loop(session.close)


def test_a_second_thread_is_refused_while_the_first_waits(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    session = loop(lambda: join_cluster(coordinator.options("ffn")))
    polling = threading.Thread(target=session.poll, args=(2.0,))
    polling.start()

    def is_refused() -> bool:
        try:
            session.set_status("from another thread")
        except RuntimeError as error:
            return "belongs to one thread" in str(error)
        return False

    wait_until(is_refused)
    polling.join()
    loop(session.close)


def test_without_a_coordinator_an_instance_gives_up_in_time() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"coordinator at {address}.*refused") as caught:
            _core.NodeSession(node_options(address, "ffn", connect_timeout_s=0.2))
        assert caught.value.is_retryable
        with pytest.raises(Unavailable, match=address):
            _core.list_instances(address, 0.2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"role": "expert"}, "unknown variant `expert`"),
        ({"coordinator": "nowhere"}, "coordinator address is not usable: `nowhere`"),
        ({"data_host": "localhost"}, "data_host is not usable: `localhost`"),
        ({"connect_timeout_s": -1.0}, "connect_timeout_s is not usable: -1 s"),
        ({"colour": "red"}, "unknown field `colour`"),
    ],
)
def test_options_that_are_not_usable_are_named(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        _core.NodeSession(node_options("127.0.0.1:1", "ffn", **changes))


def test_an_instance_of_another_model_is_refused(
    coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    other = MODEL | {"vocab_size": 65}
    with pytest.raises(ConfigError, match=r"refused this instance.*vocab_size = 65"):
        loop(lambda: _core.NodeSession(coordinator.options("ffn", model=other)))


def test_serving_what_cannot_be_served_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        _core.serve(json.dumps({"model_path": str(tmp_path)}))
    with pytest.raises(ConfigError, match="unknown field `model`"):
        _core.serve(json.dumps({"model": str(tmp_path)}))


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused(
    timeout_s: float, coordinator: Coordinator, loop: Callable[..., Any]
) -> None:
    session = loop(lambda: join_cluster(coordinator.options("ffn")))
    with pytest.raises(ValueError, match="timeout_s"):
        loop(lambda: session.poll(timeout_s))
    loop(session.close)


@pytest.mark.parametrize(
    "arguments", [{"logprob": -1.0}, {"token_id": 3, "top": [(3, -1.0)]}, {"top": []}]
)
def test_an_output_that_contradicts_itself_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="output of sequence 7 is not consistent"):
        _core.SequenceOutput(7, **arguments)
