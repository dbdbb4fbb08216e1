"""Computes bias and penalties in numpy float64, one token at a time, as their formulas say.

It never shares code with the product.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tests.oracle.tensor_file import Array


def adjusted_logits(
    logits: Array,
    prompt: Sequence[int],
    generated: Sequence[int],
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    bias: Mapping[int, float] | None = None,
) -> Array:
    """float64[vocab] from float[vocab]: what the next token is chosen from."""
    adjusted = logits.astype(np.float64)
    counts, seen = Counter(generated), {*prompt, *generated}
    for token in range(len(adjusted)):
        value = adjusted[token] + (bias or {}).get(token, 0.0)
        if token in seen:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * counts[token]
        if counts[token]:
            value -= presence
        adjusted[token] = value
    return adjusted
