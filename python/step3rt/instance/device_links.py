"""Owns an attention instance's links to the FFN ranks in device memory: made, and made anew.

The session says which links are up and whose memory lies behind them; the slots then connect. A
rank is ready once it has answered a greeting, the one frame that travels beside device memory: its
end is connected then too, and steps may send.

    link_up -> connect, greet -> answer: ready
    a lane's error, or link_down -> broken: every wait ends -> lanes idle -> forget all, reset links

All links break together: a row needs its sums from every rank, and a step that was given up leaves
the others in the middle of it.
"""

import logging
import time
from typing import Protocol

from step3rt import _core
from step3rt.errors import InvalidArgument, Unavailable
from step3rt.ops.afd_link import AttentionSlots
from step3rt.ops.device_link import StopWord

logger = logging.getLogger(__name__)

DEVICE_FABRIC = "cuda_ipc"
"""What a session calls a link by device memory; on a CPU that is memory of the host."""

HOLD_LIMIT_S = 1.0
"""How long steps wait for links that are being made anew before they fail."""

GREETING_LANE = 0


class Session(Protocol):
    """What is used here of `_core.NodeSession`."""

    def push(
        self, peer: int, lane: int, step: int, layer: int, num_tokens: int, payload_bytes: int
    ) -> None:
        """Publishes a frame."""

    def reset_link(self, peer: int, reason: str) -> None:
        """Ends a link, and makes a new one under a new epoch."""


class FfnLinks:
    """The links of one session."""

    def __init__(
        self, session: Session, slots: AttentionSlots, stop: StopWord, num_ranks: int
    ) -> None:
        """Starts without links; `stop` is the slots'."""
        self._session = session
        self._slots = slots
        self._stop = stop
        self._num_ranks = num_ranks
        self._up: dict[int, _core.LinkUp] = {}
        self._connected: set[int] = set()
        self._ready: set[int] = set()
        self._resetting: set[int] = set()
        self._broken: str | None = None
        self._changed_s = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Whether steps can be launched."""
        return len(self._ready) == self._num_ranks and self._broken is None

    @property
    def are_coming(self) -> bool:
        """Whether steps had better wait: every rank is there, and its link is being made."""
        is_recent = time.monotonic() - self._changed_s < HOLD_LIMIT_S
        return is_recent and len(self._up.keys() | self._resetting) == self._num_ranks

    @property
    def reason(self) -> str:
        """Why steps cannot be launched."""
        if self._broken is not None:
            return self._broken
        missing = sorted(set(range(self._num_ranks)) - self._ready)
        return f"FFN rank {', '.join(map(str, missing))} is not linked"

    def on_up(self, link: _core.LinkUp) -> None:
        """A link is up: connects, unless lanes still run on the links before."""
        if link.fabric != DEVICE_FABRIC:
            logger.error(
                "The link to FFN instance %d is over %s: %s. The device pipeline needs device "
                "memory at both ends. Start it with --device as well",
                link.peer,
                link.fabric,
                link.reason,
            )
            return
        self._up[link.role_rank] = link
        self._changed_s = time.monotonic()
        for ranks in (self._resetting, self._connected, self._ready):
            ranks.discard(link.role_rank)
        if self._broken is None:
            self._connect(link.role_rank)

    def on_down(self, link: _core.LinkDown) -> None:
        """A link is over: breaks all, if it was in use."""
        rank = self._rank_of(link.peer)
        if rank is None:
            return  # one that is made anew, whose end was asked for
        del self._up[rank]
        if rank in self._connected:
            self.break_all(f"the link to FFN instance {link.peer} is down: {link.reason}")
            self._connected.discard(rank)
            self._ready.discard(rank)

    def on_arrival(self, arrival: _core.Arrival) -> None:
        """A rank has answered the greeting."""
        rank = self._rank_of(arrival.peer)
        if rank in self._connected and rank is not None:
            link = self._up[rank]
            self._ready.add(rank)
            logger.info("Linked to FFN rank %d over %s: %s", rank, link.fabric, link.reason)

    def break_all(self, reason: str) -> None:
        """Ends every wait of every lane; `settle` makes the links anew once the lanes are idle."""
        if self._broken is None:
            logger.warning("The links to the FFN instances break: %s", reason)
            self._broken = reason
            self._changed_s = time.monotonic()
            self._stop.set()

    def settle(self) -> None:
        """Makes broken links anew; no lane may run."""
        if self._broken is None:
            return
        reason, self._broken = self._broken, None
        self._slots.reset()
        self._stop.clear()
        for rank in sorted(self._connected):
            link = self._up.pop(rank)
            self._resetting.add(rank)
            self._reset(link.peer, reason)
        self._connected.clear()
        self._ready.clear()
        for rank in list(self._up):
            self._connect(rank)

    def _connect(self, rank: int) -> None:
        link = self._up[rank]
        try:
            self._slots.connect(rank, link.device_offer or b"", link.epoch)
            self._connected.add(rank)
            self._session.push(link.peer, GREETING_LANE, 0, 0, 0, 0)
        except Unavailable as error:
            # The next poll says so of a peer that is gone; of another one its log says why.
            logger.warning("FFN instance %d cannot be linked: %s", link.peer, error)
        except InvalidArgument as error:
            logger.error("FFN instance %d cannot be linked: %s", link.peer, error)

    def _reset(self, peer: int, reason: str) -> None:
        try:
            self._session.reset_link(peer, reason)
        except Unavailable as error:
            logger.debug("FFN instance %d left before its link was made anew: %s", peer, error)

    def _rank_of(self, instance_id: int) -> int | None:
        for rank, link in self._up.items():
            if link.peer == instance_id:
                return rank
        return None
