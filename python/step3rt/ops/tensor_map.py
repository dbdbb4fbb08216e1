"""Encodes TMA tensor maps, the descriptors by which Hopper's copy engine reads tiled tensors.

Calls the driver's encoder alone; launches nothing and allocates no device memory.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops.launch import driver, error_name

TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64

# Values of the driver's enums CUtensorMapDataType, ...Swizzle, ...L2promotion.
_DATA_TYPES = {torch.uint8: 0, torch.float8_e4m3fn: 0, torch.bfloat16: 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTION_128B = 2  # 256 bytes cost BF16 decode 8 % of its bandwidth: docs/kernels.md


@dataclass(frozen=True, slots=True)
class TileView:
    """How a tensor map sees memory: innermost dimension first.

    `sizes` in elements; `strides_bytes` of every dimension but the first, multiples of 16;
    `box` is the tile, whose innermost extent spans `swizzle_bytes` (0: no swizzle).
    """

    sizes: Sequence[int]
    strides_bytes: Sequence[int]
    box: Sequence[int]
    swizzle_bytes: int


def encode_tensor_map(tensor: torch.Tensor, view: TileView) -> Any:
    """Returns the 128-byte map of `tensor`'s memory as a kernel argument passed by value.

    Elements of the box outside `sizes` arrive as zero. The map holds the address: it is valid as
    long as the tensor's storage.

    Raises:
        RuntimeError: the driver is missing or rejects the view.
    """
    rank = len(view.sizes)
    storage = np.zeros(TENSOR_MAP_BYTES + _ALIGNMENT, dtype=np.uint8)
    start = -storage.ctypes.data % _ALIGNMENT  # the encoder wants 64-byte alignment
    encoded = storage[start : start + TENSOR_MAP_BYTES]
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(encoded.ctypes.data),
        ctypes.c_int(_DATA_TYPES[tensor.dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * rank)(*view.sizes),
        (ctypes.c_uint64 * (rank - 1))(*view.strides_bytes),
        (ctypes.c_uint32 * rank)(*view.box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        ctypes.c_int(0),  # interleave: none
        ctypes.c_int(_SWIZZLES[view.swizzle_bytes]),
        ctypes.c_int(_L2_PROMOTION_128B),
        ctypes.c_int(0),  # elements out of bounds: zero
    )
    if status != 0:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled returned {error_name(status)} for a {tensor.dtype} tensor at "
            f"{tensor.data_ptr():#x} seen as {view}. Strides and the address must be multiples of "
            "16 bytes and the box at most 256 in each dimension."
        )
    return encoded.view(np.dtype((np.void, TENSOR_MAP_BYTES)))
