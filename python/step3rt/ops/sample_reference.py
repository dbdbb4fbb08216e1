"""What the sampler's kernels compute, in torch on the CPU, from the rows that they read.

Owns the edits of packed rows; the choice itself is `ops.sampling.sample`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from step3rt.ops.sampling import SamplingRow, sample, token_logprobs

IS_KNOWN, IS_MASKED = 1, 2
"""Flags of an edit: repetition applies to its token; the token cannot be chosen."""

_LARGEST = torch.finfo(torch.float32).max

Packed = np.ndarray[Any, np.dtype[np.void]]
"""Structs as `ops.sample` packs them."""


@dataclass(frozen=True, slots=True)
class RowSample:
    """One row's results; `logprob` is NaN, and `top` empty, where not asked for or corrupt."""

    token_id: int
    is_corrupt: bool
    logprob: float
    top: list[tuple[int, float]]


def sample_row(logits: torch.Tensor, row: np.void, edits: Packed) -> RowSample:
    """Chooses one row's token as a kernel does.

    Args:
        logits: bf16 or f32[V], on the CPU.
        row: One packed row.
        edits: The row's edits, by token.
    """
    raw = logits.float()
    if not bool(raw.isfinite().all()):
        token_id = int(raw.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax())
        return RowSample(token_id, is_corrupt=True, logprob=float("nan"), top=[])
    edited = _edit(raw, row, edits) if len(edits) else raw
    how = SamplingRow(
        temperature=float(row["temperature"]),
        top_k=int(row["top_k"]),
        top_p=float(row["top_p"]),
        min_p=float(row["min_p"]),
        seed=int(row["seed"]),
        position=int(row["position"]),
    )
    # With everything masked there is no distribution: the first token, as the kernel.
    is_sampled = how.temperature > 0 and bool((edited > -torch.inf).any())
    (token_id,) = sample(edited[None], [how]) if is_sampled else [int(edited.argmax())]
    num_top = int(row["num_top"])
    if num_top < 0:
        return RowSample(token_id, is_corrupt=False, logprob=float("nan"), top=[])
    ((logprob, top),) = token_logprobs(raw[None], [token_id], num_top)
    return RowSample(token_id, is_corrupt=False, logprob=logprob, top=top)


def _edit(logits: torch.Tensor, row: np.void, edits: Packed) -> torch.Tensor:
    """f32[V] after bias, repetition, frequency and presence in this order, then masks."""
    tokens = torch.from_numpy(edits["token"].astype(np.int64))
    counts = torch.from_numpy(edits["num_generated"].astype(np.float64))
    flags = torch.from_numpy(edits["flags"].astype(np.int64))
    biased = logits[tokens] + torch.from_numpy(edits["bias"].copy())
    # float64, so that a tiny or large repetition penalty overflows nothing.
    exact = biased.double()
    repetition = float(row["repetition"])
    repeated = torch.where(exact > 0, exact / repetition, exact * repetition)
    exact = torch.where((flags & IS_KNOWN) != 0, repeated, exact)
    exact = exact - float(row["frequency"]) * counts - float(row["presence"]) * (counts > 0)
    edited = logits.clone()
    bounded = exact.clamp(-_LARGEST, _LARGEST).float()
    edited[tokens] = bounded.masked_fill((flags & IS_MASKED) != 0, -torch.inf)
    return edited
