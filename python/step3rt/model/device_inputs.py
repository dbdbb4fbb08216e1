"""Owns the layout of what the host tells a lane of the device pipeline about a step.

One copy carries all of it: a host buffer, pinned beside a GPU, and a device buffer have the same
sections, each for T rows and aligned to 16 bytes. Computes nothing, and never waits.

    | num_rows | token_ids | sequence_slots | positions | kv_slots | num_context_tokens | ...
    ... logit_rows | sampling_rows | edit_offsets | num_prefill_items | prefill_items |

A step without chunks for the prefill kernel leaves the last two out of the copy.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from step3rt.ops.mfa_prefill_choice import prefill_ctas_of
from step3rt.ops.sample import SAMPLING_ROW

_ALIGNMENT_BYTES = 16

UNKNOWN_TOKEN_ID = -1
"""Stands for the token that a sequence sampled last, which the host may not know yet."""

UNUSED_KV_SLOT = -1
"""Of rows that only fill a bucket: K and V are kept nowhere."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T rows of one step, views of one buffer; i32[T] unless something else is said.

    `num_rows` i32[1]. `token_ids`: `UNKNOWN_TOKEN_ID` for the token that `sequence_slots` sampled
    last. `kv_slots`: KV block * 64 + offset. `num_context_tokens`: what a row attends to, itself
    included; 0 in rows of the prefill kernel and in those that only fill a bucket. `logit_rows`: of
    which rows the next token's logits are wanted, those that sample first. `sampling_rows` u8[T,
    48] and `edit_offsets` i32[T + 1] are `ops.sample`'s, of the rows that sample.
    `num_prefill_items` i32[1] and `prefill_items` i32[T, 4] are `ops.mfa_prefill`'s; an item's
    sequence is its slot.
    """

    num_rows: torch.Tensor
    token_ids: torch.Tensor
    sequence_slots: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    num_context_tokens: torch.Tensor
    logit_rows: torch.Tensor
    sampling_rows: torch.Tensor
    edit_offsets: torch.Tensor
    num_prefill_items: torch.Tensor
    prefill_items: torch.Tensor

    @classmethod
    def view(cls, buffer: torch.Tensor, max_tokens: int) -> "StepInputs":
        """Views a buffer u8[`buffer_bytes(max_tokens)`]."""
        offset = 0

        def section(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            nonlocal offset
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            view = buffer[offset : offset + num_bytes].view(dtype).view(shape)
            offset += _aligned(num_bytes)
            return view

        return cls(
            num_rows=section(1),
            token_ids=section(max_tokens),
            sequence_slots=section(max_tokens),
            positions=section(max_tokens),
            kv_slots=section(max_tokens),
            num_context_tokens=section(max_tokens),
            logit_rows=section(max_tokens),
            sampling_rows=section(max_tokens, SAMPLING_ROW.itemsize, dtype=torch.uint8),
            edit_offsets=section(max_tokens + 1),
            num_prefill_items=section(1),
            prefill_items=section(max_tokens, 4),
        )

    @classmethod
    def buffer_bytes(cls, max_tokens: int) -> int:
        """Bytes that the sections of `max_tokens` rows take."""
        return cls.row_bytes(max_tokens) + _aligned(4) + 16 * max_tokens

    @staticmethod
    def row_bytes(max_tokens: int) -> int:
        """Bytes up to the work of the prefill kernel: all that a step without it needs."""
        return (
            _aligned(4)
            + 6 * _aligned(4 * max_tokens)
            + _aligned(SAMPLING_ROW.itemsize * max_tokens)
            + _aligned(4 * (max_tokens + 1))
        )


class HostStep:
    """What the host fills for one step, and where its results come back to; used over and over.

    Attributes are numpy views of memory that the device reads and writes, so that filling them
    costs a copy of an array: those of `StepInputs`, `sampling_rows` as records. `token_ids_out` and
    `is_corrupt_out` i32[T] come back, and what else `results` has if it was asked for.
    `prefill_ctas` is what `ops.mfa_prefill_choice` goes by.
    """

    def __init__(
        self,
        max_tokens: int,
        num_top: int,
        device: torch.device,
        prefill_ctas: int | None = None,
    ) -> None:
        """Allocates for `max_tokens` rows, with `num_top` listed tokens at most."""
        self.prefill_ctas = prefill_ctas or prefill_ctas_of(device)
        is_pinned = device.type == "cuda"

        def host(num_bytes: int) -> torch.Tensor:
            return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)

        self.inputs_buffer = host(StepInputs.buffer_bytes(max_tokens))
        inputs = StepInputs.view(self.inputs_buffer, max_tokens)
        self.num_rows = _numpy(inputs.num_rows)
        self.token_ids = _numpy(inputs.token_ids)
        self.sequence_slots = _numpy(inputs.sequence_slots)
        self.positions = _numpy(inputs.positions)
        self.kv_slots = _numpy(inputs.kv_slots)
        self.num_context_tokens = _numpy(inputs.num_context_tokens)
        self.logit_rows = _numpy(inputs.logit_rows)
        self.sampling_rows = inputs.sampling_rows.numpy().reshape(-1).view(SAMPLING_ROW)
        self.edit_offsets = _numpy(inputs.edit_offsets)
        self.num_prefill_items = _numpy(inputs.num_prefill_items)
        self.prefill_items = _numpy(inputs.prefill_items)

        self.results_buffer = host(StepResults.buffer_bytes(max_tokens, num_top))
        self.results = StepResults.view(self.results_buffer, max_tokens, num_top)
        self.token_ids_out = _numpy(self.results.token_ids)
        self.is_corrupt_out = _numpy(self.results.is_corrupt)

    def pad(self, num_rows: int, bucket: int) -> None:
        """Makes rows [`num_rows`, `bucket`) such that they change nothing."""
        self.num_rows[0] = num_rows
        self.token_ids[num_rows:bucket] = 0
        self.sequence_slots[num_rows:bucket] = 0
        self.positions[num_rows:bucket] = 0
        self.kv_slots[num_rows:bucket] = UNUSED_KV_SLOT
        self.num_context_tokens[num_rows:bucket] = 0


@dataclass(frozen=True, slots=True)
class StepResults:
    """What comes back of T rows, views of one buffer; see `HostStep` and `ops.sample.Samples`."""

    token_ids: torch.Tensor
    is_corrupt: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @classmethod
    def view(cls, buffer: torch.Tensor, max_tokens: int, num_top: int) -> "StepResults":
        """Views a buffer u8[`buffer_bytes(max_tokens, num_top)`]."""
        sizes = cls._section_bytes(max_tokens, num_top)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        shapes = [*[(max_tokens,)] * 3, *[(max_tokens, num_top)] * 2]
        dtypes = [torch.int32] * 2 + [torch.float32, torch.int32, torch.float32]
        views = []
        for start, shape, dtype in zip(starts[:-1], shapes, dtypes, strict=True):
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            views.append(buffer[int(start) : int(start) + num_bytes].view(dtype).view(shape))
        return cls(*views)

    @classmethod
    def buffer_bytes(cls, max_tokens: int, num_top: int) -> int:
        """Bytes that all sections take."""
        return sum(cls._section_bytes(max_tokens, num_top))

    @classmethod
    def token_bytes(cls, max_tokens: int, num_top: int) -> int:
        """Bytes up to the log-probabilities: all that comes back when nobody asked for those."""
        return sum(cls._section_bytes(max_tokens, num_top)[:2])

    @staticmethod
    def _section_bytes(max_tokens: int, num_top: int) -> list[int]:
        rows, tops = _aligned(4 * max_tokens), _aligned(4 * max_tokens * num_top)
        return [rows, rows, rows, tops, tops]


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.int32]:
    view: npt.NDArray[np.int32] = tensor.numpy()
    return view


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
