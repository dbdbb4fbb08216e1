"""Which variant of the FP8 linear kernel is the fastest, by weight shape and number of tokens.

Owns the measured table and the lookup; never measures.
"""

from step3rt.ops.linear_fp8_variant import LinearVariant

FALLBACK = LinearVariant(128, 128, split=1, cast=1, stages=6, is_overlapped=True)
"""Covers every weight of whole 128x128 blocks."""

CHOICES: dict[tuple[int, int], tuple[tuple[int, LinearVariant], ...]] = {}
"""(outputs, inputs) -> (most tokens, variant), in rising order; the last serves all above."""


def choose_variant(num_tokens: int, num_outputs: int, num_inputs: int) -> LinearVariant:
    """Returns the fastest measured variant of that shape, or one that covers every shape."""
    choices = CHOICES.get((num_outputs, num_inputs))
    if choices is None:
        return FALLBACK
    for max_tokens, variant in choices:
        if num_tokens <= max_tokens:
            return variant
    return choices[-1][1]
