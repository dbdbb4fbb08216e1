"""What a lane does with plans. The plans here are data with the fields of `_core.StepPlan`."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.errors import Internal
from step3rt.instance.sequences import (
    PLACEHOLDER_TOKEN_ID,
    LaneSequences,
    PlannedChunk,
    StepNotDueError,
)


@dataclass
class Adjustments:
    presence_penalty: float = 0.0
    frequency_penalty: float = 1.0
    repetition_penalty: float = 1.0
    bias_token_ids: list[int] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)


@dataclass
class Sampling:
    prompt_logprobs: int | None = None
    adjustments: Adjustments | None = None


@dataclass
class Join:
    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Chunk:
    sequence_id: int
    num_computed_tokens: int
    num_new_tokens: int
    new_block_ids: list[int] = field(default_factory=list)
    samples: bool = False


@dataclass
class Plan:
    left: list[int] = field(default_factory=list)
    joined: list[Join] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


def new_lane() -> LaneSequences:
    return LaneSequences(num_blocks=10, block_size_tokens=4, vocab_size=100)


def apply(lane: LaneSequences, **fields: Any) -> list[PlannedChunk]:
    return lane.apply(Plan(**fields))  # type: ignore[arg-type]


def first_chunk(samples: bool = True) -> dict[str, Any]:
    return {
        "joined": [Join(7, [1, 2, 3, 4, 5], 5)],
        "chunks": [Chunk(7, 0, 5, [8, 2], samples)],
    }


def test_a_plan_joins_a_sequence_and_computes_its_prompt() -> None:
    (planned,) = apply(new_lane(), **first_chunk())
    assert list(planned.chunk.token_ids) == [1, 2, 3, 4, 5]
    assert planned.chunk.first_position == 0
    assert list(planned.chunk.block_ids) == [8, 2]
    assert list(planned.chunk.logit_offsets) == [4]


def test_a_sampled_token_is_the_next_chunk() -> None:
    lane = new_lane()
    (planned,) = apply(lane, **first_chunk())
    planned.accept(99, is_corrupt=False)
    (planned,) = apply(lane, chunks=[Chunk(7, 5, 1, [], True)])
    assert list(planned.chunk.token_ids) == [99]
    assert planned.chunk.first_position == 5


def test_a_failed_plan_that_is_sent_again_changes_nothing_more() -> None:
    lane = new_lane()
    (first,) = apply(lane, **first_chunk())
    (again,) = apply(lane, **first_chunk())
    assert again.chunk == first.chunk
    # The coordinator may also leave out what has taken effect.
    (short,) = apply(lane, chunks=[Chunk(7, 0, 5, [], True)])
    assert short.chunk == first.chunk


def test_a_sequence_that_left_is_forgotten_even_twice() -> None:
    lane = new_lane()
    apply(lane, **first_chunk())
    apply(lane, left=[7])
    apply(lane, left=[7])
    assert len(lane) == 0
    with pytest.raises(Internal, match="sequence 7, which has not joined"):
        apply(lane, chunks=[Chunk(7, 5, 1, [], True)])


def test_a_sequence_that_left_and_joins_in_one_plan_begins_anew() -> None:
    lane = new_lane()
    apply(lane, **first_chunk())
    (planned,) = apply(lane, left=[7], **first_chunk() | {"chunks": [Chunk(7, 0, 2, [5])]})
    assert list(planned.chunk.block_ids) == [5]
    assert list(planned.chunk.logit_offsets) == []


@pytest.mark.parametrize(
    ("chunk_end", "num_prompt", "expected"),
    [(2, 5, [[0, 1], [0, 1, 2]]), (4, 5, [[0, 1, 2, 3], [0]]), (2, 3, [[0, 1], [2]])],
)
def test_prompt_rows_of_all_chunks_predict_each_prompt_token_once(
    chunk_end: int, num_prompt: int, expected: list[list[int]]
) -> None:
    lane = new_lane()
    join = Join(7, [1, 2, 3, 4, 5], num_prompt, Sampling(prompt_logprobs=0))
    (first,) = apply(lane, joined=[join], chunks=[Chunk(7, 0, chunk_end, [0, 1])])
    first.accept(None, is_corrupt=False)
    (second,) = apply(lane, chunks=[Chunk(7, chunk_end, 5 - chunk_end, [], True)])
    found = [list(chunk.chunk.logit_offsets) for chunk in (first, second)]
    assert found == expected
    assert first.num_prompt_rows + second.num_prompt_rows == num_prompt - 1


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(7, 5, 1, [], True),  # not known yet
        Chunk(7, 0, 0, [1, 2], False),  # nothing
        Chunk(7, 0, 5, [1], True),  # more than its blocks hold
        Chunk(7, 0, 5, [1, 10], True),  # a block outside of the pool
        Chunk(7, 0, 5, [1, 2], False),  # ends at the last known token, and does not sample
        Chunk(7, 0, 4, [1, 2], True),  # samples before it
    ],
)
def test_a_plan_that_does_not_fit_is_refused(chunk: Chunk) -> None:
    with pytest.raises(Internal, match="The plan computes tokens"):
        apply(new_lane(), joined=[Join(7, [1, 2, 3, 4, 5], 5)], chunks=[chunk])


def test_tokens_of_a_join_count_as_prompt_or_as_generated() -> None:
    lane = new_lane()
    sampling = Sampling(adjustments=Adjustments(bias_token_ids=[4, 99], biases=[0.5, -1.0]))
    (planned,) = apply(
        lane, joined=[Join(7, [1, 1, 2, 2, 3], 3, sampling)], chunks=[Chunk(7, 0, 5, [0, 1], True)]
    )
    adjuster = planned.sequence.adjuster
    assert adjuster is not None
    assert adjuster.apply(torch.zeros(100))[:6].tolist() == [0, 0, -1, -1, 0.5, 0]
    planned.accept(2, is_corrupt=False)
    assert planned.sequence.token_ids == [1, 1, 2, 2, 3, 2]
    assert adjuster.apply(torch.zeros(100))[:6].tolist() == [0, 0, -2, -1, 0.5, 0]


def test_a_sequence_without_adjustments_counts_nothing() -> None:
    (planned,) = apply(new_lane(), **first_chunk())
    assert planned.sequence.adjuster is None


def test_a_bias_for_a_token_that_the_vocabulary_lacks_is_refused() -> None:
    sampling = Sampling(adjustments=Adjustments(bias_token_ids=[1, 100], biases=[1.0, 1.0]))
    with pytest.raises(Internal, match="logit bias for token 100"):
        apply(new_lane(), joined=[Join(7, [1], 1, sampling)])


@pytest.mark.parametrize("token_ids", [[], [100], [1, 2**31]])
def test_a_join_with_unusable_tokens_is_refused(token_ids: list[int]) -> None:
    with pytest.raises(Internal, match="Sequence 7 joins"):
        apply(new_lane(), joined=[Join(7, token_ids, 1)])


def test_deltas_of_a_step_that_is_not_due_are_kept_and_its_chunks_are_not() -> None:
    lane = new_lane()
    apply(lane, joined=[Join(6, [9], 1)], chunks=[Chunk(6, 0, 1, [0], True)])
    # Step 1 fails: nobody accepts it. Step 2 was planned on it.
    apply(lane, joined=[Join(7, [1, 2, 3, 4, 5], 5)], chunks=[Chunk(7, 0, 4, [8])])
    with pytest.raises(StepNotDueError, match="sequence 7 starts at token 4, and 0 are computed"):
        apply(
            lane,
            left=[6],
            joined=[Join(5, [4, 3], 2)],
            chunks=[Chunk(7, 4, 1, [2], True), Chunk(5, 0, 2, [3], True)],
        )
    # Both are planned again, and only their chunks are said again.
    (first,) = apply(lane, chunks=[Chunk(7, 0, 4)])
    first.accept(None, is_corrupt=False)
    second, other = apply(lane, chunks=[Chunk(7, 4, 1, [], True), Chunk(5, 0, 2, [], True)])
    assert (first.chunk.block_ids, second.chunk.block_ids) == ([8, 2], [8, 2])
    assert (second.chunk.token_ids, other.chunk.token_ids) == ([5], [4, 3])
    assert other.chunk.block_ids == [3]
    assert len(lane) == 2


def test_a_later_step_of_other_sequences_is_due_after_a_failure() -> None:
    lane = new_lane()
    apply(lane, **first_chunk())
    (other,) = apply(lane, joined=[Join(5, [4], 1)], chunks=[Chunk(5, 0, 1, [3], True)])
    assert other.chunk.token_ids == [4]


def test_a_first_chunk_after_a_cached_beginning_says_where_its_sequence_is() -> None:
    lane = new_lane()
    joined = [Join(7, [1, 2, 3, 4, 5], 5)]
    (planned,) = apply(lane, joined=joined, chunks=[Chunk(7, 4, 1, [8, 2], True)])
    assert (planned.chunk.first_position, planned.chunk.token_ids) == (4, [5])
    with pytest.raises(StepNotDueError):
        apply(lane, chunks=[Chunk(7, 5, 1, [], True)])


def test_a_corrupt_sequence_is_computed_on_and_stays_corrupt() -> None:
    lane = new_lane()
    (planned,) = apply(lane, **first_chunk())
    planned.accept(None, is_corrupt=True)
    (planned,) = apply(lane, chunks=[Chunk(7, 5, 1, [], True)])
    assert planned.chunk.token_ids == [PLACEHOLDER_TOKEN_ID]
    planned.accept(3, is_corrupt=False)
    assert planned.sequence.is_corrupt


def next_chunk(num_planned: int, num_plannable: int, num_blocks: int) -> Chunk:
    """Up to three tokens, and the blocks of four tokens that they need besides `num_blocks`."""
    end = min(num_planned + 3, num_plannable)
    new_block_ids = list(range(num_blocks, -(-end // 4)))
    return Chunk(7, num_planned, end - num_planned, new_block_ids, end == num_plannable)


@given(max_steps=st.integers(1, 4), failures=st.lists(st.booleans(), max_size=24))
def test_every_token_is_computed_once_and_in_order_whichever_steps_fail(
    max_steps: int, failures: list[bool]
) -> None:
    """A small coordinator that plans ahead and sends each delta once, whatever becomes of it."""
    lane, will_fail = new_lane(), iter(failures)
    in_flight: deque[tuple[Chunk, list[Join]]] = deque()
    joined = [Join(7, [50, 51, 52, 53, 54], 5)]
    num_known, num_planned, num_blocks, is_waiting = 5, 0, 0, False
    computed: list[int] = []
    while num_known < 30:
        is_waiting = is_waiting and bool(in_flight)
        while len(in_flight) < max_steps and not is_waiting:
            pending = sum(chunk.samples for chunk, _joined in in_flight)
            chunk = next_chunk(num_planned, num_known + pending, num_blocks)
            if chunk.num_new_tokens == 0:
                break
            num_planned += chunk.num_new_tokens
            num_blocks += len(chunk.new_block_ids)
            in_flight.append((chunk, joined))
            joined = []
        chunk, its_joins = in_flight.popleft()
        try:
            (planned,) = apply(lane, joined=its_joins, chunks=[chunk])
        except StepNotDueError:
            assert is_waiting
            continue
        assert not is_waiting, "a doomed step started"
        if next(will_fail, False):
            num_planned, is_waiting = len(computed), True
            continue
        computed += planned.chunk.token_ids
        planned.accept(num_known + 50 if chunk.samples else None, is_corrupt=False)
        num_known += chunk.samples
        assert planned.chunk.block_ids[:num_blocks] == list(range(len(planned.chunk.block_ids)))
    assert computed == list(range(50, 50 + len(computed)))
    assert len(computed) == num_known - 1
