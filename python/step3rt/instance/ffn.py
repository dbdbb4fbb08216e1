"""The FFN instance: dense FFNs, the shared expert and its range of routed experts.

Driven by arrivals alone: it has no KV cache, no scheduler and no state between layers.
"""

import logging
from dataclasses import dataclass

import torch

from step3rt import _core
from step3rt.errors import Unavailable
from step3rt.instance.node import IDLE_TIMEOUT_S, Outcome, load_progress
from step3rt.instance.wire import (
    DTYPES,
    A2fFrame,
    A2fLayout,
    F2aLayout,
    FrameError,
    slot_layouts,
    slot_tensor,
)
from step3rt.model.checkpoint import Checkpoint
from step3rt.model.config import Step3Config
from step3rt.model.placement import expert_range
from step3rt.model.weights import FfnWeights, load_ffn_weights
from step3rt.ops.moe import grouped_experts

logger = logging.getLogger(__name__)


class FfnRole:
    """An FFN instance over all its sessions."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._loaded: tuple[range, torch.dtype, FfnWeights] | None = None

    def run(self, session: _core.NodeSession) -> Outcome:
        """Loads the experts of the session's rank unless they are at hand, and serves arrivals."""
        settings, config = session.settings, self._checkpoint.config
        experts = expert_range(config.num_experts, session.role_rank, settings.ep_size)
        weights = self._load(session, experts, DTYPES[settings.compute_dtype])
        layouts = slot_layouts(settings, config)
        session.bind(layouts[0].slot_bytes, layouts[1].slot_bytes)
        session.ready(0)
        logger.info(
            "Ready with %d of %d experts, from %d on",
            len(experts),
            config.num_experts,
            experts.start,
        )
        return FfnLoop(session, config, weights, experts, layouts).run()

    def _load(self, session: _core.NodeSession, experts: range, dtype: torch.dtype) -> FfnWeights:
        if self._loaded is None or self._loaded[:2] != (experts, dtype):
            self._loaded = None  # frees them before others are loaded
            weights = load_ffn_weights(self._checkpoint, experts, dtype, load_progress(session))
            self._loaded = (experts, dtype, weights)
        return self._loaded[2]


@dataclass(frozen=True, slots=True)
class AttentionPeer:
    """A linked attention instance's slots, per lane."""

    send_slots: list[torch.Tensor]
    receive_slots: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class PendingFrame:
    """A checked frame that waits to be computed."""

    arrival: _core.Arrival
    frame: A2fFrame


class FfnLoop:
    """One session of an FFN instance."""

    def __init__(
        self,
        session: _core.NodeSession,
        config: Step3Config,
        weights: FfnWeights,
        experts: range,
        layouts: tuple[A2fLayout, F2aLayout],
    ) -> None:
        self._session = session
        self._config = config
        self._weights = weights
        self._experts = experts
        self._a2f, self._f2a = layouts
        self._compute_dtype = DTYPES[session.settings.compute_dtype]
        self._peers: dict[int, AttentionPeer] = {}
        self._pending: list[PendingFrame] = []
        self._is_draining = False

    @torch.inference_mode()
    def run(self) -> Outcome:
        """Computes what arrives until the session is lost, or drained with nothing pending."""
        while True:
            if self._is_draining and not self._pending:
                return Outcome.DRAINED
            for event in self._session.poll(0.0 if self._pending else IDLE_TIMEOUT_S):
                if event.kind == "session_lost":
                    logger.warning("The session with the coordinator is over: %s", event.reason)
                    return Outcome.LOST
                self._handle(event)
            if self._pending:
                self._compute_oldest_layer()

    def _handle(self, event: _core.Event) -> None:
        if event.kind == "arrival":
            self._on_arrival(event)
        elif event.kind == "link_up":
            lanes = range(self._session.settings.num_lanes)
            self._peers[event.peer] = AttentionPeer(
                [slot_tensor(self._session.send_slot(event.peer, lane)) for lane in lanes],
                [slot_tensor(self._session.receive_slot(event.peer, lane)) for lane in lanes],
            )
            logger.info("Linked to attention instance %d over %s", event.peer, event.fabric)
        elif event.kind == "link_down":
            self._peers.pop(event.peer, None)
            self._pending = [one for one in self._pending if one.arrival.peer != event.peer]
            logger.info("The link to attention instance %d is down: %s", event.peer, event.reason)
        elif event.kind == "drain":
            self._is_draining = True

    def _on_arrival(self, arrival: _core.Arrival) -> None:
        peer = self._peers[arrival.peer]
        try:
            if not arrival.layer < len(self._weights.layers):
                raise FrameError(
                    f"A frame for layer {arrival.layer} arrived. The model has "
                    f"{len(self._weights.layers)}. Check that both instances run the same model."
                )
            frame = self._a2f.read(
                peer.receive_slots[arrival.lane], arrival.num_tokens, arrival.payload_bytes
            )
            self._check_ids(frame.expert_ids)
        except FrameError as error:
            logger.error("A frame of attention instance %d is refused: %s", arrival.peer, error)
            # An answer of no rows tells the peer, and frees the slot.
            self._push(arrival, num_tokens=0, payload_bytes=0)
            return
        self._pending.append(PendingFrame(arrival, frame))

    def _check_ids(self, expert_ids: torch.Tensor) -> None:
        shared = self._config.num_experts
        routed, last = expert_ids[:, :-1], expert_ids[:, -1]
        is_ours = (routed >= self._experts.start) & (routed < self._experts.stop)
        is_good = (is_ours | (routed == -1)).all() & ((last == -1) | (last == shared)).all()
        if not bool(is_good):
            raise FrameError(
                f"A frame names experts {sorted(set(expert_ids.flatten().tolist()))[:16]}. This "
                f"instance holds {self._experts.start}..{self._experts.stop} and {shared}. Check "
                "that both instances run the same model."
            )

    def _compute_oldest_layer(self) -> None:
        """Computes the frame that has waited longest, with all others of the same layer."""
        layer = self._pending[0].arrival.layer
        group = [one for one in self._pending if one.arrival.layer == layer]
        self._pending = [one for one in self._pending if one.arrival.layer != layer]
        partial_sums = grouped_experts(
            torch.cat([one.frame.hidden for one in group]).to(self._compute_dtype),
            torch.cat([one.frame.expert_ids for one in group]),
            torch.cat([one.frame.expert_weights for one in group]),
            self._weights.layers[layer].stacks,
        )
        counts = [one.arrival.num_tokens for one in group]
        for one, partial_sum in zip(group, torch.split(partial_sums, counts), strict=True):
            self._reply(one.arrival, partial_sum)

    def _reply(self, arrival: _core.Arrival, partial_sum: torch.Tensor) -> None:
        self._f2a.write(self._peers[arrival.peer].send_slots[arrival.lane], partial_sum)
        num_tokens = arrival.num_tokens
        self._push(arrival, num_tokens, self._f2a.payload_bytes(num_tokens))

    def _push(self, arrival: _core.Arrival, num_tokens: int, payload_bytes: int) -> None:
        try:
            self._session.push(
                arrival.peer, arrival.lane, arrival.step, arrival.layer, num_tokens, payload_bytes
            )
        except Unavailable:
            # The peer is gone; the next poll says so, and its frames are dropped there.
            logger.debug("Attention instance %d left before its answer", arrival.peer)
