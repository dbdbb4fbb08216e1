"""The split-KV schedule of MFA decode: made once per step on the device, shared by all layers.

Never reads KV data, and never tells the host what it decided: shapes are fixed, so a captured graph
stays valid whatever the lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from step3rt.ops import launch

BLOCK_SIZE_TOKENS = 64
MAX_SEQUENCES = 1024
MAX_CTAS = 256
WORK_FIELDS = 8  # of struct MfaWork in kernels/attention/mfa_work.cuh
PADDED_HEADS = 64
HEAD_DIM = 256

_KERNEL = launch.Kernel("attention/sm90_i32_mfa_schedule.cu", num_threads=MAX_SEQUENCES)
_SEQUENCE_COST = 2
_MIN_RANGE_COST = 6
_MAX_PARTS_PER_SEQUENCE = 64
_GRID_SIZES = 8
_MIN_GRID_TO_SHRINK = 64


@dataclass(frozen=True, slots=True)
class MfaSchedule:
    """Device buffers of one schedule; `allocate_schedule` makes them.

    `rows` i32[num_ctas, 8] is what `mfa_schedule` fills. The others are scratch of the decode
    kernels: partial results f32[2 * num_ctas, 64, 256], their statistics f32[2 * num_ctas, 64, 2],
    and arrival counters i32[num_ctas], zero between launches. Kernels that run at the same time
    need schedules of their own.
    """

    rows: torch.Tensor
    partial_out: torch.Tensor
    partial_stats: torch.Tensor
    arrivals: torch.Tensor

    @property
    def num_ctas(self) -> int:
        """CTAs of the decode kernels: one per SM that they may use."""
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of all buffers."""
        return self.rows.device


def allocate_schedule(device: torch.device, num_ctas: int | None = None) -> MfaSchedule:
    """Allocates a schedule for `num_ctas` CTAs, by default one per SM (33 MiB on an H200).

    Raises:
        ValueError: `num_ctas` is not in 1...256.
    """
    if num_ctas is None:
        num_ctas = launch.num_sms(device)
    if not 1 <= num_ctas <= MAX_CTAS:
        raise ValueError(
            f"num_ctas is {num_ctas}, the schedule holds 1 to {MAX_CTAS}. Pass the number of SMs "
            "that attention may use."
        )
    return MfaSchedule(
        rows=torch.zeros(num_ctas, WORK_FIELDS, dtype=torch.int32, device=device),
        partial_out=torch.empty(2 * num_ctas, PADDED_HEADS, HEAD_DIM, device=device),
        partial_stats=torch.empty(2 * num_ctas, PADDED_HEADS, 2, device=device),
        arrivals=torch.zeros(num_ctas, dtype=torch.int32, device=device),
    )


def mfa_schedule(seq_lens: torch.Tensor, schedule: MfaSchedule) -> None:
    """Fills `schedule.rows` for the lengths of this step.

    Args:
        seq_lens: i32[S] tokens per sequence, the new one included, 0 for an unused row; S <= 1024.
        schedule: From `allocate_schedule`, on the same device.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    launch.check_tensor("seq_lens", seq_lens, (-1,), torch.int32, schedule.device)
    num_sequences = seq_lens.shape[0]
    if not 1 <= num_sequences <= MAX_SEQUENCES:
        raise ValueError(
            f"`seq_lens` has {num_sequences} sequences, one schedule takes 1 to {MAX_SEQUENCES}. "
            "Split the batch."
        )
    if schedule.device.type == "cpu":
        rows = reference_mfa_schedule(seq_lens.tolist(), schedule.num_ctas)
        schedule.rows.copy_(torch.tensor(rows, dtype=torch.int32))
        return
    arguments = (
        launch.pointer(seq_lens),
        np.int32(num_sequences),
        launch.pointer(schedule.rows),
        np.int32(schedule.num_ctas),
    )
    _KERNEL.launch(schedule.device, 1, arguments)


def reference_mfa_schedule(seq_lens: Sequence[int], num_ctas: int) -> list[tuple[int, ...]]:
    """Returns the rows that the kernel writes, integer for integer."""
    blocks = [-(-length // BLOCK_SIZE_TOKENS) for length in seq_lens]
    starts = [0]
    for count in blocks:
        starts.append(starts[-1] + count + _SEQUENCE_COST)
    total = starts[-1]
    longest = max(blocks) + _SEQUENCE_COST
    min_range = max(_MIN_RANGE_COST, -(-longest // _MAX_PARTS_PER_SEQUENCE))
    num_used = min(max(total // min_range, 1), num_ctas)

    num_used -= _spared_ctas(starts, num_used)
    even = [index * total // num_used for index in range(num_used)]
    even += [total] * (num_ctas + 1 - num_used)
    nearest = [_nearest(starts, cut) for cut in even]
    loads = [after - before for before, after in pairwise(nearest)]
    if all(load * num_used * 5 <= total * 6 for load in loads):
        cuts = nearest
    else:
        cuts = [
            near if _snaps(near - cut, total, num_used) else cut
            for near, cut in zip(nearest, even, strict=True)
        ]
    boundaries = [_boundary(starts, blocks, cut) for cut in cuts]
    return [_work(boundaries, cta) for cta in range(num_ctas)]


def _spared_ctas(starts: list[int], num_used: int) -> int:
    """CTAs that get nothing because fewer sequences are split then."""
    total = starts[-1]

    def num_splits(num_ctas: int) -> int:
        cuts = [index * total // num_ctas for index in range(1, num_ctas)]
        return sum(not _snaps(_nearest(starts, cut) - cut, total, num_ctas) for cut in cuts)

    if num_used < _MIN_GRID_TO_SHRINK:
        return 0
    splits = [num_splits(num_used - less) for less in range(_GRID_SIZES)]
    fewest = 0
    for less in range(1, _GRID_SIZES):
        if splits[less] * 4 <= splits[0] * 3 and splits[less] < splits[fewest]:
            fewest = less
    return fewest


def _snaps(distance: int, total: int, num_used: int) -> bool:
    return abs(distance) * num_used * 10 <= total


def _sequence_at(starts: list[int], position: int) -> int:
    """Last sequence that starts at or before `position`, which lies before the total."""
    return int(np.searchsorted(starts[:-1], position, side="right")) - 1


def _nearest(starts: list[int], cut: int) -> int:
    if cut >= starts[-1]:
        return starts[-1]
    sequence = _sequence_at(starts, cut)
    before, after = starts[sequence], starts[sequence + 1]
    return before if cut - before <= after - cut else after


def _boundary(starts: list[int], blocks: list[int], cut: int) -> tuple[int, int]:
    if cut >= starts[-1]:
        return len(blocks), 0
    sequence = _sequence_at(starts, cut)
    block = cut - starts[sequence]
    if block < blocks[sequence]:
        return sequence, block
    return sequence + (1 if block > 0 else 0), 0


def _work(boundaries: list[tuple[int, int]], cta: int) -> tuple[int, ...]:
    def is_inside(index: int, sequence: int) -> bool:
        return boundaries[index][0] == sequence and boundaries[index][1] > 0

    first, last = boundaries[cta], boundaries[cta + 1]
    first_split, last_split = (cta, 1), (cta, 1)
    if first[1] > 0:
        begin, stop = cta, cta + 1
        while is_inside(begin, first[0]):
            begin -= 1
        while is_inside(stop, first[0]):
            stop += 1
        first_split = (begin, stop - begin)
    if last[1] > 0:
        stop = cta + 1
        while is_inside(stop, last[0]):
            stop += 1
        last_split = (cta, stop - cta)
    return (*first, *last, *first_split, *last_split)
