"""Attention and FFN instances that link and count but compute almost nothing, for tests.

A party runs its lanes in threads, each with a stream of its own on a GPU. What an "expert" makes of
a row is its number times the row, so that a source can tell what it should get back, bit for bit.
"""

import contextlib
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from step3rt.ops.afd_link import AfdShape, AttentionSlots, FfnSlots, StopWord
from step3rt.ops.afd_slots import first_expert, local_ids
from step3rt.ops.moe_fp8 import MoeTokens
from step3rt.ops.quantize import dequantize_groups, quantize_groups
from step3rt.ops.rmsnorm_quantize import QuantizedRows

NUM_EXPERTS = 7
"""Of a MoE layer; over 2 or 3 ranks not evenly."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of waits, in seconds."""

    wait_s: float = 20.0
    join_s: float = 0.002


@dataclass(frozen=True, slots=True)
class Walk:
    """What a source does on one lane: `rows` of each step, over layers that are MoE or dense."""

    lane: int
    rows: list[int]
    is_moe: list[bool]
    seed: int = 0


def compute(tokens: MoeTokens, rank: int, num_ranks: int, num_experts: int) -> torch.Tensor:
    """Returns bf16[R, H]: each row times the weighted numbers of its experts at one rank."""
    first = first_expert(num_experts, rank, num_ranks)
    routed = tokens.topk_ids[:, :-1]
    numbers = torch.where(routed >= 0, routed + first + 1, 0).float() * tokens.topk_weights[:, :-1]
    factor = torch.where(tokens.topk_ids[:, -1] >= 0, 0.5 * tokens.topk_weights[:, -1], 0.0)
    for column in numbers.T:  # in one order, however many rows there are
        factor = factor + column
    hidden = dequantize_groups(tokens.hidden, tokens.scales, torch.float32)
    return (hidden * factor[:, None]).bfloat16()


def _on_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.current_stream(device).synchronize()


@dataclass
class SourceParty:
    """An attention instance."""

    device: torch.device
    stop: StopWord = field(init=False)
    slots: AttentionSlots | None = None

    def __post_init__(self) -> None:
        self.stop = StopWord(self.device)

    def open(self, shape: AfdShape, index: int, limits: Limits) -> bytes:
        self.close()
        self.stop.clear()
        wait_ns = int(limits.wait_s * 1e9)
        self.slots = AttentionSlots(shape, index, self.device, self.stop, wait_ns)
        return self.slots.handle

    def connect(self, peer: int, handle: bytes, epoch: int) -> None:
        self._slots.connect(peer, handle, epoch)

    def run(self, walks: list[Walk]) -> dict[str, Any]:
        """Walks all lanes at once; returns faults of values, layers walked and the errors."""
        results: dict[int, tuple[int, int]] = {}
        threads = [
            threading.Thread(target=lambda walk=walk: results.update({walk.lane: self._walk(walk)}))
            for walk in walks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "faults": sum(result[0] for result in results.values()),
            "layers": [results[walk.lane][1] for walk in walks],
            "errors": self._slots.errors(),
        }

    def _walk(self, walk: Walk) -> tuple[int, int]:
        faults, layers = 0, 0
        with _on_stream(self.device):
            for step, num_rows in enumerate(walk.rows):
                for layer, is_moe in enumerate(walk.is_moe):
                    faults += self._layer(walk, (step, layer), num_rows, is_moe=is_moe)
                    if self._slots.errors()[walk.lane].lane:
                        return faults, layers
                    layers += 1
        return faults, layers

    def rows(self, walk: Walk, place: tuple[int, int], num_rows: int) -> tuple[Any, Any]:
        """Returns hidden rows and choices of a layer, of the capacity that holds `num_rows`."""
        shape = self._slots.shape
        capacity = min(max(num_rows, 1) + place[1] % 2, shape.max_tokens)
        seed = hash((walk.seed, self._slots.index, walk.lane, *place))
        generator = torch.Generator().manual_seed(seed & (1 << 60) - 1)
        rows = torch.randn(capacity, shape.hidden_size, generator=generator)
        likes = torch.rand(capacity, NUM_EXPERTS, generator=generator)
        weights, ids = likes.topk(shape.top_k, dim=1)
        hidden = QuantizedRows(*(part.to(self.device) for part in quantize_groups(rows)))
        return hidden, (ids.int().to(self.device), weights.contiguous().to(self.device))

    def _layer(self, walk: Walk, place: tuple[int, int], num_rows: int, *, is_moe: bool) -> int:
        hidden, topk = self.rows(walk, place, num_rows)
        count = torch.tensor([num_rows], dtype=torch.int32, device=self.device)
        is_first = place[1] == 0
        num_experts = NUM_EXPERTS if is_moe else 0
        choices = topk if is_moe else None
        self._slots.send(walk.lane, hidden, choices, count, num_experts, is_first_layer=is_first)
        self._slots.wait(walk.lane, is_first_layer=is_first)
        _finish(self.device)
        if self._slots.errors()[walk.lane].lane:
            return 0
        return self._count_faults(walk.lane, hidden, choices, num_rows)

    def _count_faults(self, lane: int, hidden: QuantizedRows, topk: Any, num_rows: int) -> int:
        shape = self._slots.shape
        num_experts = 0 if topk is None else NUM_EXPERTS
        ids, weights = local_ids(shape, topk, num_rows, num_experts)
        sums = self._slots.sums(lane)
        present = self._slots.present(lane)[: hidden.values.shape[0]].cpu()
        faults = int((present[num_rows:] != 0).sum())
        for rank in range(shape.num_ranks):
            is_here = (ids[rank] >= 0).any(dim=1)
            faults += int(((present[:num_rows] >> rank & 1).bool() != is_here).sum())
            tokens = MoeTokens(
                hidden.values[:num_rows],
                hidden.scales[:num_rows],
                ids[rank].to(self.device),
                weights[rank].to(self.device),
            )
            want = compute(tokens, rank, shape.num_ranks, num_experts)
            faults += int((sums[rank, :num_rows] != want)[is_here.to(self.device)].sum())
        return faults

    def errors(self) -> Any:
        return self._slots.errors()

    def reset(self) -> None:
        self._slots.reset()

    def set_stop(self) -> None:
        self.stop.set()

    def close(self) -> None:
        if self.slots is not None:
            self.stop.set()
            _wait_for(self.device)
            self.slots.close()
            self.slots = None

    @property
    def _slots(self) -> AttentionSlots:
        assert self.slots is not None, "`open` comes first"
        return self.slots


