"""Turns the final hidden state of a step into what it reports of each chunk.

Owns the bookkeeping between rows and chunks; the mathematics is `ops.sampling`.
"""

from dataclasses import dataclass, field

import torch

from step3rt.instance.sequences import PlannedChunk
from step3rt.model.step3 import compute_logits
from step3rt.model.weights import AttentionWeights
from step3rt.ops.sampling import SamplingRow, sample, token_logprobs

# Rows of logits held at a time: at Step-3's vocabulary 64 rows take 33 MB in float32.
MAX_LOGIT_ROWS = 64

# (token id, log-probability, the most likely tokens with theirs)
PromptLogprob = tuple[int, float, list[tuple[int, float]]]


@dataclass(slots=True)
class ChunkResult:
    """What one chunk gave; token_id is None if it does not sample or is corrupt."""

    sequence_id: int
    token_id: int | None = None
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    prompt_logprobs: list[PromptLogprob] = field(default_factory=list)
    is_corrupt: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of logits: the prompt token that it predicts, or None if it samples."""

    result: ChunkResult
    planned: PlannedChunk
    prompt_token_id: int | None


def sample_chunks(
    final_hidden: torch.Tensor, planned: list[PlannedChunk], weights: AttentionWeights
) -> list[ChunkResult]:
    """Samples and scores every chunk of a step.

    Args:
        final_hidden: float[R, H], the rows that the chunks' `logit_offsets` name, in order.
        planned: the step's chunks.
        weights: with the head.

    Returns:
        One result per chunk, in order.
    """
    results = [ChunkResult(chunk.sequence_id) for chunk in planned]
    rows: list[_Row] = []
    for result, chunk in zip(results, planned, strict=True):
        first = chunk.chunk.first_position + 1
        for token_id in chunk.sequence.token_ids[first : first + chunk.num_prompt_rows]:
            rows.append(_Row(result, chunk, token_id))
        if chunk.samples:
            rows.append(_Row(result, chunk, None))
    for first in range(0, len(rows), MAX_LOGIT_ROWS):
        part = slice(first, first + MAX_LOGIT_ROWS)
        _finish_rows(compute_logits(final_hidden[part], weights), rows[part])
    return results


def _finish_rows(logits: torch.Tensor, rows: list[_Row]) -> None:
    is_finite = torch.isfinite(logits).all(dim=1).tolist()
    for row, is_good in zip(rows, is_finite, strict=True):
        row.result.is_corrupt |= not is_good
    good = [index for index, is_good in enumerate(is_finite) if is_good]
    if len(good) < len(rows):
        logits, rows = logits[good], [rows[index] for index in good]
    if not rows:
        return

    samples = [index for index, row in enumerate(rows) if row.prompt_token_id is None]
    token_ids = [row.prompt_token_id or 0 for row in rows]
    sampled = sample(
        logits if len(samples) == len(rows) else logits[samples],
        [_sampling_row(rows[index].planned) for index in samples],
    )
    for index, token_id in zip(samples, sampled, strict=True):
        token_ids[index] = token_id
        rows[index].result.token_id = token_id

    wanted = [_num_top(row) for row in rows]
    scored = [index for index, num_top in enumerate(wanted) if num_top is not None]
    if not scored:
        return
    scores = token_logprobs(
        logits[scored],
        [token_ids[index] for index in scored],
        max(wanted[index] or 0 for index in scored),
    )
    for index, (logprob, top) in zip(scored, scores, strict=True):
        row, top = rows[index], top[: wanted[index]]
        if row.prompt_token_id is None:
            row.result.logprob, row.result.top = logprob, top
        else:
            row.result.prompt_logprobs.append((row.prompt_token_id, logprob, top))


def _num_top(row: _Row) -> int | None:
    sampling = row.planned.sequence.sampling
    if row.prompt_token_id is None:
        return sampling.top_logprobs
    return sampling.prompt_logprobs


def _sampling_row(planned: PlannedChunk) -> SamplingRow:
    sequence, sampling = planned.sequence, planned.sequence.sampling
    num_generated = len(sequence.token_ids) - sequence.num_prompt_tokens
    is_too_short = num_generated < sampling.min_tokens
    return SamplingRow(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        position=len(sequence.token_ids),
        masked_token_ids=tuple(sampling.stop_token_ids) if is_too_short else (),
        adjuster=sequence.adjuster,
    )
