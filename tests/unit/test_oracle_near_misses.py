"""Shows that the oracle can tell Step-3 from near misses, and that no tensor is without effect."""

import numpy as np
import pytest

from tests.fixtures.checkpoint import CheckpointSpec, make_weights, weight_shapes
from tests.oracle import step3_numpy
from tests.oracle.near_misses import (
    FUNCTION_MUTANTS,
    relative_difference,
    weight_mutants,
    with_weights,
)
from tests.oracle.step3_numpy import Step3Oracle

TOKEN_IDS = np.random.default_rng(5).integers(0, 256, 24).tolist()
MEASURABLE = 1e-2  # of the largest logit: 10,000 times what float32 implementations are allowed


def test_wrong_weights_and_settings_change_the_logits(tiny_oracle: Step3Oracle) -> None:
    expected = tiny_oracle.logits(TOKEN_IDS)
    differences = {
        name: relative_difference(mutant.logits(TOKEN_IDS), expected)
        for name, mutant in weight_mutants(tiny_oracle).items()
    }
    assert {name: d for name, d in differences.items() if d < MEASURABLE} == {}


@pytest.mark.parametrize("mutant", FUNCTION_MUTANTS)
def test_wrong_operations_change_the_logits(
    tiny_oracle: Step3Oracle, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    expected = tiny_oracle.logits(TOKEN_IDS)
    function_name, replacement = FUNCTION_MUTANTS[mutant]
    monkeypatch.setattr(step3_numpy, function_name, replacement)
    assert relative_difference(tiny_oracle.logits(TOKEN_IDS), expected) > MEASURABLE


def test_every_tensor_changes_the_logits(tiny_oracle: Step3Oracle) -> None:
    expected = tiny_oracle.logits(TOKEN_IDS)
    redrawn = make_weights(CheckpointSpec(seed=1))
    differences = {
        name: relative_difference(
            with_weights(tiny_oracle, {name: redrawn[name].astype(np.float64)}).logits(TOKEN_IDS),
            expected,
        )
        for name in tiny_oracle.weights
    }
    assert differences.keys() == weight_shapes(CheckpointSpec()).keys()
    assert {name: d for name, d in differences.items() if d < MEASURABLE} == {}
