"""The FFN instance of the device pipeline: keeps every lane's next steps queued, and its links.

The device computes what arrives; the host sees links come and go, and errors. It keeps nothing
between steps.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

from step3rt import _core
from step3rt.config import NodeConfig
from step3rt.errors import InvalidArgument, Unavailable
from step3rt.instance.device_links import DEVICE_FABRIC
from step3rt.instance.device_setup import (
    SLOT_BYTES,
    DeviceModel,
    check_settings,
    link_shape,
    report_loading,
    wait_limit_ns,
)
from step3rt.instance.device_share import DeviceShare
from step3rt.instance.device_trace import LaneTraces
from step3rt.instance.node import IDLE_TIMEOUT_S, Outcome
from step3rt.model.device_ffn import FfnLane
from step3rt.model.ffn_groups import FfnGroups, build_ffn_groups
from step3rt.ops.afd_link import FfnSlots
from step3rt.ops.afd_slots import AfdShape
from step3rt.ops.device_link import StopWord
from step3rt.ops.stream import Event

logger = logging.getLogger(__name__)

QUEUED_STEPS = 2
"""Replays of a lane that are queued: the next step's first layer finds its graph on the device."""

RANK_SHARE_OF_LIMIT = 0.4
"""Of an attention instance's limit: two of a rank's waits for a dead source end within it."""

LOOK_S = 0.001
"""Between looks at the ends of steps; less than two steps of a model of eight layers."""


@dataclass(slots=True)
class _Ends:
    """The slots of one rank and what is bound to them; good for any session of the same shape."""

    shape: AfdShape
    rank: int
    slots: FfnSlots
    stop: StopWord
    lanes: list[FfnLane]


class DeviceFfnRole:
    """A device FFN instance over all its sessions."""

    def __init__(
        self, node: NodeConfig, model: DeviceModel, share: DeviceShare | None = None
    ) -> None:
        """Loads nothing yet; `share`: with the attention role of this process, if there is one."""
        self._node = node
        self._model = model
        self._share = share or DeviceShare()
        self._groups: tuple[tuple[int, int], FfnGroups] | None = None
        self._ends: _Ends | None = None

    def run(self, session: _core.NodeSession) -> Outcome:
        """Loads the experts of the session's rank unless they are at hand, and serves arrivals."""
        settings, rank = session.settings, session.role_rank
        check_settings(settings)
        with self._share.turn(session, "ffn"):
            groups = self._load(session, (rank, settings.ep_size))
            ends = self._prepare(link_shape(settings, self._model.config), rank, groups)
        session.bind(SLOT_BYTES, SLOT_BYTES, device_offer=ends.slots.handle)
        session.ready(0)
        logger.info(
            "Ready on %s with %d of %d experts, from %d on",
            self._model.device,
            len(groups.experts),
            self._model.config.num_experts,
            groups.experts.start,
        )
        tables = [lane.group_tables for lane in ends.lanes]
        traces = LaneTraces.start(self._node, rank, len(groups.layers), ends.slots, tables)
        loop = DeviceFfnLoop(session, ends.slots, ends.stop, ends.lanes, self._share, traces)
        try:
            return loop.run()
        finally:
            loop.stop()
            if traces is not None:
                traces.save()

    def _load(self, session: _core.NodeSession, place: tuple[int, int]) -> FfnGroups:
        if self._groups is None or self._groups[0] != place:
            self._groups = self._ends = None  # frees them before others are loaded
            tensors = report_loading(self._model.tensors, session)
            self._groups = (place, build_ffn_groups(tensors, *place))
        return self._groups[1]

    def _prepare(self, shape: AfdShape, rank: int, groups: FfnGroups) -> _Ends:
        ends = self._ends
        if ends is None or (ends.shape, ends.rank) != (shape, rank):
            device = self._model.device
            stop = StopWord(device)
            limit_ns = int(wait_limit_ns(device) * RANK_SHARE_OF_LIMIT)
            slots = FfnSlots(
                shape,
                rank,
                device,
                stop,
                limit_ns,
                idle_limit_ns=self._share.idle_limit_ns(device),
            )
            # Nothing is linked: what a capture launches sends and awaits nothing.
            stop.set()
            num_ctas = self._share.ffn_ctas(device, shape.num_lanes, self._node.ffn_sms)
            lanes = [FfnLane(groups, slots, lane, num_ctas) for lane in range(shape.num_lanes)]
            slots.reset()
            stop.clear()
            ends = self._ends = _Ends(shape, rank, slots, stop, lanes)
        return ends


@dataclass(slots=True)
class _Peer:
    """A linked attention instance; `is_lost` once a lane goes on without it."""

    link: _core.LinkUp
    is_lost: bool = False


