"""Measures a link between two GPUs of this host: two processes, CUDA graphs, no CPU between frames.

Run by `step3rt bench link --fabric cuda_ipc`. It measures and reports; it decides nothing.
"""

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from step3rt.errors import Unavailable
from step3rt.ops import launch
from step3rt.ops.device_link import DEFAULT_PUSH_CTAS, DeviceLink, LinkShape, StopWord

NUM_ROUNDS = 100_000
ROUNDS_PER_LAUNCH = 5_000
BULK_BYTES = 4 << 20
"""Above, rounds are fewer: the time of one is far above that of a signal."""

BULK_ROUNDS = 4_000
CTA_CHOICES = (16, 32, 64)
NODES_PER_GRAPH = 1_000
NUM_GRAPH_REPLAYS = 6
WAIT_LIMIT_NS = 5_000_000_000
LOAD_BYTES = 1 << 30

_PING_PONG_THREADS = 512


def measure(num_bytes: int, num_ctas: int | None = None) -> dict[str, Any]:
    """Returns one-way times of frames of `num_bytes`, and a peer copy of as many in the same run.

    Args:
        num_bytes: Payload, a multiple of 16.
        num_ctas: SMs that copy; None measures several counts and reports the fastest.

    Raises:
        Unavailable: this host has no two GPUs that reach each other.
    """
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        raise Unavailable(
            "This host has no two GPUs with access to each other's memory. The link is between "
            "GPUs. Run it on a host with NVLink; `nvidia-smi topo -m` shows the links"
        )
    end = _End(0, num_bytes)
    peer = _Peer(1, num_bytes)
    try:
        peer.call("connect", handle=end.link.handle.hex())
        end.connect(peer.handle)
        choices = [num_ctas] if num_ctas is not None else _choices(num_bytes)
        runs = {}
        for ctas in choices:
            size = {"num_bytes": num_bytes, "num_ctas": ctas, "num_rounds": _num_rounds(num_bytes)}
            peer.start("ping_pong", **size)
            rounds_us = end.ping_pong(starts=True, **size)
            peer.answer()
            runs[ctas] = _quantiles(rounds_us / 2)
        best = min(runs, key=lambda ctas: runs[ctas]["p50"])
        nodes = {}
        for ctas in (*choices, 0):
            peer.start("nodes", num_ctas=ctas, starts=False)
            times = end.nodes(ctas, starts=True)
            answer = peer.answer()
            name = f"push_{ctas}_ctas" if ctas else "copy_engine"
            nodes[name] = times | {"peer_cpu_switches": answer["cpu_switches"]}
        copy_us = end.peer_copy_us(num_bytes)
        slowdown = _measure_slowdown(end, peer, num_bytes, min(best, DEFAULT_PUSH_CTAS))
    finally:
        peer.close()
        end.link.close()
    one_way = runs[best]
    return {
        "fabric": "cuda_ipc",
        "bytes": num_bytes,
        "peers": 2,
        "one_way_us": one_way,
        "gb_per_s": round(num_bytes / one_way["p50"] / 1e3, 1),
        "rounds": _num_rounds(num_bytes),
        "ctas": best,
        "one_way_us_by_ctas": {str(ctas): run["p50"] for ctas, run in runs.items()},
        "graph_nodes_one_way_us": nodes,
        "receiver_slowdown": slowdown,
        "baseline": {
            "name": "peer copy",
            "one_way_us": {"p50": round(copy_us, 2)},
            "gb_per_s": round(num_bytes / copy_us / 1e3, 1),
        },
        "machine": f"{torch.cuda.device_count()} {torch.cuda.get_device_name(0)}",
    }


