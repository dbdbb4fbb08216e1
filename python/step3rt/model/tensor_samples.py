"""Samples the values of a checkpoint's tensors, to tell revisions of a model apart at little cost.

Reads a block at each end of a tensor and one every 256 MiB between, at places that depend on its
size alone; never a whole tensor.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from step3rt.errors import CheckpointError
from step3rt.model.file_reader import NUM_READERS
from step3rt.model.tensor_files import TensorEntry

BLOCK_BYTES = 4096
STRIDE_BYTES = 256 << 20


def sample_digests(entries: Mapping[str, TensorEntry]) -> dict[str, bytes]:
    """The SHA-256 of each tensor's sampled bytes, by its name.

    How tensors are cut into files makes no difference, nor where the files lie or how old they are.

    Raises:
        CheckpointError: a file cannot be read.
    """
    by_path: dict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in entries.values():
        by_path[entry.path].append(entry)
    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(NUM_READERS, "samples") as readers:
        for of_file in readers.map(_digests_of_file, by_path, by_path.values()):
            digests |= of_file
    return digests


def sample_spans(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each sample of a tensor of `num_bytes`, ascending, without overlap."""
    if num_bytes <= 2 * BLOCK_BYTES:
        yield 0, num_bytes
        return
    last = num_bytes - BLOCK_BYTES
    for offset in range(0, last - BLOCK_BYTES + 1, STRIDE_BYTES):
        yield offset, BLOCK_BYTES
    yield last, BLOCK_BYTES


def _digests_of_file(path: Path, entries: list[TensorEntry]) -> dict[str, bytes]:
    digests = {}
    try:
        with path.open("rb", buffering=0) as file:
            # Without it, the kernel reads ahead of every block.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for entry in sorted(entries, key=lambda entry: entry.offset):
                digest = hashlib.sha256()
                for offset, num_bytes in sample_spans(entry.num_bytes):
                    digest.update(_read(file.fileno(), entry, offset, num_bytes))
                digests[entry.name] = digest.digest()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check the disk, or copy the file again."
        ) from error
    return digests


def _read(descriptor: int, entry: TensorEntry, offset: int, num_bytes: int) -> bytes:
    data = os.pread(descriptor, num_bytes, entry.offset + offset)
    if len(data) != num_bytes:
        raise CheckpointError(
            f"{entry.path}: became shorter while it was read: tensor {entry.name!r} is cut off. "
            "Let the copy of the checkpoint end, then start again."
        )
    return data
