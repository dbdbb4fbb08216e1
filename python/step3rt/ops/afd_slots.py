"""The shape of a whole AFD layer's links: what lies where in a slot region, and in a lane's state.

Sizes and layouts only; it owns no memory. How the regions are used is told in afd_link.py.

One lane of a region that an FFN instance owns and its A attention instances write. All sources of
a section are contiguous, so that the experts read them in place as A * T tokens:

    flags [A] 128 B each | hidden e4m3[A, T, H] | scales f32[A, T, H / 128]
    | ids i32[A, T, C] | weights f32[A, T, C]

One lane of a region that an attention instance owns and its F FFN instances write:

    flags [F] 128 B each | admission 128 B | sums bf16[F, T, H]
"""

import enum
import struct
from dataclasses import astuple, dataclass

import numpy as np
import torch

from step3rt.errors import InvalidArgument
from step3rt.ops.device_link import LinkError
from step3rt.ops.quantize import GROUP_SIZE

MAX_PEERS = 32
"""Peers of a lane: one thread of a warp polls each, one bit of a word names each."""
MAX_ROWS = 2048
"""Tokens of all sources: what the experts' kernels take."""
MAX_COLUMNS = 8

FLAG_BYTES = 128
"""A flag of 16 bytes has a line of its own: the peer's stores to it touch nothing else."""
REGION_HEADER_BYTES = 256
"""Says whose region it is, where that is not the driver's business."""
SEQUENCE_BITS = 40
MAX_EPOCH = (1 << 64 - SEQUENCE_BITS) - 1

_ALIGNMENT_BYTES = 256

# struct AfdPeer of kernels/link/afd.cuh: one peer of a lane, in device memory.
AFD_PEER = np.dtype(
    [
        ("slots", np.uint64, 4),
        ("peer_flag", np.uint64),
        ("peer_admission", np.uint64),
        ("flag", np.uint64),
        ("epoch_bits", np.uint64),
        ("sent", np.uint64),
        ("received", np.uint64),
        ("num_rows", np.uint32),
        ("error", np.uint32),
        ("reserved", np.uint64, 5),
    ]
)

# struct AfdLane of kernels/link/afd.cuh.
AFD_LANE = np.dtype(
    [
        ("stop", np.uint64),
        ("pause", np.uint64),
        ("active", np.uint64),
        ("report", np.uint64),
        ("admission", np.uint64),
        ("trace", np.uint64),
        ("wait_limit_ns", np.uint64),
        ("join_window_ns", np.uint64),
        ("num_peers", np.uint32),
        ("index", np.uint32),
        ("num_ranks", np.uint32),
        ("max_tokens", np.uint32),
        ("error", np.uint32),
        ("arrivals", np.uint32),
        ("participants", np.uint32),
        ("joined", np.uint32),
        ("previous", np.uint32),
        ("trace_rows", np.uint32),
        ("frames", np.uint64),
        ("steps", np.uint64),
        ("idle_limit_ns", np.uint64),
        ("peers", AFD_PEER, MAX_PEERS),
    ]
)

# A row of a lane's trace, times in nanoseconds of the GPU's global timer: struct AfdTraceRow.
AFD_TRACE_ROW = np.dtype(
    [
        ("frame", np.uint64),
        ("send_begin", np.uint64),
        ("send_end", np.uint64),
        ("wait_begin", np.uint64),
        ("wait_end", np.uint64),
        ("participants", np.uint64),
        ("num_rows", np.uint64),
        ("reserved", np.uint64),
    ]
)


class Role(enum.IntEnum):
    """Which end of the links a region is."""

    ATTENTION = 1
    FFN = 2


@dataclass(frozen=True, slots=True)
class Section:
    """A tensor in a region: bytes from the region's start, shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def at(self, index: int) -> "Section":
        """Returns one entry of the first dimension."""
        stride = self.num_bytes // self.shape[0]
        return Section(self.offset + index * stride, self.shape[1:], self.dtype)


@dataclass(frozen=True, slots=True)
class FfnSections:
    """One lane of an FFN instance's region."""

    flags: Section
    hidden: Section
    scales: Section
    ids: Section
    weights: Section


