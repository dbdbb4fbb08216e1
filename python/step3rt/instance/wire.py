"""Owns the layout of the two kinds of slots, as views over their memory; never keeps a frame.

An A2F slot holds T rows for one FFN instance, an F2A slot the T partial sums that answer it. Each
section begins at a multiple of 64 bytes; only the bytes in use travel:

    A2F   | hidden [T, H] | scales f32[T, G] | ids i32[T, K + 1] | weights f32[T, K + 1] |
    F2A   | partial sums [T, H] |

Only fp8 has scales, one per group of 128 values.
"""

import warnings
from dataclasses import dataclass

import torch

from step3rt import _core
from step3rt.errors import Internal
from step3rt.model.config import Step3Config
from step3rt.model.placement import Placement
from step3rt.ops.quantize import dequantize_groups, num_groups, quantize_groups

SECTION_ALIGNMENT_BYTES = 64

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


class FrameError(Internal):
    """A peer's frame is not what the layout allows; nothing of it was used."""


@dataclass(frozen=True, slots=True)
class A2fFrame:
    """What an FFN instance got for T rows of one layer.

    hidden: [T, H]; for float32 and bfloat16 a view of the slot. expert_ids: i32[T, K + 1].
    expert_weights: f32[T, K + 1].
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class A2fLayout:
    """Attention to FFN: hidden states and where they go.

    num_columns is K + 1: a row's routed experts, and the one that its home instance computes.
    """

    max_tokens: int
    hidden_size: int
    num_columns: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Capacity that a slot needs."""
        return self.payload_bytes(self.max_tokens)

    def payload_bytes(self, num_tokens: int) -> int:
        """Bytes in use for `num_tokens` rows."""
        return self._offsets(num_tokens)[-1]

    def write(self, slot: torch.Tensor, hidden: torch.Tensor, placement: Placement) -> None:
        """Fills the slot with the placement's rows of `hidden`, float[any, H]."""
        num_tokens = placement.rows.shape[0]
        rows = hidden[placement.rows]
        values, scales, ids, weights = self._sections(slot, num_tokens)
        if self.dtype == torch.float8_e4m3fn:
            quantized, group_scales = quantize_groups(rows)
            values.copy_(quantized)
            scales.copy_(group_scales)
        else:
            values.copy_(rows)
        ids.copy_(placement.expert_ids)
        weights.copy_(placement.expert_weights)

    def read(self, slot: torch.Tensor, num_tokens: int, payload_bytes: int) -> A2fFrame:
        """Looks at a frame; expert ids and weights are copied, so that checks of them hold.

        Raises:
            FrameError: the sizes are not those of a frame.
        """
        _check_sizes(num_tokens, self.max_tokens, payload_bytes, self.payload_bytes(num_tokens))
        values, scales, ids, weights = self._sections(slot, num_tokens)
        if self.dtype == torch.float8_e4m3fn:
            values = dequantize_groups(values, scales, torch.float32)
        return A2fFrame(values, ids.clone(), weights.clone())

    def _sections(self, slot: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, ...]:
        hidden, scales, ids, weights, _ = self._offsets(num_tokens)
        groups = self._num_scales()
        return (
            _view(slot, hidden, num_tokens, self.hidden_size, self.dtype),
            _view(slot, scales, num_tokens, groups, torch.float32),
            _view(slot, ids, num_tokens, self.num_columns, torch.int32),
            _view(slot, weights, num_tokens, self.num_columns, torch.float32),
        )

    def _offsets(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """Where hidden, scales, ids and weights begin, and where the last of them ends."""
        scales = _aligned(num_tokens * self.hidden_size * self.dtype.itemsize)
        ids = scales + _aligned(num_tokens * self._num_scales() * 4)
        columns_bytes = num_tokens * self.num_columns * 4
        weights = ids + _aligned(columns_bytes)
        return 0, scales, ids, weights, weights + columns_bytes

    def _num_scales(self) -> int:
        return num_groups(self.hidden_size) if self.dtype == torch.float8_e4m3fn else 0


@dataclass(frozen=True, slots=True)
class F2aLayout:
    """FFN to attention: one partial sum per row of the frame that it answers."""

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Capacity that a slot needs."""
        return self.payload_bytes(self.max_tokens)

    def payload_bytes(self, num_tokens: int) -> int:
        """Bytes in use for `num_tokens` rows."""
        return num_tokens * self.hidden_size * self.dtype.itemsize

    def write(self, slot: torch.Tensor, partial_sums: torch.Tensor) -> None:
        """Fills the slot with float[T, H]."""
        _view(slot, 0, partial_sums.shape[0], self.hidden_size, self.dtype).copy_(partial_sums)

    def read(self, slot: torch.Tensor, num_tokens: int, payload_bytes: int) -> torch.Tensor:
        """Looks at a frame: a view [T, H] of the slot, valid until the lane's next push.

        Raises:
            FrameError: the sizes are not those of a frame.
        """
        _check_sizes(num_tokens, self.max_tokens, payload_bytes, self.payload_bytes(num_tokens))
        return _view(slot, 0, num_tokens, self.hidden_size, self.dtype)


def slot_layouts(settings: _core.Settings, config: Step3Config) -> tuple[A2fLayout, F2aLayout]:
    """The layouts that both roles derive from the cluster's settings and the model's sizes."""
    max_tokens = settings.max_tokens_per_micro_batch
    return (
        A2fLayout(max_tokens, config.hidden_size, config.top_k + 1, DTYPES[settings.a2f_dtype]),
        F2aLayout(max_tokens, config.hidden_size, DTYPES[settings.f2a_dtype]),
    )


def slot_tensor(memory: memoryview) -> torch.Tensor:
    """Views a slot as u8[bytes]; the tensor keeps the memory alive.

    A receive slot is read-only, which torch has no word for; nothing here writes to one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)


def _view(
    slot: torch.Tensor, offset: int, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    num_bytes = rows * columns * dtype.itemsize
    return slot[offset : offset + num_bytes].view(dtype).view(rows, columns)


def _check_sizes(num_tokens: int, max_tokens: int, payload_bytes: int, wanted_bytes: int) -> None:
    if not 0 < num_tokens <= max_tokens or payload_bytes != wanted_bytes:
        raise FrameError(
            f"A frame of {num_tokens} tokens in {payload_bytes} bytes arrived. A frame has 1 to "
            f"{max_tokens} tokens, and that many take {wanted_bytes} bytes. Check that both "
            "instances run the same version of step3rt."
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES
