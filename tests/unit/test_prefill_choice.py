"""Which chunks the prefill kernel takes."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.model.graph_shapes import GraphShape, graph_shapes
from step3rt.ops.mfa_prefill_choice import (
    PAIR_COST_ROWS,
    fewest_prefill_rows,
    is_for_prefill,
    prefill_ctas_of,
)

SMS = 132
Chunks = list[tuple[int, int]]  # tokens before, tokens


def choose(chunks: Chunks, num_ctas: int = SMS) -> list[bool]:
    columns = np.array(chunks, dtype=np.int64).reshape(-1, 2)
    return is_for_prefill(columns[:, 0], columns[:, 1], num_ctas).tolist()


def test_a_chunk_has_to_fill_the_sms() -> None:
    assert choose([(0, 512)]) == [True]
    assert choose([(8192, 512)]) == [True]
    assert choose([(30_000, 64)]) == [False]
    assert choose([(0, 2)]) == [False]
    assert choose([]) == []


def test_a_short_chunk_joins_long_ones_unless_its_context_is_the_longest_by_far() -> None:
    assert choose([(0, 1000), (500, 8)]) == [True, True]
    assert choose([(0, 1000), (30_000, 8)]) == [True, False]
    assert choose([(30_000, 8), (0, 1000)]) == [False, True]
    assert choose([(3, 1), (0, 1000)]) == [False, True]


def test_on_the_cpu_every_chunk_of_two_is_worth_it() -> None:
    num_ctas = prefill_ctas_of(torch.device("cpu"))
    assert choose([(0, 2), (9000, 1), (300, 3)], num_ctas) == [True, False, True]


chunks_of_a_step = st.lists(
    st.tuples(st.integers(0, 20_000), st.integers(1, 200)), min_size=1, max_size=6
)


@given(chunks_of_a_step, st.sampled_from([1, 8, SMS]))
def test_no_other_choice_is_estimated_to_be_faster(chunks: Chunks, num_ctas: int) -> None:
    def cost(taken: list[int]) -> float:
        pairs, longest, rows = 0.0, 0, 0.0
        for index, (first, length) in enumerate(chunks):
            last = -(-(first + length) // 64)
            blocks = -(-length // 2) * (last + -(-(first + 2) // 64)) / 2
            if index in taken:
                pairs, longest = pairs + blocks, max(longest, last)
            elif length > 1:
                rows += 2 * blocks
        return PAIR_COST_ROWS * max(longest, pairs / num_ctas) + rows / num_ctas

    several = [index for index, (_, length) in enumerate(chunks) if length > 1]
    chosen = [index for index, is_chosen in enumerate(choose(chunks, num_ctas)) if is_chosen]
    assert set(chosen) <= set(several)
    others = [
        list(taken) for count in range(len(several) + 1) for taken in combinations(several, count)
    ]
    assert cost(chosen) <= min(map(cost, others)) * (1 + 1e-9)


@given(chunks_of_a_step, st.sampled_from([1, 8, SMS]))
def test_smaller_steps_than_the_smallest_have_nothing_for_prefill(
    chunks: Chunks, num_ctas: int
) -> None:
    if any(choose(chunks, num_ctas)):
        assert sum(length for _, length in chunks) >= fewest_prefill_rows(num_ctas)


@pytest.mark.parametrize("num_ctas", [1, SMS])
@pytest.mark.parametrize("max_tokens", [16, 100, 256, 1024])
def test_every_step_has_a_graph(max_tokens: int, num_ctas: int) -> None:
    shapes = graph_shapes(max_tokens, num_ctas)
    assert len(set(shapes)) == len(shapes)
    assert [shape.num_rows for shape in shapes] == sorted(
        (shape.num_rows for shape in shapes), reverse=True
    )
    for num_rows in range(1, max_tokens + 1):
        for num_logits in (0, 1, num_rows):
            for has_prefill in (False, True):
                shape = GraphShape.of_step(
                    num_rows, num_logits, max_tokens, has_prefill=has_prefill
                )
                assert shape.num_rows >= num_rows
                assert shape.num_logits >= num_logits
                if not has_prefill or num_rows >= fewest_prefill_rows(num_ctas):
                    assert shape in shapes


def test_decode_has_the_graphs_that_it_had_and_prefill_those_that_it_may_need() -> None:
    shapes = graph_shapes(1024, SMS)
    decode = [shape.num_rows for shape in shapes if not shape.has_prefill]
    prefill = [shape.num_rows for shape in shapes if shape.has_prefill]
    assert len(decode) == 23
    assert sorted(set(prefill)) == [192, 256, 384, 512, 768, 1024]
    assert not any(shape.has_prefill for shape in graph_shapes(128, SMS))
