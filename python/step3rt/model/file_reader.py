"""Owns how bytes of a checkpoint's files reach memory: by positioned reads, several at a time.

It never maps a file: a page that cannot be read, of a file that became shorter or of a network that
fails, would end the process by a signal, without a word; a read says what is wrong.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from step3rt.errors import CheckpointUnreadable

# A cold read is waiting: for a disk that takes several at a time, or for a network.
NUM_READERS = 8
PIECE_BYTES = 8 << 20
"""What one reader takes at a time, of a larger tensor."""


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What tells a file from one that was put in its place, or written to since."""

    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileVersion":
        """The version of a file with this status."""
        return cls(status.st_size, status.st_mtime_ns)


class FileReader:
    """Reads parts of files, as long as they are those that were looked at first."""

    def __init__(self, versions: dict[Path, FileVersion]) -> None:
        """Opens nothing yet; `versions` of all files that will be read."""
        self._versions = versions
        # Open for as long as this is: a load reads thousands of parts, and opening is slow where
        # files are on a network.
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, offset: int, num_bytes: int) -> torch.Tensor:
        """Reads `num_bytes` from `offset` on.

        Returns:
            u8[num_bytes], on the CPU, in memory of its own.

        Raises:
            CheckpointUnreadable: the file cannot be read, or is another one than it was.
        """
        data = torch.empty(num_bytes, dtype=torch.uint8)
        target = data.numpy().data
        try:
            descriptor = self._descriptor(path)

            def fill(begin: int) -> None:
                end = min(begin + PIECE_BYTES, num_bytes)
                while begin < end:
                    count = os.preadv(descriptor, [target[begin:end]], offset + begin)
                    if count == 0:
                        raise CheckpointUnreadable(
                            f"{path}: became shorter while it was read, and ends before byte "
                            f"{offset + end}. Let the copy of the checkpoint end, then start again."
                        )
                    begin += count

            if num_bytes <= PIECE_BYTES:
                fill(0)
            else:
                for _ in _readers().map(fill, range(0, num_bytes, PIECE_BYTES)):
                    pass
        except OSError as error:
            raise CheckpointUnreadable(
                f"{path}: cannot be read ({error.strerror}). The model's weights are in it. Check "
                "the disk or the network file system, then start again."
            ) from error
        return data

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptors[path] = descriptor
        # Each time: a file may be written to in its place, under the same descriptor.
        if FileVersion.of(os.fstat(descriptor)) != self._versions[path]:
            raise CheckpointUnreadable(
                f"{path}: has changed since this process started. What was checked then does not "
                "hold for it. Start again when the copy of the checkpoint has ended."
            )
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_READERS, "checkpoint")
