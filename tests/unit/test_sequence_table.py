"""What a device lane does with plans, while the steps of earlier ones are in flight."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3rt.errors import Internal
from step3rt.instance.sequence_table import PlannedStep, SequenceTable
from step3rt.instance.sequences import LaneSequences, StepNotDueError
from step3rt.instance.step_rows import fill_step
from step3rt.model.device_inputs import UNKNOWN_TOKEN_ID, HostStep
from step3rt.ops.sample import MAX_TOP
from tests.fixtures.device_party import chunk, join, plan

NUM_BLOCKS = 64
VOCAB_SIZE = 100


def new_table(num_slots: int = 8) -> SequenceTable:
    return SequenceTable(
        num_slots=num_slots, num_blocks=NUM_BLOCKS, max_model_len=256, vocab_size=VOCAB_SIZE
    )


def new_host() -> HostStep:
    return HostStep(64, MAX_TOP, torch.device("cpu"))


def accept(table: SequenceTable, planned: PlannedStep, *token_ids: int) -> Any:
    is_corrupt = np.zeros(len(planned.slots), dtype=np.bool_)
    return table.accept(planned, np.array(token_ids, dtype=np.int64), is_corrupt)


def launch(table: SequenceTable, plan: Any) -> tuple[PlannedStep, HostStep]:
    planned, host = table.apply(plan), new_host()
    fill_step(planned, table, host)
    table.launched(planned)
    return planned, host


def test_a_step_is_launched_before_the_token_that_it_continues_is_known() -> None:
    table = new_table()
    first, host = launch(
        table, plan(1, [chunk(7, 0, 3, known=3, blocks=[5])], [join(7, [11, 12, 13])])
    )
    assert host.token_ids[:3].tolist() == [11, 12, 13]
    assert host.kv_slots[:3].tolist() == [320, 321, 322]
    assert host.logit_rows[0] == 2
    _, host = launch(table, plan(2, [chunk(7, 3, 4, known=4)]))
    assert host.token_ids[0] == UNKNOWN_TOKEN_ID
    assert host.positions[0] == 3
    assert host.sampling_rows["position"][0] == 4
    accept(table, first, 20)
    # The token of step 1 is known, that of step 2 is not: step 3 continues the latter.
    _, host = launch(table, plan(3, [chunk(7, 4, 5, known=5)]))
    assert host.token_ids[0] == UNKNOWN_TOKEN_ID


def test_chunks_become_work_of_the_prefill_kernel_and_single_rows_do_not() -> None:
    table = new_table()
    joined = [join(7, [11, 12, 13]), join(8, [20]), join(9, list(range(1, 72)))]
    chunks = [
        chunk(7, 0, 3, known=3, blocks=[5]),
        chunk(8, 0, 1, known=1, blocks=[6]),
        chunk(9, 66, 70, known=71, blocks=[1, 2]),  # behind a cached prefix
    ]
    planned, host = table.apply(plan(1, chunks, joined)), new_host()
    order = fill_step(planned, table, host)
    assert order.has_prefill
    assert host.num_context_tokens[:8].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    first, _, last = planned.slots.tolist()
    count = int(host.num_prefill_items[0])
    assert host.prefill_items[:count].tolist() == [
        [6, 2, 69, last],
        [4, 2, 67, last],
        [2, 1, 3, first],
        [0, 2, 1, first],
    ]
    table.launched(planned)
    order = fill_step(table.apply(plan(2, [chunk(8, 1, 2, known=2)])), table, host)
    assert not order.has_prefill
    assert host.num_prefill_items[0] == 0
    assert host.num_context_tokens[0] == 2


def test_chunks_that_fill_no_gpu_stay_rows_of_the_decode_kernel() -> None:
    table = new_table()
    planned = table.apply(plan(1, [chunk(7, 0, 3, known=3, blocks=[5])], [join(7, [11, 12, 13])]))
    host = HostStep(64, MAX_TOP, torch.device("cpu"), prefill_ctas=132)
    assert not fill_step(planned, table, host).has_prefill
    assert host.num_context_tokens[:3].tolist() == [1, 2, 3]


def test_failed_steps_are_planned_again_from_what_was_accepted() -> None:
    table = new_table()
    first, _ = launch(table, plan(1, [chunk(7, 0, 2, known=2, blocks=[5])], [join(7, [11, 12])]))
    accept(table, first, 20)
    lost = [launch(table, plan(step, [chunk(7, step, step + 1, known=step + 1)]))[0]
            for step in (2, 3)]  # fmt: skip
    for planned in lost:
        table.fail(planned)
    with pytest.raises(StepNotDueError, match="starts at token 4, and 2 are computed"):
        table.apply(plan(4, [chunk(7, 4, 5, known=5)]))
    _, host = launch(table, plan(5, [chunk(7, 2, 3, known=3)]))
    assert host.token_ids[0] == 20


def test_what_a_step_gave_a_sequence_that_has_left_does_not_reach_the_next_in_its_place() -> None:
    table = new_table(num_slots=1)
    first, _ = launch(table, plan(1, [chunk(7, 0, 2, known=2, blocks=[5])], [join(7, [11, 12])]))
    second, host = launch(
        table, plan(2, [chunk(8, 0, 1, known=1, blocks=[6])], [join(8, [30])], left=[7])
    )
    assert host.token_ids[0] == 30
    accept(table, first, 20)
    table.fail(first)
    assert table.known[0] == 2
    assert table.last_token_ids[0] == UNKNOWN_TOKEN_ID
    accept(table, second, 40)
    _, host = launch(table, plan(3, [chunk(8, 1, 2, known=2)]))
    assert host.token_ids[0] == 40


def test_a_plan_that_is_applied_again_changes_nothing() -> None:
    table = new_table()
    repeated = plan(1, [chunk(7, 0, 2, known=2, blocks=[5])], [join(7, [11, 12])], left=[3])
    table.apply(repeated)
    launch(table, repeated)
    changes = table.take_table_changes()
    assert changes is None
    assert table.blocks[table.apply(plan(2, [chunk(7, 2, 3, known=3)])).slots[0], :2].tolist() == [
        5,
        0,
    ]


def test_block_tables_travel_as_what_is_new_in_them() -> None:
    table = new_table()
    planned = table.apply(
        plan(
            1, [chunk(7, 0, 60, known=130, blocks=[5, 9])], [join(7, list(range(5, 95)) + [1] * 40)]
        )
    )
    order = fill_step(planned, table, new_host())
    slot = int(planned.slots[0])
    assert order.table_changes is not None
    assert order.table_changes.tolist() == [[slot * 4, slot * 4 + 1], [5, 9]]
    assert order.num_samples == 0
    table.launched(planned)
    planned = table.apply(plan(2, [chunk(7, 60, 120, known=130, blocks=[9])]))
    assert fill_step(planned, table, new_host()).table_changes is None


def test_blocks_of_a_plan_that_was_not_launched_do_not_travel_to_the_next_in_the_slot() -> None:
    table = new_table(num_slots=1)
    first, _ = launch(table, plan(1, [chunk(7, 0, 64, known=64, blocks=[5])], [join(7, [1] * 64)]))
    with pytest.raises(StepNotDueError):  # planned on a step that failed
        table.apply(plan(3, [chunk(7, 65, 66, known=66, blocks=[6])]))
    accept(table, first, 20)
    # The stream ended with the failure; another request gets its slot, and blocks of its own.
    joined = [join(8, [30] * 70)]
    planned = table.apply(plan(5, [chunk(8, 0, 70, known=70, blocks=[9, 10])], joined, left=[7]))
    order = fill_step(planned, table, HostStep(128, MAX_TOP, torch.device("cpu")))
    assert order.table_changes is not None
    assert order.table_changes.tolist() == [[0, 1], [9, 10]]


def test_penalties_wait_for_the_tokens_that_they_count() -> None:
    table = new_table()
    adjustments = SimpleNamespace(
        presence_penalty=0.5, frequency_penalty=0.0, repetition_penalty=1.0,
        bias_token_ids=[4], biases=[2.0],
    )  # fmt: skip
    joined = [join(7, [11, 12], adjustments=adjustments), join(8, [13])]
    chunks = [chunk(7, 0, 2, known=2, blocks=[5]), chunk(8, 0, 1, known=1, blocks=[6])]
    first = table.apply(plan(1, chunks, joined))
    host = new_host()
    order = fill_step(first, table, host)
    assert not first.must_wait
    assert order.edits is not None
    assert not order.is_greedy
    assert host.edit_offsets[:3].tolist() == [0, 1, 1]  # the bias
    table.launched(first)
    again = plan(2, [chunk(7, 2, 3, known=3), chunk(8, 1, 2, known=2)])
    assert table.apply(again).must_wait
    accept(table, first, 20, 21)
    second = table.apply(again)
    assert not second.must_wait
    fill_step(second, table, host)
    assert host.edit_offsets[:3].tolist() == [0, 2, 2]  # and the token that was generated


def test_stop_tokens_are_masked_until_there_are_enough_tokens() -> None:
    table = new_table()
    joined = [join(7, [11, 12], min_tokens=2, stop_token_ids=[1, 3])]
    host = new_host()
    num_edits = []
    for step, (first, end) in enumerate([(0, 2), (2, 3), (3, 4)], 1):
        blocks = [5] if step == 1 else []
        planned = table.apply(plan(step, [chunk(7, first, end, known=end, blocks=blocks)], joined))
        joined = []
        order = fill_step(planned, table, host)
        num_edits.append(0 if order.edits is None else len(order.edits))
        table.launched(planned)
        accept(table, planned, 20)
    assert num_edits == [2, 2, 0]


def test_rows_that_predict_the_prompt_come_after_those_that_sample() -> None:
    table = new_table()
    joined = [join(7, [11, 12, 13, 14], prompt_logprobs=2), join(8, [15, 16])]
    chunks = [chunk(7, 0, 3, known=4, blocks=[5]), chunk(8, 0, 2, known=2, blocks=[6])]
    planned, host = table.apply(plan(1, chunks, joined)), new_host()
    order = fill_step(planned, table, host)
    assert (order.num_rows, order.num_samples, order.num_top) == (5, 1, 2)
    assert host.logit_rows[:4].tolist() == [4, 0, 1, 2]
    assert order.scored_token_ids == [12, 13, 14]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (plan(1, [chunk(9, 0, 1, known=1)]), "has not joined"),
        (plan(1, [], [join(1, [VOCAB_SIZE])]), "below 100"),
        (plan(1, [], [join(1, [])]), "one token or more"),
        (plan(1, [], [join(n, [1]) for n in range(9)]), "room for no more"),
        (plan(1, [chunk(7, 0, 1, known=1, blocks=[64])], [join(7, [1])]), "the pool 64"),
        (plan(1, [chunk(7, 0, 1, known=1)], [join(7, [1])]), "0 blocks"),
        (plan(1, [chunk(7, 0, 2, known=2, blocks=[1])], [join(7, [1])]), "has 1 tokens"),
        (plan(1, [chunk(7, 0, 1, known=2, blocks=[1])], [join(7, [1])]), "samples: False"),
        (plan(1, [chunk(7, 0, 0, known=0, blocks=[1])], [join(7, [1])]), r"tokens 0\.\.0"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(broken: Any, message: str) -> None:
    with pytest.raises(Internal, match=message):
        new_table().apply(broken)


@given(data=st.data())
def test_rows_are_those_of_the_reference_lane_whatever_happens(data: st.DataObject) -> None:
    """The reference lane runs a step at a time; the table launches the next one early."""
    table = new_table()
    reference = LaneSequences(num_blocks=NUM_BLOCKS, block_size_tokens=64, vocab_size=VOCAB_SIZE)
    prompts = data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=70),
                                 min_size=1, max_size=3))  # fmt: skip
    known = [len(prompt) for prompt in prompts]
    computed = [0] * len(prompts)
    token_ids = st.integers(0, 99)
    in_flight: tuple[PlannedStep, list[int]] | None = None
    for step in range(1, 8):
        chunks, new_tokens = [], []
        saved = list(known), list(computed)
        for index in range(len(prompts)):
            end = min(known[index], computed[index] + data.draw(st.integers(1, 40)))
            blocks = range(-(-computed[index] // 64), -(-end // 64))
            chunks.append(
                chunk(index, computed[index], end, known=known[index],
                      blocks=[4 * index + block for block in blocks])
            )  # fmt: skip
            if end == known[index]:
                new_tokens.append(data.draw(token_ids))
                known[index] += 1
            computed[index] = end
        made = plan(step, chunks, [join(i, p) for i, p in enumerate(prompts)] if step == 1 else ())
        planned, host = launch(table, deepcopy(made))
        expected = reference.apply(deepcopy(made))
        rows = [row for one in expected for row in _reference_rows(one)]
        got = zip(host.token_ids, host.positions, host.kv_slots, strict=True)
        for row, (token_id, position, kv_slot) in zip(rows, got, strict=False):
            assert (position, kv_slot) == row[1:]
            assert token_id in (row[0], UNKNOWN_TOKEN_ID)
        if in_flight is not None:
            accept(table, in_flight[0], *in_flight[1])
        in_flight = planned, new_tokens
        if step > 1 and data.draw(st.booleans()):
            table.fail(planned)  # all before it is accepted
            in_flight = None
            known, computed = saved
            continue
        sampled = iter(new_tokens)
        for one in expected:
            one.accept(next(sampled) if one.samples else None, False)


def _reference_rows(planned: Any) -> list[tuple[int, int, int]]:
    first, blocks = planned.chunk.first_position, planned.chunk.block_ids
    return [
        (token_id, position, blocks[position // 64] * 64 + position % 64)
        for position, token_id in enumerate(planned.chunk.token_ids, first)
    ]
