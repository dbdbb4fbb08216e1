"""Reads safetensors checkpoints into float64 arrays with numpy alone.

It never imports the product or the safetensors library, so that a mistake in either cannot hide
here. It reads well-formed files; refusing hostile ones is the product loader's work.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SINGLE_FILE_NAME = "model.safetensors"
INDEX_FILE_NAME = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"

_PLAIN_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file holds it: `dtype` is the safetensors name, `data` the raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a checkpoint directory, sharded or in one file.

    Raises:
        ValueError: the index names a tensor that its shard does not hold.
    """
    index_path = directory / INDEX_FILE_NAME
    if not index_path.exists():
        return read_file(directory / SINGLE_FILE_NAME)

    weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
    shards = {name: read_file(directory / name) for name in sorted(set(weight_map.values()))}
    missing = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if missing:
        raise ValueError(f"{index_path} names tensors that their shards do not hold: {missing}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of one safetensors file.

    Layout: [u64 little-endian: header length n] [n bytes of JSON] [tensor data]. Offsets in the
    header count from the start of the tensor data.
    """
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data_start])
    header.pop("__metadata__", None)

    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            data=content[data_start + begin : data_start + end],
        )
    return tensors


def decode(tensor: StoredTensor) -> Array:
    """Decodes the stored numbers, without block scales, to float64 of the same shape."""
    if tensor.dtype in _PLAIN_DTYPES:
        values = np.frombuffer(tensor.data, _PLAIN_DTYPES[tensor.dtype]).astype(np.float64)
    elif tensor.dtype == "BF16":
        values = decode_bf16(np.frombuffer(tensor.data, "<u2"))
    elif tensor.dtype == "F8_E4M3":
        values = E4M3_VALUES[np.frombuffer(tensor.data, np.uint8)]
    else:
        raise ValueError(f"no decoder for dtype {tensor.dtype}")
    return values.reshape(tensor.shape)


def decode_bf16(bits: NDArray[np.uint16]) -> Array:
    """Widens bfloat16 bit patterns: they are the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _e4m3_value(byte: int) -> float:
    """Value of one OCP E4M3 byte: sign 1, exponent 4 (bias 7), mantissa 3, no infinity.

    Exponent 0 is subnormal; 0x7f and 0xff are the only NaNs, so 0x7e = 448 is the maximum.
    """
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte >> 3) & 0x0F
    mantissa = byte & 0x07
    if exponent == 0x0F and mantissa == 0x07:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3_VALUES: Array = np.array([_e4m3_value(byte) for byte in range(256)])


def dequantise(values: Array, scale_inv: Array, block_size: tuple[int, int]) -> Array:
    """Multiplies each block of a weight with its scale.

    values: [..., N, K]; scale_inv: [..., ceil(N / bn), ceil(K / bk)]; leading dims (experts) are
    equal. The last block of a row or column is ragged where the size is no multiple of the block.

    Raises:
        ValueError: the shape of scale_inv does not follow from values and block_size.
    """
    num_rows, num_columns = values.shape[-2:]
    block_rows, block_columns = block_size
    expected = (
        *values.shape[:-2],
        -(-num_rows // block_rows),
        -(-num_columns // block_columns),
    )
    if scale_inv.shape != expected:
        raise ValueError(f"scale shape {scale_inv.shape} for weight {values.shape}: not {expected}")
    by_row = np.repeat(scale_inv, block_rows, axis=-2)[..., :num_rows, :]
    return values * np.repeat(by_row, block_columns, axis=-1)[..., :num_columns]


def read_weights(directory: Path, block_size: tuple[int, int] | None) -> dict[str, Array]:
    """Returns the text model's weights, dequantised: names without the scales.

    Tensors of the vision tower (no `model.` prefix) are left out.

    Raises:
        ValueError: an FP8 weight has no scale, or the config gives no block size for it.
    """
    stored = read_checkpoint(directory)
    weights = {}
    for name, tensor in stored.items():
        if not name.startswith(("model.", "lm_head.")) or name.endswith(SCALE_SUFFIX):
            continue
        values = decode(tensor)
        if tensor.dtype == "F8_E4M3":
            scale = stored.get(name + SCALE_SUFFIX)
            if scale is None or block_size is None:
                raise ValueError(f"{name} is FP8, scale {scale}, block size {block_size}")
            values = dequantise(values, decode(scale), block_size)
        weights[name] = values
    return weights
