"""The other process of a device link, for tests: obeys lines of JSON on its standard input.

`{"do": NAME, …}` is answered with one line of JSON. It computes nothing but pushes and waits.
"""

import json
import sys
from typing import Any

import torch

from step3rt.ops.device_link import DeviceLink, LinkShape, StopWord

PATTERN_STEP = 7


def pattern(num_bytes: int, sequence: int, device: torch.device) -> torch.Tensor:
    """Returns u8[1, num_bytes] that differs from frame to frame and from place to place."""
    index = torch.arange(num_bytes, device=device, dtype=torch.int64)
    return ((index * PATTERN_STEP + sequence * 13 + index // 251) % 256).to(torch.uint8)[None]


class Peer:
    """One link and the commands on it."""

    def __init__(self, device: int) -> None:
        torch.cuda.set_device(device)
        self.device = torch.device("cuda", device)
        self.stop = StopWord()
        self.link: DeviceLink | None = None

    def open(self, num_lanes: int, slot_bytes: int) -> str:
        if self.link is not None:
            self.link.close()
        self.link = DeviceLink(LinkShape(num_lanes, slot_bytes), self.device, self.stop)
        return self.link.handle.hex()

    def connect(self, handle: str, epoch: int, wait_limit_ns: int = 1_000_000_000) -> None:
        self._link.connect(bytes.fromhex(handle), epoch, wait_limit_ns)

    def push(self, lane: int, num_bytes: int, sequence: int, num_ctas: int, engine: bool) -> None:
        payload = pattern(num_bytes, sequence, self.device)
        rows = torch.tensor([1 if num_bytes else 0], dtype=torch.int32, device=self.device)
        if engine:
            self._link.push_by_copy_engine(lane, payload, rows)
        else:
            self._link.push(lane, payload, rows, num_ctas)
        torch.cuda.synchronize()

    def echo(self, lane: int, num_bytes: int, num_rounds: int, num_ctas: int) -> list[int]:
        """Waits, checks the payload on the GPU, and pushes it back; returns the rounds' faults."""
        rows = torch.zeros(1, dtype=torch.int32, device=self.device)
        faults = torch.zeros(num_rounds, dtype=torch.int64, device=self.device)
        for index in range(num_rounds):
            self._link.wait(lane, rows, max(num_bytes, 1))
            got = self._link.slot(lane)[:num_bytes]
            want = pattern(num_bytes, index + 1, self.device)[0]
            faults[index] = (got != want).sum()
            self._link.push(lane, got[None], rows, num_ctas)
        return [int(count) for count in faults.cpu()]

    def errors(self) -> list[str]:
        torch.cuda.synchronize()
        return [error.name for error in self._link.errors()]

    @property
    def _link(self) -> DeviceLink:
        if self.link is None:
            raise RuntimeError("`open` comes first")
        return self.link


def main() -> None:
    """Serves until its input ends."""
    peer = Peer(int(sys.argv[1]))
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer = getattr(peer, command.pop("do"))(**command)
        sys.stdout.write(json.dumps({"answer": answer}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