class _End:
    """One process's end: the link, and the graphs that use it."""

    def __init__(self, device: int, num_bytes: int) -> None:
        torch.cuda.set_device(device)
        self.device = torch.device("cuda", device)
        self.stop = StopWord()
        self.link = DeviceLink(LinkShape(1, max(num_bytes, 16)), self.device, self.stop)
        self.payload = torch.randint(
            0, 255, (1, max(num_bytes, 16)), dtype=torch.uint8, device=self.device
        )
        self.one = torch.ones(1, dtype=torch.int32, device=self.device)
        self.rows = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.load: torch.Tensor | None = None

    def connect(self, handle: str) -> None:
        self.link.connect(bytes.fromhex(handle), epoch=1, wait_limit_ns=WAIT_LIMIT_NS)

    def ping_pong(
        self, num_bytes: int, num_ctas: int, num_rounds: int, starts: bool
    ) -> np.ndarray[Any, Any]:
        """Returns the microseconds of every round, there and back."""
        per_launch = min(ROUNDS_PER_LAUNCH, num_rounds)
        cycles = torch.zeros(per_launch + 3, dtype=torch.int64, device=self.device)
        seen = torch.zeros(1, dtype=torch.int32, device=self.device)
        threads = _PING_PONG_THREADS if num_bytes > 1024 else 32
        kernel = launch.Kernel("link/sm90_u64_link_ping_pong.cu", num_threads=threads)
        arguments = (
            launch.pointer(self.link.lane(0)),
            launch.pointer(self.payload),
            np.uint32(num_bytes),
            np.int32(per_launch),
            np.int32(starts),
            launch.pointer(cycles),
            launch.pointer(seen),
        )
        # Loads the kernel outside the capture; a failed lane makes it return at once.
        state = self.link.lanes.clone()
        self.link.lanes.view(torch.int32)[15] = 1  # LinkLane.error
        kernel.launch(self.device, num_ctas, arguments)
        self.link.lanes.copy_(state)
        graph = _capture([lambda: kernel.launch(self.device, num_ctas, arguments)])
        rounds = []
        for _ in range(num_rounds // per_launch):
            seen.zero_()
            graph.replay()
            torch.cuda.synchronize()
            self._check()
            stamps = cycles.cpu().numpy().astype(np.float64)
            total_ns = stamps[per_launch + 2] - stamps[per_launch + 1]
            ticks = stamps[: per_launch + 1]
            scale = total_ns / (ticks[-1] - ticks[0]) / 1e3
            rounds.append(np.diff(ticks)[1:] * scale)  # the first waits for the peer's launch
        return np.concatenate(rounds)

    def nodes(self, num_ctas: int, starts: bool) -> dict[str, Any]:
        """Times pushes and waits that are nodes of one CUDA graph, as the layers of a step are.

        Without CTAs a copy engine moves the payload.
        """
        row_bytes = self.payload.shape[1]

        def push() -> None:
            if num_ctas:
                self.link.push(0, self.payload, self.one, num_ctas)
            else:
                self.link.push_by_copy_engine(0, self.payload, self.one)

        def wait() -> None:
            self.link.wait(0, self.rows, row_bytes)

        turns: list[Callable[[], None]] = [push, wait] if starts else [wait, push]
        self._load_kernels(turns)
        graph = _capture(turns * NODES_PER_GRAPH)
        times_us, switches = [], 0
        for _ in range(NUM_GRAPH_REPLAYS):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            switches += resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
            times_us.append(begin.elapsed_time(end) * 1e3 / NODES_PER_GRAPH / 2)
            self._check()
        frames = NUM_GRAPH_REPLAYS * NODES_PER_GRAPH
        return {
            "p50": round(statistics.median(times_us[2:]), 2),
            "cpu_switches": switches,
            "frames": frames,
        }

    def peer_copy_us(self, num_bytes: int) -> float:
        """Times the copy engine alone, into the peer's slot; no flag, nobody waits for it."""
        target = self.link.peer_slot(0)[: max(num_bytes, 16)]
        source = self.payload.flatten()
        graph = _capture([lambda: target.copy_(source)] * 50)
        return _median_us(graph, 50)

    def stream_us(self) -> float:
        """Times a memory-bound kernel over 1 GiB, read and written."""
        if self.load is None:
            self.load = torch.zeros(2, LOAD_BYTES // 4, dtype=torch.float32, device=self.device)
        source, target = self.load
        graph = _capture([lambda: torch.add(source, 1.0, out=target)] * 4)
        return _median_us(graph, 4)

    def push_always(self, num_bytes: int, num_ctas: int, num_pushes: int) -> float:
        """Pushes without waiting for credit; returns the microseconds of one."""
        push = self.link.push
        graph = _capture([lambda: push(0, self.payload, self.one, num_ctas)] * 50)
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(max(1, num_pushes // 50)):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / (max(1, num_pushes // 50) * 50)

    def _load_kernels(self, turns: Sequence[Callable[[], None]]) -> None:
        """Loads them outside the capture, with a failed lane: they return at once."""
        state = self.link.lanes.clone()
        self.link.lanes.view(torch.int32)[15] = 1
        for turn in turns:
            turn()
        self.link.lanes.copy_(state)
        torch.cuda.synchronize()

    def _check(self) -> None:
        error = self.link.errors()[0]
        if error:
            raise Unavailable(
                f"The link stopped with {error.name}. A frame did not arrive. Run "
                "`pytest -m multi_gpu tests/kernels/test_device_link.py`"
            )


class _Peer:
    """The other process."""

    def __init__(self, device: int, num_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "step3rt.bench.device_link", str(device), str(num_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.handle: str = self.answer()

    def start(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable("The peer process has died. Its output says why")
        return json.loads(line)["answer"]

    def call(self, do: str, **arguments: Any) -> Any:
        self.start(do, **arguments)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _serve(device: int, num_bytes: int) -> None:
    """The peer process: obeys until its input ends."""
    end = _End(device, num_bytes)

    def say(answer: Any) -> None:
        sys.stdout.write(json.dumps({"answer": answer}) + "\n")
        sys.stdout.flush()

    say(end.link.handle.hex())
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "ping_pong":
            end.ping_pong(starts=False, **command)
            say(None)
        else:
            say(getattr(end, do)(**command))


def _measure_slowdown(end: _End, peer: _Peer, num_bytes: int, num_ctas: int) -> dict[str, Any]:
    """How much slower a memory-bound kernel on the receiver gets under a continuous push."""
    alone = peer.call("stream_us")
    one = end.push_always(num_bytes, num_ctas, 100)
    num_pushes = int(60 * alone * 12 / one)  # longer than the measurement below
    peer.start("stream_us")
    push_us = end.push_always(num_bytes, num_ctas, num_pushes)
    loaded = peer.answer()
    return {
        "alone_us": round(alone, 1),
        "under_push_us": round(loaded, 1),
        "ratio": round(loaded / alone, 3),
        "push_gb_per_s": round(num_bytes / push_us / 1e3, 1),
    }


def _choices(num_bytes: int) -> Sequence[int]:
    return (1,) if num_bytes <= 1024 else CTA_CHOICES


def _num_rounds(num_bytes: int) -> int:
    return NUM_ROUNDS if num_bytes <= BULK_BYTES else BULK_ROUNDS


def _quantiles(values_us: np.ndarray[Any, Any]) -> dict[str, float]:
    p50, p99 = np.percentile(values_us, (50, 99))
    return {"p50": round(p50, 2), "p99": round(p99, 2), "max": round(float(values_us.max()), 2)}


def _capture(launches: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for one in launches:
            one()
    return graph


def _median_us(graph: torch.cuda.CUDAGraph, num_launches: int) -> float:
    times_us = []
    for _ in range(15):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(begin.elapsed_time(end) * 1e3 / num_launches)
    return float(statistics.median(times_us[3:]))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
