"""Device links between processes on two GPUs, and on four."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from step3rt.errors import InvalidArgument, Unavailable
from step3rt.ops.device_link import LINK_LANE, DeviceLink, LinkError, LinkShape, StopWord
from tests.kernels.link_peer import pattern

multi_gpu = pytest.mark.multi_gpu

SLOT_BYTES = 28 * 1024 * 1024
NUM_GPUS = 4
"""For the tests of more than one link."""

PAIRS = [(0, 1), (3, 2)]
"""GPUs of this process and its peer; the second pair where there are four."""

SIZES = [0, 16, 64, 1008, 114_688, 917_504, 1_835_008, SLOT_BYTES]


class Peer:
    """The other process, seen from here."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.link_peer", str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has died"
        return json.loads(line)["answer"]

    def do(self, do: str, **arguments: Any) -> Any:
        self.start(do, **arguments)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:
            pass  # waits and closes the pipes


class World:
    """A link between this process on GPU `device` and a peer on another."""

    epochs = itertools.count(1)

    def __init__(self, peer: Peer, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.stop = StopWord()
        self.link = DeviceLink(LinkShape(2, SLOT_BYTES), self.device, self.stop)
        self.rows = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.one = torch.ones(1, dtype=torch.int32, device=self.device)
        self.meet(peer)

    def meet(self, peer: Peer) -> None:
        self.peer = peer
        epoch = next(self.epochs)
        handle = peer.do("open", num_lanes=2, slot_bytes=SLOT_BYTES)
        peer.do("connect", handle=self.link.handle.hex(), epoch=epoch)
        self.link.connect(bytes.fromhex(handle), epoch)

    def push(self, lane: int, num_bytes: int, sequence: int, num_ctas: int = 16) -> None:
        payload = pattern(max(num_bytes, 16), sequence, self.device)
        rows = self.one if num_bytes else torch.zeros_like(self.one)
        self.link.push(lane, payload, rows, num_ctas)

    def wait(self, lane: int, num_bytes: int) -> None:
        self.link.wait(lane, self.rows, max(num_bytes, 1))

    def close(self) -> None:
        self.stop.set()
        torch.cuda.synchronize(self.device)
        self.link.close()


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"gpus-{pair[0]}-{pair[1]}")
def peers(request: pytest.FixtureRequest) -> Iterator[list[Peer]]:
    own, other = request.param
    if torch.cuda.device_count() <= max(own, other):
        pytest.skip(f"{max(own, other) + 1} GPUs are needed")
    peers = [Peer(other)]
    with torch.cuda.device(own):
        yield peers
    for peer in peers:
        peer.kill()


@pytest.fixture
def world(peers: list[Peer]) -> Iterator[World]:
    if peers[-1].process.poll() is not None:
        peers.append(Peer(peers[-1].device))
    world = World(peers[-1], torch.cuda.current_device())
    yield world
    world.close()


