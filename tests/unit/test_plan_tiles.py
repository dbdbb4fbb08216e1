"""Products compute whole tiles: more rows than they are given, in steps."""

import numpy as np
import pytest

from step3rt.plan.tiles import expert_rows, linear_rows, whole_tiles


@pytest.mark.parametrize(
    ("rows", "tile", "computed"),
    [(1, 256, 64), (64, 256, 64), (65, 256, 128), (192, 256, 256), (257, 256, 512), (192, 0, 192)],
)
def test_a_projection_computes_whole_tiles(rows: int, tile: int, computed: int) -> None:
    assert linear_rows(np.array([float(rows)]), tile) == pytest.approx([computed])


@pytest.mark.parametrize(
    ("rows", "tile", "full"),
    [(40, 256, 40), (100, 256, 64), (255, 256, 128), (263, 256, 256), (600, 256, 512), (9, 0, 9)],
)
def test_tiles_are_full_just_before_a_row_costs_another(rows: int, tile: int, full: int) -> None:
    assert whole_tiles(np.array([float(rows)]), tile) == pytest.approx([full])
    if full < rows:
        assert linear_rows(np.array([float(full)]), tile) == pytest.approx([full])
        assert linear_rows(np.array([full + 1.0]), tile) > full


def test_only_gate_and_up_of_an_expert_take_whole_tiles() -> None:
    rows = np.array([48.0, 192.0, 256.0])
    computed = expert_rows(rows, np.zeros(3), 128)
    assert computed == pytest.approx(rows + 2 / 3 * np.array([16, 64, 0]))
    assert expert_rows(rows, rows, 0) == pytest.approx(rows)


def test_a_short_remainder_joins_the_tile_before_it() -> None:
    assert expert_rows(np.array([268.0]), np.zeros(1), 128) == pytest.approx([268])
    assert expert_rows(np.array([280.0]), np.zeros(1), 128) == pytest.approx([280 + 2 / 3 * 104])


def test_rows_that_vary_compute_what_many_draws_do() -> None:
    draws = np.maximum(np.random.default_rng(0).normal(300, 60, 20_000), 0)
    expected = expert_rows(draws, np.zeros_like(draws), 128).mean()
    found = expert_rows(np.array([300.0]), np.array([60.0]), 128)
    assert found == pytest.approx([expected], rel=0.03)
