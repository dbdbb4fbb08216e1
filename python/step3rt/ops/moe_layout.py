"""Weight layout of the FP8 MoE kernels: each stage of their pipelines is one contiguous copy.

Pure functions of tensors on any device; never launches a kernel.

A 64-row granule of a projection is reordered so that a thread of the kernel ends up with two
neighbouring outputs: row 16w + 8h + g of the granule holds output 16w + 2g + h (w < 4, h < 2,
g < 8). A granule of gate is followed by that of up for the same outputs. Tiles of rows follow each
other; inside a tile, the 128-value blocks of K; inside such a block, the rows of 128 bytes, whose
16-byte chunk c lies at place c ^ row % 8, wgmma's 128-byte swizzle.
"""

import functools
from collections.abc import Callable

import torch

BLOCK_K = 128
GATE_UP_TILE = 256
DOWN_TILE = 192
GRANULE = 64
ROW_ALIGNMENT = 64
"""Rows of a group start at a multiple of this, the rows of one wgmma."""

_CHUNK_BYTES = 16
_CHUNK = torch.complex128  # of 16 bytes too: moves a chunk as one element
_SWIZZLE_ROWS = 8

Pack = Callable[[torch.Tensor], torch.Tensor]


def padded_rows(num_rows: int) -> int:
    """Rows that a group of `num_rows` occupies."""
    return -(-num_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT


def pack_gate_up(gate_up: torch.Tensor) -> torch.Tensor:
    """Packs the gate and up projections of experts for `moe_gate_up`.

    Args:
        gate_up: e4m3[G, 2 * I, H], the gate projection's rows before the up projection's; I and H
            multiples of 128.

    Returns:
        e4m3[G, 2 * I * H].

    Raises:
        ValueError: a size is not a multiple of 128.
    """
    num_groups, num_rows, width = gate_up.shape
    _check_multiple("half the rows of `gate_up`", num_rows // 2, BLOCK_K)
    ordered = _order_granules(gate_up).view(num_groups, 2, -1, GRANULE, width)
    return _pack_tiles(ordered.transpose(1, 2).reshape(gate_up.shape), GATE_UP_TILE)


def pack_down(down: torch.Tensor) -> torch.Tensor:
    """Packs the down projections of experts for `moe_down`.

    Args:
        down: e4m3[G, H, I]; I and H multiples of 128.

    Returns:
        e4m3[G, H * I].

    Raises:
        ValueError: a size is not a multiple of 128.
    """
    _check_multiple("the rows of `down`", down.shape[1], BLOCK_K)
    return _pack_tiles(_order_granules(down), DOWN_TILE)


def unpack_gate_up(packed: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Returns e4m3[G, 2 * I, H], on the CPU: the inverse of `pack_gate_up`."""
    return _unpack(packed, hidden_size, pack_gate_up)


def unpack_down(packed: torch.Tensor, intermediate_size: int) -> torch.Tensor:
    """Returns e4m3[G, H, I], on the CPU: the inverse of `pack_down`."""
    return _unpack(packed, intermediate_size, pack_down)


def pack_rows(plain: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns e4m3[K / 128, R, 128] of activations e4m3[R, K], as the kernels keep them.

    Args:
        plain: The activations.
        places: i64[R]: which row of the kernels' buffer each will be.
    """
    num_rows, width = plain.shape
    blocks = plain.view(torch.uint8).view(num_rows, width // BLOCK_K, BLOCK_K).transpose(0, 1)
    return _swizzle_rows(blocks, places).view(torch.float8_e4m3fn)


def unpack_rows(rows: torch.Tensor) -> torch.Tensor:
    """Returns e4m3[R, K] of activations as the kernels keep them, e4m3[K / 128, R, 128]."""
    num_rows = rows.shape[1]
    places = torch.arange(num_rows, device=rows.device)
    plain = _swizzle_rows(rows.view(torch.uint8), places).transpose(0, 1)
    return plain.reshape(num_rows, -1).view(torch.float8_e4m3fn)


def _swizzle_rows(blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """u8[K / 128, R, 128] with the chunks of each row as in row `places[r]`; its own inverse."""
    chunks = blocks.contiguous().view(_CHUNK)
    table = torch.tensor([_swizzle(row) for row in range(_SWIZZLE_ROWS)], device=blocks.device)
    order = table[places % _SWIZZLE_ROWS].expand(chunks.shape)
    return chunks.gather(2, order).view(torch.uint8)


def _unpack(packed: torch.Tensor, width: int, pack: Pack) -> torch.Tensor:
    chunks = packed.view(torch.uint8).view(_CHUNK)
    num_groups, num_chunks = chunks.shape
    num_rows = num_chunks * _CHUNK_BYTES // width
    plain = chunks.index_select(1, _chunk_places(pack, num_rows, width))
    return plain.view(torch.uint8).view(num_groups, num_rows, width).view(torch.float8_e4m3fn)


@functools.cache
def _chunk_places(pack: Pack, num_rows: int, width: int) -> torch.Tensor:
    """i64[N * K / 16]: where `pack` puts each chunk of a weight [N, K]; it is given numbers."""
    num_chunks = num_rows * width // _CHUNK_BYTES
    numbers = torch.arange(num_chunks)[:, None].repeat(1, _CHUNK_BYTES // 8)
    weight = numbers.view(torch.uint8).view(1, num_rows, width).view(torch.float8_e4m3fn)
    packed = pack(weight).view(torch.uint8).view(torch.int64).view(num_chunks, -1)[:, 0]
    return packed.argsort()


def _order_granules(weight: torch.Tensor) -> torch.Tensor:
    """u8[G, N, K] with the rows of each 64-row granule in the kernels' order."""
    num_groups, num_rows, width = weight.shape
    granules = weight.view(torch.uint8).view(num_groups, num_rows // 16, 8, 2, width)
    return granules.transpose(2, 3).reshape(num_groups, num_rows, width)


def _pack_tiles(weight: torch.Tensor, tile_rows: int) -> torch.Tensor:
    """u8[G, N, K], ordered, to e4m3[G, N * K] in tiles; the last tile may be shorter."""
    num_groups, num_rows, width = weight.shape
    _check_multiple("the columns of a weight", width, BLOCK_K)
    # [G, N / 8, 8 rows, K / 128, 8 chunks, 16]
    groups = weight.view(num_groups, num_rows // 8, 8, width // BLOCK_K, 8, _CHUNK_BYTES)
    swizzled = torch.empty_like(groups)
    for row in range(_SWIZZLE_ROWS):
        swizzled[:, :, row] = groups[:, :, row][:, :, :, _swizzle(row)]
    blocks = swizzled.view(num_groups, num_rows, width // BLOCK_K, BLOCK_K)
    tiles = [tile.transpose(1, 2).flatten(1) for tile in torch.split(blocks, tile_rows, dim=1)]
    return torch.cat(tiles, dim=1).view(torch.float8_e4m3fn)


def _swizzle(row: int) -> list[int]:
    """Chunk at each place of a row; its own inverse."""
    return [place ^ row % _SWIZZLE_ROWS for place in range(8)]


def _check_multiple(what: str, size: int, factor: int) -> None:
    if size % factor != 0:
        raise ValueError(
            f"Cannot pack a weight: {what} are {size}, not a multiple of {factor}. The FP8 "
            "kernels work on whole scale blocks. Use the reference for this model."
        )