STARS = [
    pytest.param(NUM_GPUS, id="four-gpus", marks=multi_gpu),
    # The processes take turns on it, so that nothing is at the same time; the rest is as on four.
    pytest.param(1, id="one-gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=STARS)
def star(request: pytest.FixtureRequest) -> Iterator[list[World]]:
    """Links of this process on GPU 0 with three peers at once, on a GPU each or on the same."""
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed")
    with torch.cuda.device(0):
        worlds = [World(Peer(peer % request.param), 0) for peer in range(1, NUM_GPUS)]
        yield worlds
        for world in worlds:
            world.close()
            world.peer.kill()


def test_a_links_sizes_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="multiple of 16"):
        LinkShape(num_lanes=1, slot_bytes=100)
    with pytest.raises(InvalidArgument, match="0 lanes"):
        LinkShape(num_lanes=0, slot_bytes=16)


def test_slots_and_flags_do_not_overlap() -> None:
    shape = LinkShape(num_lanes=3, slot_bytes=1008)
    assert shape.slots_offset >= 3 * 128
    assert shape.slot_stride_bytes >= 1008
    assert shape.region_bytes == shape.slots_offset + 3 * shape.slot_stride_bytes
    assert LINK_LANE.itemsize == 128


@multi_gpu
@pytest.mark.parametrize("num_bytes", SIZES)
@pytest.mark.parametrize("num_ctas", [1, 16, 128])
def test_every_frame_arrives_whole_and_in_order(
    world: World, num_bytes: int, num_ctas: int
) -> None:
    rounds = 4 if num_bytes > 1 << 20 else 20
    size = {"num_bytes": num_bytes, "num_rounds": rounds, "num_ctas": num_ctas}
    world.peer.start("echo", lane=0, **size)
    faults = torch.zeros(rounds, dtype=torch.int64, device=world.device)
    for index in range(rounds):
        world.push(0, num_bytes, index + 1, num_ctas)
        world.wait(0, num_bytes)
        want = pattern(num_bytes, index + 1, world.device)[0]
        faults[index] = (world.link.slot(0)[:num_bytes] != want).sum()
    assert world.peer.answer() == [0] * rounds
    assert faults.sum() == 0
    assert world.link.errors() == [LinkError.OK, LinkError.OK]
    assert world.link.state()["received"].tolist() == [rounds, 0]


@multi_gpu
def test_a_captured_graph_plays_again_with_the_next_sequence_numbers(world: World) -> None:
    world.push(0, 64, 1)
    stream = torch.cuda.Stream()
    payload = pattern(64, 9, world.device)
    graph = torch.cuda.CUDAGraph()
    world.peer.start("echo", lane=0, num_bytes=64, num_rounds=1, num_ctas=1)
    world.wait(0, 64)
    assert world.peer.answer() == [0]
    with torch.cuda.graph(graph, stream=stream):
        world.link.push(0, payload, world.one, 1)
        world.link.wait(0, world.rows, 64)
    for index in range(5):
        world.peer.start("echo", lane=0, num_bytes=64, num_rounds=1, num_ctas=1)
        graph.replay()
        torch.cuda.synchronize()
        world.peer.answer()
        assert int(world.rows) == 1
        assert world.link.state()["received"][0] == index + 2
    assert torch.equal(world.link.slot(0)[:64], payload[0])


@multi_gpu
def test_the_copy_engine_delivers_what_the_kernel_does(world: World) -> None:
    size = 917_504
    world.peer.start("push", lane=1, num_bytes=size, sequence=5, num_ctas=1, engine=True)
    world.wait(1, size)
    assert world.peer.answer() is None
    assert torch.equal(world.link.slot(1)[:size], pattern(size, 5, world.device)[0])
    assert int(world.rows) == 1


@multi_gpu
def test_data_stay_whole_while_kernels_load_the_memory_and_lanes_cross(world: World) -> None:
    rounds, size = 30, 917_504
    busy = torch.empty(1 << 28, dtype=torch.uint8, device=world.device)
    load = torch.cuda.Stream()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    rows = [torch.zeros(1, dtype=torch.int32, device=world.device) for _ in streams]
    faults = torch.zeros(2, rounds, dtype=torch.int64, device=world.device)
    frames = [pattern(size, index + 1, world.device) for index in range(rounds)]
    torch.cuda.synchronize()
    with torch.cuda.stream(load):
        for _ in range(200):
            busy[: 1 << 27].copy_(busy[1 << 27 :])
    for lane, stream in enumerate(streams):
        world.peer.start("echo", lane=lane, num_bytes=size, num_rounds=rounds, num_ctas=16)
        with torch.cuda.stream(stream):
            for index, frame in enumerate(frames):
                world.link.push(lane, frame, world.one)
                world.link.wait(lane, rows[lane], size)
                faults[lane, index] = (world.link.slot(lane)[:size] != frame[0]).sum()
        assert world.peer.answer() == [0] * rounds
    torch.cuda.synchronize()
    assert faults.sum() == 0
    assert world.link.errors() == [LinkError.OK, LinkError.OK]


@multi_gpu
def test_a_silent_peer_ends_the_wait_in_time_with_an_error(world: World) -> None:
    started = time.monotonic()
    world.wait(0, 64)
    torch.cuda.synchronize()
    assert 0.9 < time.monotonic() - started < 1.5
    assert world.link.errors()[0] is LinkError.TIMED_OUT
    assert int(world.rows) == 0
    world.push(0, 64, 1)  # a failed lane sends nothing
    torch.cuda.synchronize()
    assert world.link.state()["sent"][0] == 0


@multi_gpu
def test_the_hosts_word_ends_a_wait_at_once(world: World) -> None:
    world.wait(0, 64)
    time.sleep(0.05)
    started = time.monotonic()
    world.stop.set()
    torch.cuda.synchronize()
    assert time.monotonic() - started < 0.1
    assert world.link.errors()[0] is LinkError.STOPPED


@multi_gpu
def test_a_killed_peer_is_an_error_within_a_second_and_a_new_one_can_be_linked(
    world: World, peers: list[Peer]
) -> None:
    world.push(0, 64, 1)
    world.wait(0, 64)
    world.peer.kill()
    started = time.monotonic()
    torch.cuda.synchronize()
    assert time.monotonic() - started < 1.2
    assert world.link.errors()[0] is LinkError.TIMED_OUT
    peers.append(Peer(world.peer.device))
    world.meet(peers[-1])
    world.peer.start("echo", lane=0, num_bytes=64, num_rounds=1, num_ctas=1)
    world.push(0, 64, 1)
    world.wait(0, 64)
    assert world.peer.answer() == [0]
    assert world.link.errors()[0] is LinkError.OK
    assert torch.equal(world.link.slot(0)[:64], pattern(64, 1, world.device)[0])


@multi_gpu
def test_a_frame_of_another_epoch_or_out_of_turn_is_refused(world: World) -> None:
    handle = world.peer.do("open", num_lanes=2, slot_bytes=SLOT_BYTES)
    world.link.connect(bytes.fromhex(handle), epoch=1007)
    world.peer.do("connect", handle=world.link.handle.hex(), epoch=1008)
    world.peer.do("push", lane=0, num_bytes=64, sequence=1, num_ctas=1, engine=False)
    world.wait(0, 64)
    world.peer.do("connect", handle=world.link.handle.hex(), epoch=1007)
    for sequence in (1, 2):  # without waiting for credit
        world.peer.do("push", lane=1, num_bytes=64, sequence=sequence, num_ctas=1, engine=False)
    world.wait(1, 64)
    assert world.link.errors() == [LinkError.WRONG_SEQUENCE, LinkError.WRONG_SEQUENCE]


@multi_gpu
def test_a_frame_of_an_older_epoch_is_not_taken_for_a_new_one(world: World) -> None:
    world.peer.do("push", lane=0, num_bytes=64, sequence=1, num_ctas=1, engine=False)
    handle = world.peer.do("open", num_lanes=2, slot_bytes=SLOT_BYTES)
    world.link.connect(bytes.fromhex(handle), epoch=1 << 20)
    world.wait(0, 64)
    torch.cuda.synchronize()
    assert world.link.errors()[0] is LinkError.TIMED_OUT


@multi_gpu
def test_memory_of_a_dead_process_cannot_be_mapped(world: World) -> None:
    handle = world.peer.do("open", num_lanes=1, slot_bytes=64)
    world.peer.kill()
    with pytest.raises(Unavailable, match="cannot be mapped"):
        world.link.connect(bytes.fromhex(handle), epoch=50)


@multi_gpu
def test_what_does_not_fit_a_slot_is_refused(world: World) -> None:
    payload = torch.zeros(1, SLOT_BYTES + 16, dtype=torch.uint8, device=world.device)
    with pytest.raises(ValueError, match="a slot holds"):
        world.link.push(0, payload, world.one)
    too_many = torch.full((1,), 2, dtype=torch.int32, device=world.device)
    world.link.push(0, payload[:, :SLOT_BYTES], too_many)
    torch.cuda.synchronize()
    assert world.link.errors()[0] is LinkError.WRONG_LENGTH


def exchange(worlds: list[World], num_bytes: int, rounds: int) -> torch.Tensor:
    """Has all peers echo frames at the same time; i64[worlds, rounds], bytes that came back wrong.

    Each link has a stream of its own, so that frames of all of them are on their way together.
    """
    faults = torch.zeros(len(worlds), rounds, dtype=torch.int64, device=worlds[0].device)
    streams = [torch.cuda.Stream(world.device) for world in worlds]
    for world in worlds:
        world.peer.start("echo", lane=0, num_bytes=num_bytes, num_rounds=rounds, num_ctas=16)
    torch.cuda.synchronize()
    for index in range(rounds):
        for link, (world, stream) in enumerate(zip(worlds, streams, strict=True)):
            with torch.cuda.stream(stream):
                world.push(0, num_bytes, index + 1)
                world.wait(0, num_bytes)
                want = pattern(num_bytes, index + 1, world.device)[0]
                faults[link, index] = (world.link.slot(0)[:num_bytes] != want).sum()
    torch.cuda.synchronize()
    return faults


@pytest.mark.parametrize("num_bytes", [64, 917_504, SLOT_BYTES])
def test_frames_of_three_peers_at_once_arrive_whole(star: list[World], num_bytes: int) -> None:
    rounds = 100 if num_bytes < SLOT_BYTES else 10
    assert exchange(star, num_bytes, rounds).sum() == 0
    for world in star:
        assert world.peer.answer() == [0] * rounds
        assert world.link.errors()[0] is LinkError.OK


def test_one_peer_of_three_that_is_killed_costs_the_others_nothing(star: list[World]) -> None:
    lost, *others = star
    lost.wait(0, 64)
    lost.peer.kill()
    started = time.monotonic()
    assert exchange(others, 917_504, 20).sum() == 0
    assert time.monotonic() - started < 2.5
    assert lost.link.errors()[0] is LinkError.TIMED_OUT
    for world in others:
        assert world.peer.answer() == [0] * 20
        assert world.link.errors()[0] is LinkError.OK
