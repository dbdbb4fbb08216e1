"""Whole prompts cut into steps."""

import pytest

from step3rt.errors import InvalidArgument
from step3rt.model.prompt_steps import MAX_ENDS, Prompt, prompt_steps
from step3rt.ops.mfa_prefill import PrefillChunk


def test_prompts_follow_each_other_in_steps_of_the_given_size() -> None:
    prompts = [Prompt(range(100, 170), [7, 4]), Prompt([9], [2]), Prompt(range(5), [3], 2)]
    first, second = prompt_steps(prompts, 60)
    assert first.chunks == [PrefillChunk(0, 60, 0, 0)]
    assert (first.end_rows, first.end_prompts) == ([], [])
    assert second.chunks == [
        PrefillChunk(0, 10, 60, 0),
        PrefillChunk(10, 1, 0, 1),
        PrefillChunk(11, 3, 2, 2),
    ]
    assert second.token_ids.tolist() == [*range(160, 170), 9, 2, 3, 4]
    assert second.positions.tolist() == [*range(60, 70), 0, 2, 3, 4]
    assert second.slots.tolist()[:7] == [7 * 64 + 60, 508 + 1, 508 + 2, 508 + 3, 256, 257, 258]
    assert second.slots.tolist()[10:] == [128, 194, 195, 196]
    assert second.block_tables.tolist() == [[7, 4], [2, 0], [3, 0]]
    assert (second.end_rows, second.end_prompts) == ([9, 10, 13], [0, 1, 2])


def test_no_more_prompts_end_in_a_step_than_it_computes_logits_of() -> None:
    prompts = [Prompt([1, 2], [index]) for index in range(MAX_ENDS + 3)]
    steps = list(prompt_steps(prompts, 1000))
    assert [len(step.end_rows) for step in steps] == [MAX_ENDS, 3]
    assert [index for step in steps for index in step.end_prompts] == list(range(MAX_ENDS + 3))


@pytest.mark.parametrize(
    "prompt", [Prompt([], [1]), Prompt([1, 2], [1], 2), Prompt(range(65), [1])]
)
def test_prompts_that_cannot_be_computed_are_refused(prompt: Prompt) -> None:
    with pytest.raises(InvalidArgument, match="cannot be computed"):
        list(prompt_steps([prompt], 8))