@dataclass(slots=True)
class DeviceFfnLoop:
    """One session of a device FFN instance."""

    session: _core.NodeSession
    slots: FfnSlots
    stop_word: StopWord
    lanes: list[FfnLane]
    share: DeviceShare
    traces: LaneTraces | None = None
    _peers: dict[int, _Peer] = field(default_factory=dict)
    _joining: list[_core.LinkUp] = field(default_factory=list)
    _num_held: int = 0
    _greetings: list[_core.Arrival] = field(default_factory=list)
    _replays: list[deque[Event]] = field(default_factory=list)
    _is_draining: bool = False

    def run(self) -> Outcome:
        """Keeps steps queued until the session is lost, or drained and no step is in progress."""
        self._replays = [deque() for _ in self.lanes]
        while True:
            self._join()
            # A lane that waits for rows would hold up the process's other role, which still loads.
            if not self.share.is_loading:
                self._answer_greetings()
                self._queue()
            if self._is_draining and not any(self._replays):
                return Outcome.DRAINED
            is_busy = self._peers or self._joining
            for event in self.session.poll(LOOK_S if is_busy else IDLE_TIMEOUT_S):
                if event.kind == "session_lost":
                    logger.warning("The session with the coordinator is over: %s", event.reason)
                    return Outcome.LOST
                self._handle(event)
            self._look_for_errors()
            if self.traces is not None:
                self.traces.look()

    def stop(self) -> None:
        """Ends every wait and returns when the lanes are idle, without links."""
        self.stop_word.set()
        for replays in self._replays:
            for event in replays:
                event.wait()
            replays.clear()
        self._peers.clear()
        self._joining.clear()
        self._greetings.clear()
        self.slots.reset()
        self._release()
        self.stop_word.clear()

    def _queue(self) -> None:
        for index, (lane, replays) in enumerate(zip(self.lanes, self._replays, strict=True)):
            while replays and replays[0].is_done():
                replays.popleft()
            # Nobody can begin a step yet: a parked lane would only be in the way of who loads.
            if self._is_draining or not self._peers or index < self._num_held:
                continue
            while len(replays) < QUEUED_STEPS:
                replays.append(lane.replay())

    def _handle(self, event: _core.Event) -> None:
        if event.kind == "link_up":
            self._on_link_up(event)
        elif event.kind == "link_down":
            self._on_link_down(event)
        elif event.kind == "arrival":
            self._greetings.append(event)
        elif event.kind == "drain":
            self._is_draining = True
            # Steps in progress end; those that are queued find nothing to begin with.
            self.slots.pause()

    def _on_link_up(self, link: _core.LinkUp) -> None:
        if link.fabric != DEVICE_FABRIC:
            logger.error(
                "The link to attention instance %d is over %s: %s. The device pipeline needs "
                "device memory at both ends. Start it with --device as well",
                link.peer,
                link.fabric,
                link.reason,
            )
            return
        self._joining.append(link)

    def _join(self) -> None:
        """Links those that are up, once every lane is between steps."""
        if self._is_draining or not (self._joining or self._num_held):
            return
        if self._joining and not self._hold():
            return
        for link in self._joining:
            self._connect(link)
        self._joining.clear()
        self._release()

    def _hold(self) -> bool:
        """Keeps lanes from their next step, as `FfnSlots.holds_in_turn` says; whether all rest.

        Who is not held yet goes on meanwhile, and the loop looks after links and errors.
        """
        while not any(self._is_in_step(lane) for lane in range(self._num_held)):
            if self._num_held == len(self.lanes):
                return True
            first = self._num_held
            self._num_held = first + 1 if self.slots.holds_in_turn else len(self.lanes)
            for lane in range(first, self._num_held):
                self.slots.pause(lane)
        return False

    def _is_in_step(self, lane: int) -> bool:
        return not all(event.is_done() for event in self._replays[lane])

    def _release(self) -> None:
        self._num_held = 0
        self.slots.resume()

    def _connect(self, link: _core.LinkUp) -> None:
        try:
            self.slots.connect(link.role_rank, link.device_offer or b"", link.epoch)
        except (InvalidArgument, Unavailable) as error:
            logger.error("Attention instance %d cannot be linked: %s", link.peer, error)
            return
        self._peers[link.role_rank] = _Peer(link)
        logger.info("Linked to attention instance %d over %s", link.peer, link.fabric)

    def _on_link_down(self, link: _core.LinkDown) -> None:
        self._joining = [joining for joining in self._joining if joining.peer != link.peer]
        for source, peer in list(self._peers.items()):
            if peer.link.peer == link.peer:
                self.slots.set_active(source, False)
                del self._peers[source]
        self._greetings = [item for item in self._greetings if item.peer != link.peer]
        logger.info("The link to attention instance %d is down: %s", link.peer, link.reason)

    def _answer_greetings(self) -> None:
        """Says that this end is connected, and its lanes wait for rows from now on."""
        joining = {link.peer for link in self._joining}
        for greeting in self._greetings:
            if greeting.peer not in joining:
                self._answer(greeting)
        self._greetings = [item for item in self._greetings if item.peer in joining]

    def _answer(self, arrival: _core.Arrival) -> None:
        if not any(peer.link.peer == arrival.peer for peer in self._peers.values()):
            return
        try:
            self.session.push(arrival.peer, arrival.lane, arrival.step, arrival.layer, 0, 0)
        except Unavailable:
            logger.debug("Attention instance %d left before its answer", arrival.peer)

    def _look_for_errors(self) -> None:
        errors = self.slots.errors()
        if any(lane.lane for lane in errors):
            names = [lane.lane.name for lane in errors]
            self._make_anew(f"lanes stopped: {names}")
            return
        for source, peer in self._peers.items():
            found = {lane.peers[source].name for lane in errors if lane.peers[source]}
            if found and not peer.is_lost:
                peer.is_lost = True
                self.slots.set_active(source, False)
                self._reset(peer.link, f"its rows ended: {', '.join(sorted(found))}")

    def _make_anew(self, reason: str) -> None:
        links = [peer.link for peer in self._peers.values()] + self._joining
        self.stop()
        for link in links:
            self._reset(link, reason)

    def _reset(self, link: _core.LinkUp, reason: str) -> None:
        logger.warning("The link to attention instance %d breaks: %s", link.peer, reason)
        try:
            self.session.reset_link(link.peer, reason)
        except Unavailable as error:
            logger.debug("It left before its link was made anew: %s", error)
