"""What `LLM` makes of its arguments, before anything is started."""

from typing import Any

import numpy as np
import pytest

from step3rt.errors import InvalidArgument
from step3rt.llm import _as_batch


def test_a_batch_is_prompts_or_the_ids_of_one_prompt_but_not_both() -> None:
    assert _as_batch("text") == ["text"]
    assert _as_batch([1, 2]) == [[1, 2]]
    assert _as_batch(["text", (1, 2)]) == ["text", [1, 2]]
    assert _as_batch([]) == []
    with pytest.raises(InvalidArgument, match="1 prompts and 2 ids"):
        _as_batch(["text", 1, 2])
    assert _as_batch(np.array([1, 2])) == [[1, 2]]


@pytest.mark.parametrize("prompts", [b"text", [b"text"], {"prompt": "text"}, [{"prompt": "text"}]])
def test_bytes_and_mappings_are_no_prompts(prompts: Any) -> None:
    with pytest.raises(InvalidArgument, match="one text or one list of token ids"):
        _as_batch(prompts)
