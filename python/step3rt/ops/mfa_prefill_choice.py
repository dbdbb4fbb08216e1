"""Which chunks of a step the prefill kernel computes, and which rows the decode kernel.

Owns an estimate in CTA time; launches nothing. The prefill kernel reads K and V once for two
tokens, but a pair walks its whole context in one CTA. The decode kernel reads them for every token,
and cuts a context over as many CTAs as there are. So a chunk is worth a launch of its own if its
pairs fill the CTAs: a few tokens behind a long cached prefix stay rows of the decode kernel.
"""

import numpy as np
import numpy.typing as npt
import torch

from step3rt.ops import launch
from step3rt.ops.mfa_prefill import ITEM_TOKENS
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PAIR_COST_ROWS = 1.5
"""A pair of tokens costs the prefill kernel what so many single ones cost the decode kernel, block
for block. Predicted from decode's times (docs/kernels.md): 0.8 to 1.65 in BF16 and 1.3 to 2 in FP8,
the smaller where decode reads K and V from HBM, the larger where it finds them in L2."""

_FEWEST_ROWS_PER_PAIR = 1.5  # of chunks of three tokens, which make two pairs


def prefill_ctas_of(device: torch.device) -> int:
    """CTAs of the prefill kernel; 1 on the CPU, where every chunk of two or more is worth it."""
    return 1 if device.type == "cpu" else launch.num_sms(device)


def fewest_prefill_rows(num_ctas: int) -> int:
    """A step of fewer rows has no chunk that `is_for_prefill` chooses."""
    num_pairs = int(PAIR_COST_ROWS * num_ctas / ITEM_TOKENS) + 1
    return int(_FEWEST_ROWS_PER_PAIR * num_pairs)


def is_for_prefill(firsts: Ints, lengths: Ints, num_ctas: int) -> Bools:
    """Tells which chunks of a step the prefill kernel takes, such that both kernels are done first.

    Args:
        firsts: i64[C] tokens before each chunk.
        lengths: i64[C] tokens of each chunk. One of a single token is the decode kernel's.
        num_ctas: From `prefill_ctas_of`.

    Returns:
        bool[C].
    """
    chosen = np.zeros(len(lengths), dtype=np.bool_)
    candidates = np.flatnonzero(lengths > 1)
    if not len(candidates):
        return chosen
    first, length = firsts[candidates], lengths[candidates]
    longest = -(-(first + length) // BLOCK_SIZE_TOKENS)  # blocks of a chunk's last pair
    shortest = -(-(first + ITEM_TOKENS) // BLOCK_SIZE_TOKENS)
    blocks = -(-length // ITEM_TOKENS) * (longest + shortest) / 2  # of all pairs of a chunk
    # Pairs of other chunks fill the CTAs beside the longest one: take chunks by rising length of
    # their pairs, and as many as give the least sum of both kernels' times. In units of one row and
    # block; the decode kernel's other rows are in every sum, and left out.
    order = np.argsort(longest, kind="stable")
    taken = np.concatenate([[0.0], np.cumsum(blocks[order])])
    longest_taken = np.concatenate([[0], longest[order]])
    prefill = PAIR_COST_ROWS * np.maximum(longest_taken, taken / num_ctas)
    decode = ITEM_TOKENS * (taken[-1] - taken) / num_ctas
    chosen[candidates[order[: int(np.argmin(prefill + decode))]]] = True
    return chosen
