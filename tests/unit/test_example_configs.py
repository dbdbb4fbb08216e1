"""The sizes in examples/: Step-3, and what fewer GPUs hold of it."""

import dataclasses
from pathlib import Path

import pytest

from step3rt.model.config import Step3Config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "num_experts"), [("step3-slice", 3), ("step3-slice-6", 6), ("step3-slice-12", 12)]
)
def test_slices_are_the_full_model_but_for_the_experts(name: str, num_experts: int) -> None:
    full = Step3Config.from_directory(EXAMPLES / "step3")
    assert (full.num_layers, full.num_experts, full.top_k) == (61, 48, 3)
    part = Step3Config.from_directory(EXAMPLES / name)
    assert part == dataclasses.replace(full, num_experts=num_experts)