@dataclass
class FfnParty:
    """An FFN rank, serving until it is stopped."""

    device: torch.device
    stop: StopWord = field(init=False)
    slots: FfnSlots | None = None
    threads: list[threading.Thread] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    """Of each lane, the sources that its steps began with."""
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def __post_init__(self) -> None:
        self.stop = StopWord(self.device)

    def open(self, shape: AfdShape, index: int, limits: Limits) -> bytes:
        self.close()
        self.stop.clear()
        limits_ns = (int(limits.wait_s * 1e9), int(limits.join_s * 1e9))
        self.slots = FfnSlots(shape, index, self.device, self.stop, *limits_ns)
        return self.slots.handle

    def connect(self, peer: int, handle: bytes, epoch: int) -> None:
        self._slots.connect(peer, handle, epoch)

    def set_active(self, source: int, is_active: bool) -> None:
        self._slots.set_active(source, is_active)

    def serve(self, is_moe: list[bool]) -> None:
        """Starts to serve all lanes in steps of these layers."""
        lanes = range(self._slots.shape.num_lanes)
        self.steps = [[] for _ in lanes]
        self.barrier = threading.Barrier(len(lanes))
        self.threads = [
            threading.Thread(target=self._serve, args=(lane, is_moe), daemon=True) for lane in lanes
        ]
        for thread in self.threads:
            thread.start()

    def _serve(self, lane: int, is_moe: list[bool]) -> None:
        slots = self._slots
        with _on_stream(self.device):
            # All memory and code of a step is at hand before a kernel waits without a limit.
            compute(slots.tokens(lane), slots.index, slots.shape.num_ranks, NUM_EXPERTS)
            _finish(self.device)
            self.barrier.wait()
            while not slots.errors()[lane].lane:
                for layer, has_experts in enumerate(is_moe):
                    slots.wait(lane, layer == 0)
                    tokens = slots.tokens(lane)
                    num_experts = NUM_EXPERTS if has_experts else 0
                    ranks = slots.shape.num_ranks
                    slots.push(lane, compute(tokens, slots.index, ranks, num_experts))
                    if layer == 0:
                        _finish(self.device)
                        self.steps[lane].append(slots.state(lane).participants)
                _finish(self.device)

    def halt(self) -> Any:
        """Stops serving; returns the errors."""
        self.stop.set()
        for thread in self.threads:
            thread.join()
        self.threads = []
        return self._slots.errors()

    def errors(self) -> Any:
        return self._slots.errors()

    def participants(self) -> list[list[int]]:
        return [list(lane) for lane in self.steps]

    def close(self) -> None:
        if self.slots is not None:
            self.halt()
            _wait_for(self.device)
            self.slots.close()
            self.slots = None

    @property
    def _slots(self) -> FfnSlots:
        assert self.slots is not None, "`open` comes first"
        return self.slots


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


PARTIES: dict[str, Callable[[torch.device], Any]] = {"source": SourceParty, "ffn": FfnParty}


def _serve_calls(pipe: Connection, device: str) -> None:
    """Runs the calls that come through the pipe, and sends back what they return."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    parties = {name: make(torch.device(device)) for name, make in PARTIES.items()}
    with contextlib.suppress(EOFError):
        while True:
            party, call, arguments = pipe.recv()
            try:
                pipe.send((True, getattr(parties[party], call)(*arguments)))
            except Exception as error:
                pipe.send((False, repr(error)))


class RemoteParty:
    """A party in a process of its own; one process may be either role, one after the other."""

    def __init__(self, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve_calls, args=(theirs, str(device)), daemon=True
        )
        self._process.start()
        theirs.close()
        self.role = "source"

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def start(self, call: str, *arguments: Any) -> None:
        self._pipe.send((self.role, call, arguments))

    def answer(self) -> Any:
        if not self._pipe.poll(60):
            raise TimeoutError(f"The {self.role} does not answer")
        is_ok, value = self._pipe.recv()
        if not is_ok:
            raise RuntimeError(value)
        return value

    def do(self, call: str, *arguments: Any) -> Any:
        self.start(call, *arguments)
        return self.answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