@dataclass(frozen=True, slots=True)
class AttentionSections:
    """One lane of an attention instance's region."""

    flags: Section
    admission: Section
    sums: Section


@dataclass(frozen=True, slots=True)
class AfdShape:
    """What all instances of a deployment agree on.

    `num_lanes` L, `num_sources` A attention instances, `num_ranks` F FFN instances, `max_tokens` T
    of a source and lane, `hidden_size` H, `top_k` K.
    """

    num_lanes: int
    num_sources: int
    num_ranks: int
    max_tokens: int
    hidden_size: int
    top_k: int

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            InvalidArgument: a size cannot be used.
        """
        in_range = self.num_lanes >= 1 and self.max_tokens >= 1 and self.top_k >= 0
        if not in_range or not self._peers_fit():
            raise InvalidArgument(
                f"{self} cannot be linked. A warp polls the peers of a lane, so there are 1 to "
                f"{MAX_PEERS} sources and ranks, and at least one lane and token. Use fewer "
                "instances, or several deployments"
            )
        if self.num_rows > MAX_ROWS or self.num_columns > MAX_COLUMNS:
            raise InvalidArgument(
                f"{self} cannot be linked. The experts take at most {MAX_ROWS} tokens of all "
                f"sources and {MAX_COLUMNS - 1} experts of each. Lower `max_tokens`"
            )
        if self.hidden_size < GROUP_SIZE or self.hidden_size % GROUP_SIZE:
            raise InvalidArgument(
                f"{self} cannot be linked. Hidden states are quantised in groups of {GROUP_SIZE}. "
                f"Use a multiple of {GROUP_SIZE} as `hidden_size`"
            )

    def _peers_fit(self) -> bool:
        return 1 <= self.num_sources <= MAX_PEERS and 1 <= self.num_ranks <= MAX_PEERS

    @property
    def num_columns(self) -> int:
        """C: K routed experts, then what the row's home computes."""
        return self.top_k + 1

    @property
    def num_rows(self) -> int:
        """A * T."""
        return self.num_sources * self.max_tokens

    def ffn_sections(self, lane: int) -> FfnSections:
        """Returns where one lane of an FFN instance's region lies."""
        return self._ffn_lane(REGION_HEADER_BYTES + lane * self._ffn_lane(0)[1])[0]

    def attention_sections(self, lane: int) -> AttentionSections:
        """Returns where one lane of an attention instance's region lies."""
        first = REGION_HEADER_BYTES + lane * self._attention_lane(0)[1]
        return self._attention_lane(first)[0]

    def region_bytes(self, role: Role) -> int:
        """Size of a role's region."""
        lane = self._ffn_lane(0)[1] if role is Role.FFN else self._attention_lane(0)[1]
        return REGION_HEADER_BYTES + self.num_lanes * lane

    def _ffn_lane(self, first: int) -> tuple[FfnSections, int]:
        places = (self.num_sources, self.max_tokens)
        ids = (*places, self.num_columns)
        sections, end = _lay_out(
            first,
            ((self.num_sources, FLAG_BYTES), torch.uint8),
            ((*places, self.hidden_size), torch.float8_e4m3fn),
            ((*places, self.hidden_size // GROUP_SIZE), torch.float32),
            (ids, torch.int32),
            (ids, torch.float32),
        )
        return FfnSections(*sections), end - first

    def _attention_lane(self, first: int) -> tuple[AttentionSections, int]:
        sums = (self.num_ranks, self.max_tokens, self.hidden_size)
        sections, end = _lay_out(
            first,
            ((self.num_ranks, FLAG_BYTES), torch.uint8),
            ((FLAG_BYTES,), torch.uint8),
            (sums, torch.bfloat16),
        )
        return AttentionSections(*sections), end - first


def _lay_out(
    first: int, *tensors: tuple[tuple[int, ...], torch.dtype]
) -> tuple[list[Section], int]:
    sections = []
    for shape, dtype in tensors:
        section = Section(first, shape, dtype)
        sections.append(section)
        first += -(-section.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return sections, first


def first_expert(num_experts: int, rank: int, num_ranks: int) -> int:
    """First routed expert of FFN rank `rank`; those of rank r + 1 follow those of rank r."""
    return num_experts * rank // num_ranks


def local_ids(
    shape: AfdShape,
    topk: tuple[torch.Tensor, torch.Tensor] | None,
    num_rows: int,
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what each rank computes of each row: the reference of the send kernel.

    Args:
        shape: Of the links.
        topk: ids i32[T, K] and weights f32[T, K]; None in a dense layer.
        num_rows: Rows to send, at most T.
        num_experts: Routed experts of the layer, 0 in a dense one.

    Returns:
        ids i32[F, num_rows, C], a rank's own group numbers, -1 where it computes nothing, and
        weights f32[F, num_rows, C], 0 there. The last column is 1 in rows whose home the rank is.
    """
    sizes = (shape.num_ranks, num_rows, shape.num_columns)
    ids = torch.full(sizes, -1, dtype=torch.int32)
    weights = torch.zeros(sizes)
    for rank in range(shape.num_ranks):
        first = first_expert(num_experts, rank, shape.num_ranks)
        end = first_expert(num_experts, rank + 1, shape.num_ranks)
        if topk is not None:
            chosen = topk[0][:num_rows].cpu()
            is_here = (chosen >= first) & (chosen < end)
            ids[rank, :, :-1] = torch.where(is_here, chosen - first, -1)
            weights[rank, :, :-1] = torch.where(is_here, topk[1][:num_rows].cpu().float(), 0.0)
        ids[rank, rank :: shape.num_ranks, -1] = end - first
        weights[rank, rank :: shape.num_ranks, -1] = 1.0
    return ids, weights


_HANDLE = struct.Struct("<4sBBHIIIIII")
_MAGIC = b"AFD1"


def encode_handle(shape: AfdShape, role: Role, index: int, memory: tuple[int, bytes]) -> bytes:
    """Packs what a peer needs to map a region: whose it is, its shape, and (kind, address)."""
    kind, address = memory
    return _HANDLE.pack(_MAGIC, role, kind, index, *astuple(shape)) + address


def decode_handle(handle: bytes, shape: AfdShape, role: Role, index: int, kind: int) -> bytes:
    """Returns the address in a peer's handle, once it is the region that is expected.

    Raises:
        InvalidArgument: it is another's, of another shape, or of another kind of memory.
    """
    expected = (_MAGIC, int(role), kind, index, *astuple(shape))
    found = _HANDLE.unpack_from(handle) if len(handle) >= _HANDLE.size else ()
    if found != expected:
        raise InvalidArgument(
            f"The peer's slots are {found}, expected {expected} (magic, role, memory, index, "
            "sizes). Both ends must agree on them. Start the instances with the same settings"
        )
    return handle[_HANDLE.size :]


@dataclass(frozen=True, slots=True)
class LaneErrors:
    """What stopped a lane, and what was wrong with each of its peers.

    `lane`: not OK once the lane sends and awaits nothing any more. `peers`: by source of an FFN
    instance, by rank of an attention instance. An FFN instance goes on without a source that is
    not OK; an attention instance needs all its ranks.
    """

    lane: LinkError
    peers: tuple[LinkError, ...]

    @property
    def is_ok(self) -> bool:
        """Whether nothing went wrong."""
        return not self.lane and not any(self.peers)


@dataclass(slots=True)
class PeerState:
    """Sequence numbers of one peer of a lane."""

    epoch: int = 0
    sent: int = 0
    received: int = 0
    num_rows: int = 0
    error: LinkError = LinkError.OK


@dataclass(slots=True)
class LaneState:
    """What a lane counts. Masks have bit i for source i.

    `participants`: sources of the step in progress. `joined` and `previous`: those that began the
    last two steps. `frames`: layers awaited, `steps`: steps with participants.
    """

    peers: list[PeerState]
    error: LinkError = LinkError.OK
    participants: int = 0
    joined: int = 0
    previous: int = 0
    frames: int = 0
    steps: int = 0
