"""When the links of a device attention instance are ready, and how they are made anew."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step3rt.instance.device_links import DEVICE_FABRIC, FfnLinks
from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, StopWord

CPU = torch.device("cpu")
SHAPE = AfdShape(
    num_lanes=1, num_sources=1, num_ranks=2, max_tokens=2, hidden_size=128, top_k=1
)  # fmt: skip


@dataclass
class Session:
    """Notes what links ask for."""

    greeted: list[int] = field(default_factory=list)
    reset: list[tuple[int, str]] = field(default_factory=list)

    def push(self, peer: int, *_frame: int) -> None:
        self.greeted.append(peer)

    def reset_link(self, peer: int, reason: str) -> None:
        self.reset.append((peer, reason))


@dataclass
class Links:
    """Links over real slots, and the events that a session would bring. Peer r + 10 has rank r."""

    session: Session
    stop: StopWord
    slots: AttentionSlots
    ranks: list[FfnSlots]
    links: FfnLinks
    last_epoch: int = 0

    def up(self, rank: int, fabric: str = DEVICE_FABRIC, offer: bytes | None = None) -> None:
        self.last_epoch += 1
        self.links.on_up(
            event(
                peer=rank + 10,
                role_rank=rank,
                fabric=fabric,
                reason="a test",
                epoch=self.last_epoch,
                device_offer=self.ranks[rank].handle if offer is None else offer,
            )
        )

    def answer(self, rank: int) -> None:
        self.links.on_arrival(event(peer=rank + 10))

    def down(self, rank: int) -> None:
        self.links.on_down(event(peer=rank + 10, reason="it went away"))

    def make_ready(self) -> None:
        for rank in (0, 1):
            self.up(rank)
            self.answer(rank)
        assert self.links.is_ready


def event(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


@pytest.fixture
def made() -> Iterator[Links]:
    session, stop = Session(), StopWord(CPU)
    slots = AttentionSlots(SHAPE, 0, CPU, stop)
    ranks = [FfnSlots(SHAPE, rank, CPU, stop) for rank in (0, 1)]
    yield Links(session, stop, slots, ranks, FfnLinks(session, slots, stop, 2))
    for end in (slots, *ranks):
        end.close()


def test_steps_may_send_once_every_rank_has_said_that_it_is_connected(made: Links) -> None:
    made.up(0)
    made.answer(0)
    assert made.links.reason == "FFN rank 1 is not linked"
    assert not made.links.are_coming
    made.up(1)
    assert made.session.greeted == [10, 11]
    assert not made.links.is_ready
    assert made.links.are_coming, "steps wait for the answer"
    made.answer(1)
    assert made.links.is_ready


def test_a_lost_rank_breaks_all_links_and_the_others_are_made_anew(made: Links) -> None:
    made.make_ready()
    made.down(1)
    assert made.stop.is_set, "nothing waits any more"
    assert not made.links.is_ready
    assert not made.links.are_coming
    assert "FFN instance 11 is down: it went away" in made.links.reason
    made.links.settle()
    assert not made.stop.is_set
    assert [peer for peer, _ in made.session.reset] == [10]
    made.down(0)  # the end of the old link, which the reset brings
    assert not made.stop.is_set
    made.make_ready()


def test_an_error_of_a_lane_resets_every_link_and_steps_wait_for_them(made: Links) -> None:
    made.make_ready()
    made.links.break_all("lane 0 stopped")
    assert made.links.are_coming
    made.down(1)
    made.up(1)  # while lanes are still busy: it is connected when they are idle
    assert made.session.greeted == [10, 11]
    made.links.settle()
    assert made.session.greeted == [10, 11, 11]
    assert made.session.reset == [(10, "lane 0 stopped")]
    assert made.links.are_coming
    made.answer(1)
    made.up(0)
    made.answer(0)
    assert made.links.is_ready


def test_a_link_by_another_fabric_is_of_no_use(made: Links) -> None:
    made.up(0, fabric="shm")
    assert made.session.greeted == []
    assert not made.links.are_coming


def test_an_offer_that_cannot_be_mapped_leaves_the_rank_unlinked(made: Links) -> None:
    made.up(0, offer=b"nonsense")
    assert made.session.greeted == []
    assert not made.links.is_ready
