"""What one device instance recorded, and its file.

Owns the file format; clocks are the instance's own, and mean nothing beside another's.
"""

import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from step3rt.errors import InvalidArgument

ROLES = ("attention", "ffn")
TIMES = ("send_begin", "send_end", "wait_begin", "wait_end")
_MAX_FILE_BYTES = 1 << 30

# AFD_TRACE_ROW of ops/afd_slots.py, said again so that a trace can be read without torch.
ROW = np.dtype(
    [
        ("frame", np.uint64),
        *((name, np.uint64) for name in TIMES),
        ("participants", np.uint64),
        ("num_rows", np.uint64),
        ("reserved", np.uint64),
    ]
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Who recorded, in what deployment, and on what device.

    `device`: the same for instances that share a GPU, or the CPU, and its clock; "" if unknown.
    """

    role: str
    rank: int
    num_layers: int
    num_sources: int
    num_ranks: int
    device: str = ""


@dataclass(frozen=True, slots=True)
class Recording:
    """The last layers of each lane of one instance.

    `lanes`: ROW[N], one row per layer, by ascending frame without gaps; times in nanoseconds of
    this instance's clock. An attention instance's frame is sent, then waited for; an FFN
    instance's is waited for, then sent back.
    `group_rows`: i32[S, lanes, layers, groups], rows of each group of experts at S moments, of each
    lane's last step; S is 0 where nobody looked.
    """

    shape: Shape
    lanes: list[npt.NDArray[np.void]]
    group_rows: npt.NDArray[np.int32] = field(
        default_factory=lambda: np.zeros((0, 0, 0, 0), dtype=np.int32)
    )

    @classmethod
    def of_rings(
        cls,
        shape: Shape,
        rings: list[npt.NDArray[np.void]],
        group_rows: npt.NDArray[np.int32] | None = None,
    ) -> "Recording":
        """Orders rows as they lie in the instances' rings, and drops what is not complete.

        A frame lies at its number modulo the ring's size. The frame in progress has times of the
        frame that lay there before.
        """
        lanes = [_complete(ring, shape.role) for ring in rings]
        return cls(shape, lanes) if group_rows is None else cls(shape, lanes, group_rows)

    @property
    def name(self) -> str:
        """As people call the instance."""
        return f"{self.shape.role} {self.shape.rank}"

    def save(self, directory: Path) -> Path:
        """Writes `<role>-<rank>.npz` and returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.shape.role}-{self.shape.rank}.npz"
        meta = np.frombuffer(json.dumps(asdict(self.shape)).encode(), dtype=np.uint8)
        lanes = {f"lane{index}": rows for index, rows in enumerate(self.lanes)}
        np.savez_compressed(path, meta=meta, group_rows=self.group_rows, **lanes)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Reads a file of `save`.

        Raises:
            InvalidArgument: it is not one.
        """
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                shape = Shape(**json.loads(bytes(file["meta"])))
                names = sorted((name for name in file.files if name[:4] == "lane"), key=_lane_of)
                lanes = [file[name] for name in names]
                group_rows = file["group_rows"]
            is_known = shape.role in ROLES and all(rows.dtype == ROW for rows in lanes)
            if not is_known or group_rows.dtype != np.int32 or group_rows.ndim != 4:
                raise ValueError("its fields are not those of a recording")
        except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
            raise InvalidArgument(
                f"{str(path)!r} is not a recording: {error}. Instances with --trace-dir write "
                "them. Give such a directory"
            ) from error
        return cls(shape, lanes, group_rows)


def load_all(directory: Path) -> list[Recording]:
    """Reads all recordings of a directory: attention instances by rank, then FFN instances.

    Raises:
        InvalidArgument: a file is not a recording, or one of the deployment is missing.
    """
    found = [Recording.load(path) for path in sorted(directory.glob("*.npz"))]
    if not found:
        raise InvalidArgument(
            f"{str(directory)!r} holds no recordings, or does not exist. Instances of the "
            "device pipeline with --trace-dir write one each, when their session ends. Give "
            "such a directory"
        )
    found.sort(key=lambda each: (ROLES.index(each.shape.role), each.shape.rank))
    sizes = {(each.shape.num_sources, each.shape.num_ranks) for each in found}
    if len(sizes) > 1:
        raise InvalidArgument(
            f"{str(directory)!r} has recordings of deployments of {sorted(sizes)} attention and "
            "FFN instances. A timeline is of one of them. Remove what other runs have left"
        )
    have = [each.name for each in found]
    [(num_sources, num_ranks)] = sizes
    want = [f"attention {rank}" for rank in range(num_sources)]
    want += [f"ffn {rank}" for rank in range(num_ranks)]
    if have != want:
        raise InvalidArgument(
            f"{str(directory)!r} has the recordings of {', '.join(have)}; its deployment is "
            f"{', '.join(want)}. A timeline needs all of them: one that is killed leaves none. "
            "Let all instances write to one directory, and end on their own"
        )
    return found


def _lane_of(name: str) -> int:
    return int(name.removeprefix("lane"))


def _complete(ring: npt.NDArray[np.void], role: str) -> npt.NDArray[np.void]:
    first, last = ("send", "wait") if role == "attention" else ("wait", "send")
    order = [f"{first}_begin", f"{first}_end", f"{last}_begin", f"{last}_end"]
    times = np.stack([ring[name].astype(np.int64) for name in order])
    is_whole = (times > 0).all(axis=0) & (np.diff(times, axis=0) >= 0).all(axis=0)
    rows = np.sort(ring[is_whole], order=order[0])
    # What lies before a gap belongs to an older turn of the ring, or to links made anew since.
    gaps = np.flatnonzero(np.diff(rows["frame"].astype(np.int64)) != 1)
    return rows[gaps[-1] + 1 :] if len(gaps) else rows
