"""Rows that matrix products compute beyond those they are given: tiles are whole.

Owns the rule of a kernel's tiles; which kernels have tiles of which size is the profile's.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]

SMALL_TILES = (64.0, 128.0)
"""Products of few rows have tiles of their own: wgmma's 64 rows, and two of them."""

_JOINED_ROWS = 16
"""A remainder of so many rows joins the tile before it, in the experts' kernels."""
_TALL_SHARE = 2 / 3
"""Of an expert's FLOPs, those of gate and up: down takes rows in steps of 16."""
# Means over a normal deviate, by Gauss and Hermite.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def whole_tiles(rows: Floats, tile_rows: float) -> Floats:
    """The most rows, of no more than `rows`, that fill their tiles; `rows` where none is full.

    One row more costs a tile more, so the best batch is often here.
    """
    sizes = np.asarray(rows, dtype=np.float64)
    if not tile_rows:
        return sizes
    full = tile_rows * np.floor(sizes / tile_rows)
    for tile in sorted(SMALL_TILES, reverse=True):
        if tile < tile_rows:
            full = np.where((full == 0) & (sizes >= tile), tile, full)
    return np.where(full > 0, full, sizes)


def linear_rows(rows: Floats, tile_rows: float) -> Floats:
    """Rows that a projection computes for `rows`; `tile_rows` of 0 is a kernel without tiles."""
    return np.asarray(rows, dtype=np.float64) if not tile_rows else _padded(rows, tile_rows)


def expert_rows(rows: Floats, deviation: Floats, tile_rows: float) -> Floats:
    """Rows of the FLOPs that an expert takes for `rows`, which vary by a standard `deviation`.

    Args:
        rows: mean rows of an expert.
        deviation: the same shape; 0 where all experts have the mean, as where a token takes all.
        tile_rows: 0 is a kernel without tiles.
    """
    mean = np.asarray(rows, dtype=np.float64)
    if not tile_rows:
        return mean
    drawn = np.maximum(mean[..., None] + np.asarray(deviation)[..., None] * _NODES, 0.0)
    whole = np.maximum(_padded(drawn - _JOINED_ROWS, tile_rows), drawn)
    padding = np.where(drawn > 0, whole - drawn, 0.0) @ _WEIGHTS
    rows_of_flops: Floats = mean + _TALL_SHARE * padding
    return rows_of_flops


def _padded(rows: Floats, tile_rows: float) -> Floats:
    whole = tile_rows * np.ceil(np.asarray(rows, dtype=np.float64) / tile_rows)
    for tile in sorted(SMALL_TILES, reverse=True):
        if tile < tile_rows:
            whole = np.where(np.asarray(rows) <= tile, tile, whole)
    return whole
