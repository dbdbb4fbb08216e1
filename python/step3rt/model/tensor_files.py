"""Owns a model directory's safetensors files: finds them, checks them, reads tensors out of them.

Never allocates by a size that a file states before that size has been checked against the file,
and never executes anything from it.
"""

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step3rt.errors import CheckpointError, ConfigError
from step3rt.model.config import parse_json_object, read_json_object
from step3rt.model.file_reader import FileReader, FileVersion

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The format's own limit on a header; an index of the same tensors is smaller.
MAX_HEADER_BYTES = 100_000_000
HEADER_LENGTH_BYTES = 8
MAX_TENSOR_BYTES = 1 << 62
MAX_DIMS = 8

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Bytes of the format's further dtypes: legal in a file (a vision tower's, say), never read.
OTHER_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "U16": 2, "I16": 2,
    "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` bytes at `offset` of `path`, row-major."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class TensorFiles:
    """The tensors of a model directory by name, checked for consistency but not yet read."""

    def __init__(self, directory: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.directory = directory
        self.entries = entries
        paths = {entry.path for entry in entries.values()}
        self._reader = FileReader({path: FileVersion.of(path.stat()) for path in paths})

    @classmethod
    def open(cls, directory: Path) -> "TensorFiles":
        """Reads the header of every file of a model directory.

        Raises:
            CheckpointError: a file is missing, outside of the directory, truncated or inconsistent.
        """
        index_path, single_path = directory / INDEX_FILE, directory / SINGLE_FILE
        if index_path.exists() and single_path.exists():
            raise CheckpointError(
                f"{directory}: holds both {INDEX_FILE} and {SINGLE_FILE}. It is not clear which "
                "one is meant. Remove one of them."
            )
        if index_path.exists():
            return cls(directory, _read_sharded(directory, index_path))
        if single_path.exists():
            path = _inside(directory, SINGLE_FILE, str(directory))
            return cls(directory, {entry.name: entry for entry in read_header(path)})
        raise CheckpointError(
            f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}. A checkpoint needs one "
            "of them. Check the model path."
        )

    def read(self, entry: TensorEntry, rows: slice | None = None) -> torch.Tensor:
        """Reads a tensor, or rows [start, stop) of its first dim and nothing else.

        Returns:
            The rows in the entry's dtype, contiguous, on the CPU.

        Raises:
            CheckpointUnreadable: its file cannot be read, or is another one than it was.
        """
        shape, offset, num_bytes = entry.shape, entry.offset, entry.num_bytes
        if rows is not None:
            row_bytes = num_bytes // shape[0]
            shape = (rows.stop - rows.start, *shape[1:])
            offset, num_bytes = offset + rows.start * row_bytes, shape[0] * row_bytes
        data = self._reader.read(entry.path, offset, num_bytes)
        return data.view(DTYPES[entry.dtype]).view(shape)


def read_header(path: Path) -> list[TensorEntry]:
    """Reads and checks the header of one safetensors file.

    The data section must be covered exactly by the tensors, without gap or overlap:

        | length u64 | header: JSON, length bytes | tensor | tensor | … | end of file

    Raises:
        CheckpointError: it is not so.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length_field = file.read(HEADER_LENGTH_BYTES)
            header_bytes = int.from_bytes(length_field, "little")
            data_start = HEADER_LENGTH_BYTES + header_bytes
            if len(length_field) < HEADER_LENGTH_BYTES or data_start > file_bytes:
                raise CheckpointError(
                    f"{path}: truncated: {file_bytes} bytes cannot hold a header of "
                    f"{header_bytes} bytes. Download the file again."
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header states {header_bytes} bytes. The format allows "
                    f"{MAX_HEADER_BYTES}. Check that the file is a safetensors file."
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check that it exists and is readable."
        ) from error
    header = _parse_header(text, path)
    entries = [
        _parse_entry(path, name, value, data_start)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    _check_coverage(path, entries, data_start, file_bytes)
    return entries


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_json_object(text, path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _parse_entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r:.200}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: its header entry must have dtype, shape and data_offsets. "
            "Download the file again."
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if isinstance(dtype, str) and dtype in DTYPES:
        item_bytes = DTYPES[dtype].itemsize
    elif isinstance(dtype, str) and dtype in OTHER_DTYPE_BYTES:
        item_bytes = OTHER_DTYPE_BYTES[dtype]
    else:
        raise CheckpointError(f"{where}: dtype {dtype!r:.40} is not one of safetensors.")
    if not _are_sizes(shape, MAX_DIMS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape and data_offsets must be lists of sizes, found {shape!r:.80} and "
            f"{offsets!r:.80}. Download the file again."
        )
    begin, end = offsets
    num_bytes = math.prod(shape) * item_bytes
    if num_bytes != end - begin:
        raise CheckpointError(
            f"{where}: shape {shape!r:.80} of {dtype} takes {num_bytes} bytes, data_offsets "
            f"{begin}..{end} span {end - begin}. Download the file again."
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, num_bytes)


def _are_sizes(value: Any, max_items: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= max_items
        and all(
            isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_TENSOR_BYTES
            for item in value
        )
    )


def _check_coverage(
    path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int
) -> None:
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset != end:
            kind = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} at byte {entry.offset} {kind}, which ends at "
                f"{end}. Download the file again."
            )
        end = entry.offset + entry.num_bytes
        if end > file_bytes:
            raise CheckpointError(
                f"{path}: truncated: tensor {entry.name!r} ends at byte {end}, the file at "
                f"{file_bytes}. Download the file again."
            )
    if end != file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - end} surplus bytes after the last tensor. "
            "Download the file again."
        )


def _read_sharded(directory: Path, index_path: Path) -> dict[str, TensorEntry]:
    try:
        index = read_json_object(index_path, MAX_HEADER_BYTES)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map must be an object that names each tensor's file."
        )
    paths: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name not in paths:
            path = _inside(directory, file_name, f"{index_path}: tensor {name!r:.200}")
            paths[file_name] = path
    entries: dict[str, TensorEntry] = {}
    for file_name, path in paths.items():
        for entry in read_header(path):
            if weight_map.get(entry.name) != file_name:
                raise CheckpointError(
                    f"{path}: tensor {entry.name!r} is extra: {INDEX_FILE} expects it in "
                    f"{weight_map.get(entry.name)!r}. Download the checkpoint again."
                )
            entries[entry.name] = entry
    for name, file_name in weight_map.items():
        if name not in entries:
            raise CheckpointError(
                f"{directory / file_name}: tensor {name!r} is missing: {INDEX_FILE} promises it. "
                "Download the checkpoint again."
            )
    return entries


def _inside(directory: Path, file_name: Any, named_by: str) -> Path:
    """Returns the path of a regular file of the directory, wherever a link in it leads.

    A download cache keeps files in `blobs` beside `snapshots/<revision>`, linked from the latter;
    that one place outside of the directory is allowed as well.

    Raises:
        CheckpointError: the name has a directory part, or the file lies elsewhere.
    """
    if not isinstance(file_name, str) or file_name != Path(file_name).name or not file_name:
        raise CheckpointError(
            f"{named_by} is said to be in the file {file_name!r:.200}. A shard must be a "
            "plain file name in the same directory. Correct the index."
        )
    path = directory / file_name
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is missing ({error}). {named_by} should be in it. "
            "Download the checkpoint again."
        ) from error
    root = directory.resolve()
    allowed = {root, root.parent.parent / "blobs"} if root.parent.name == "snapshots" else {root}
    if resolved.parent not in allowed or not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path}: leads to {resolved}. A checkpoint's files must be regular files of its own "
            "directory. Copy the file there."
        )
    return path
