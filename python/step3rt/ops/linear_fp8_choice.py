"""Which variant of the FP8 linear kernel is the fastest, by weight shape and number of tokens.

Owns the measured table and the lookup; never measures.
"""

from step3rt.ops.linear_fp8_variant import LinearVariant

FALLBACK = LinearVariant(128, 128, split=1, cast=1, stages=6)
"""Covers every weight of whole 128x128 blocks."""

# H200s, CUDA 13.0, 2026-11-22 (o_proj: -23): CUDA graph replay, medians, 1 GiB of weights rotated,
# the best of several sweeps. `python -m step3rt.bench.linear_fp8` measures its candidates anew.
# o_proj with 129 to 256 tokens: the fastest after seconds of load, under the card's power limit.
# Tile, split, cast, stages, CTAs of an SM, chunk, share.
CHOICES: dict[tuple[int, int], tuple[tuple[int, LinearVariant], ...]] = {
    (2560, 7168): (  # qkv
        (64, LinearVariant(64, 128, 5, 1, 8, 1, 4)),  # 8.6 us
        (128, LinearVariant(128, 128, 5, 1, 6, 1, 4)),  # 11.4 us
        (256, LinearVariant(128, 80, 2, 1, 7, 1, 4)),  # 15.1 us
        (512, LinearVariant(128, 160, 2, 1, 6, 1, 0)),  # 22.4 us
        (2048, LinearVariant(128, 160, 1, 1, 6, 1, 0)),  # 34.5 us at 1,024
    ),
    (16384, 2048): (  # wq
        (64, LinearVariant(64, 128, 1, 1, 8, 1, 4)),  # 9.8 us
        (128, LinearVariant(128, 128, 1, 1, 6, 1, 4)),  # 12.0 us
        (2048, LinearVariant(256, 128, 1, 1, 4, 1, 0)),  # 17.7 us at 256
    ),
    (7168, 16384): (  # o_proj
        (64, LinearVariant(64, 128, 2, 4, 8, 1, 4)),  # 31.6 us
        (128, LinearVariant(128, 128, 2, 4, 6, 1, 4)),  # 34.9 us
        (256, LinearVariant(128, 128, 1, 1, 6, 1, 4, 2)),  # 62.2 us
        (1024, LinearVariant(256, 128, 1, 1, 4, 1, 0)),  # 106.8 us at 512, 234.8 at 1,024
        (2048, LinearVariant(256, 128, 1, 4, 4, 1, 0)),  # 463.7 us
    ),
}
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
