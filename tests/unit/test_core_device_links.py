"""Device offers and resets of links as instances' loops see them, between two real processes."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from step3rt import _core
from step3rt.errors import ConfigError, InvalidArgument, Unavailable
from tests.fixtures.core_processes import (
    SLOT_BYTES,
    Coordinator,
    Processes,
    join_cluster,
    next_events,
    offer_device,
    receive,
    start_coordinator,
)

_WHY = "lane 1: no sums of layer 17 within 1000 ms"


def _join(coordinator: Coordinator, offer: bytes | None) -> tuple[_core.NodeSession, Any]:
    session = join_cluster(coordinator.options("attention"), device_offer=offer)
    [up] = next_events(session)
    assert up.kind == "link_up"
    return session, up


def _expect_reset(
    session: _core.NodeSession, pipe: Connection, before: _core.LinkUp, started: float
) -> _core.LinkUp:
    """Both ends are told of the end with its reason, then of a new link under a later epoch."""
    events: list[Any] = []
    while len(events) < 2:
        events += session.poll(1.0)
    down, up = events
    assert (down.kind, down.peer, down.reason) == ("link_down", before.peer, f"reset: {_WHY}")
    assert (up.kind, up.peer, up.fabric) == ("link_up", before.peer, "cuda_ipc")
    assert receive(pipe) == ("link_down", f"reset: {_WHY}")
    assert receive(pipe)[2] == up.epoch > before.epoch
    assert time.monotonic() - started < 1.0
    assert up.device_offer == before.device_offer
    return up


@pytest.mark.parametrize("fabric", ["auto", "cuda_ipc"])
@pytest.mark.parametrize("num_bytes", [0, 1, 4096])
def test_devices_of_one_host_are_linked_with_their_offers(
    fabric: str,
    num_bytes: int,
    processes: Processes,
    tmp_path: Path,
    loop: Callable[..., Any],
) -> None:
    coordinator = start_coordinator(processes, tmp_path, fabric)
    theirs, ours = bytes(range(256)) * 16, bytes(reversed(range(256))) * 16
    theirs, ours = theirs[:num_bytes], ours[:num_bytes]
    process, pipe = processes.start(offer_device, coordinator.options("ffn"), theirs)

    def attention() -> None:
        ffn = receive(pipe)
        session, up = _join(coordinator, ours)
        assert (up.peer, up.fabric, up.device_offer) == (ffn, "cuda_ipc", theirs)
        assert up.reason.endswith("; carried by shm")
        assert 1 <= up.epoch < 2**24
        assert receive(pipe) == ("link_up", "cuda_ipc", up.epoch, ours)
        assert session.send_slot(ffn, 1).nbytes == 1
        killed = time.monotonic()
        process.kill()
        [down] = next_events(session)
        assert time.monotonic() - killed < 1.0
        assert (down.kind, down.peer) == ("link_down", ffn)
        session.close()

    loop(attention)


def test_either_end_resets_a_link_without_a_restart(
    coordinator: Coordinator, processes: Processes, loop: Callable[..., Any]
) -> None:
    _process, pipe = processes.start(offer_device, coordinator.options("ffn"), b"theirs")

    def attention() -> None:
        receive(pipe)
        session, up = _join(coordinator, b"ours")
        receive(pipe)
        for _ in range(3):
            started = time.monotonic()
            session.reset_link(up.peer, _WHY)
            with pytest.raises(Unavailable, match="not linked"):
                session.reset_link(up.peer, _WHY)
            with pytest.raises(Unavailable, match="not linked"):
                session.send_slot(up.peer, 0)
            up = _expect_reset(session, pipe, up, started)
            started = time.monotonic()
            pipe.send((session.instance_id, _WHY))
            up = _expect_reset(session, pipe, up, started)
        instances = {entry["instance_id"] for entry in coordinator.instances()}
        assert instances == {session.instance_id, up.peer}, "nobody was taken for lost"
        session.close()

    loop(attention)


@pytest.mark.parametrize(("ours", "theirs"), [(b"ours", None), (None, b"theirs")])
def test_one_offer_is_no_use_and_the_reason_says_so(
    ours: bytes | None,
    theirs: bytes | None,
    coordinator: Coordinator,
    processes: Processes,
    loop: Callable[..., Any],
) -> None:
    _process, pipe = processes.start(offer_device, coordinator.options("ffn"), theirs)

    def attention() -> None:
        receive(pipe)
        session, up = _join(coordinator, ours)
        assert (up.fabric, up.device_offer) == ("shm", None)
        assert up.reason.endswith("no cuda_ipc, as only one end offers device memory")
        assert receive(pipe) == ("link_up", "shm", up.epoch, None)
        assert session.send_slot(up.peer, 0).nbytes == SLOT_BYTES
        session.close()

    loop(attention)


def test_what_cannot_be_offered_is_refused(processes: Processes, tmp_path: Path) -> None:
    coordinator = start_coordinator(processes, tmp_path, "cuda_ipc")
    session = _core.NodeSession(coordinator.options("attention"))
    with pytest.raises(InvalidArgument, match="4097 bytes"):
        session.bind(1, 1, bytes(4097))
    with pytest.raises(ConfigError, match="offers no device memory"):
        session.bind(1, 1)
    session.bind(1, 1, b"")
    session.close()
