"""When the lanes of a device FFN instance begin to wait for rows."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch

from step3rt.instance.device_ffn import DeviceFfnLoop
from step3rt.instance.device_links import DEVICE_FABRIC
from step3rt.instance.device_share import DeviceShare
from step3rt.instance.node import Outcome
from step3rt.model.device_ffn import FfnLane
from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, StopWord
from step3rt.ops.stream import Event, Stream

CPU = torch.device("cpu")
SHAPE = AfdShape(
    num_lanes=1, num_sources=1, num_ranks=1, max_tokens=2, hidden_size=128, top_k=1
)  # fmt: skip
PEER = 10


class Session:
    """Brings events, one list for each time that the loop comes round, and notes answers."""

    def __init__(self, rounds: list[Callable[[], list[Any]]]) -> None:
        self._rounds = itertools.chain(rounds, itertools.repeat(list))
        self.answers: list[int] = []

    def poll(self, _timeout_s: float) -> list[Any]:
        return next(self._rounds)()

    def push(self, peer: int, *_frame: int) -> None:
        self.answers.append(peer)

    def set_status(self, _text: str) -> None:
        pass


class Lane:
    """A lane whose steps are over at once."""

    def __init__(self) -> None:
        self.num_replays = 0
        self._stream = Stream(CPU)

    def replay(self) -> Event:
        self.num_replays += 1
        return self._stream.record()


def test_a_lane_begins_and_greetings_are_answered_once_the_other_role_has_loaded() -> None:
    stop, share, lane = StopWord(CPU), DeviceShare(is_colocated=True), Lane()
    source, rank = AttentionSlots(SHAPE, 0, CPU, stop), FfnSlots(SHAPE, 0, CPU, stop)
    link = SimpleNamespace(
        kind="link_up",
        peer=PEER,
        role_rank=0,
        fabric=DEVICE_FABRIC,
        reason="a test",
        epoch=1,
        device_offer=source.handle,
    )
    greeting = SimpleNamespace(kind="arrival", peer=PEER, lane=0, step=0, layer=0)

    def while_loading() -> list[Any]:
        assert (session.answers, lane.num_replays) == ([], 0)
        turn.__exit__(None, None, None)
        return []

    def afterwards() -> list[Any]:
        assert session.answers == [PEER]
        assert lane.num_replays > 0
        return [SimpleNamespace(kind="drain")]

    session = Session([lambda: [link], lambda: [greeting], while_loading, afterwards])
    with share.turn(session, "ffn"):
        pass
    turn = share.turn(session, "attention")
    turn.__enter__()
    loop = DeviceFfnLoop(cast("Any", session), rank, stop, [cast("FfnLane", lane)], share)
    assert loop.run() is Outcome.DRAINED
    for slots in (source, rank):
        slots.close()
