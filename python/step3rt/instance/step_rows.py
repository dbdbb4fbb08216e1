"""Turns a planned step into rows for the device, and what comes back into outputs of its chunks.

Owns the bookkeeping between rows and chunks; the table knows the sequences, the device computes.
"""

import numpy as np
import torch

from step3rt import _core
from step3rt.instance.sequence_table import Bools, PlannedStep, SequenceTable
from step3rt.model.device_attention import PromptScores, StepOrder
from step3rt.model.device_inputs import UNKNOWN_TOKEN_ID, HostStep
from step3rt.ops.mfa_prefill import PrefillChunk, prefill_items
from step3rt.ops.mfa_prefill_choice import is_for_prefill
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS


def fill_step(planned: PlannedStep, table: SequenceTable, host: HostStep) -> StepOrder:
    """Writes a step's rows to `host`, one chunk after the other, and takes the table's changes.

    Call it before `table.launched(planned)`.
    """
    lengths = planned.end - planned.first
    ends = np.cumsum(lengths)
    starts = ends - lengths
    num_rows = int(ends[-1])
    slots = np.repeat(planned.slots, lengths)
    positions = np.repeat(planned.first - starts, lengths) + np.arange(num_rows)
    host.sequence_slots[:num_rows] = slots
    host.positions[:num_rows] = positions
    host.num_context_tokens[:num_rows] = positions + 1
    has_prefill = _fill_prefill(planned, host, (starts, lengths))
    blocks = table.blocks[slots, positions // BLOCK_SIZE_TOKENS]
    host.kv_slots[:num_rows] = blocks * BLOCK_SIZE_TOKENS + positions % BLOCK_SIZE_TOKENS
    _fill_token_ids(planned, table, host, (starts, lengths))

    sampled = planned.slots[planned.samples]
    num_samples = len(sampled)
    host.logit_rows[:num_samples] = ends[planned.samples] - 1
    rows = host.sampling_rows[:num_samples]
    rows[:] = table.sampling_rows[sampled]
    rows["position"] = planned.end[planned.samples]
    has_logprobs = bool((rows["num_top"] >= 0).any())
    edits = _fill_edits(planned, table, host)
    scored_token_ids, num_top = _fill_prompt_rows(planned, host, starts)
    changes = table.take_table_changes()
    return StepOrder(
        num_rows=num_rows,
        num_samples=num_samples,
        scored_token_ids=scored_token_ids,
        num_top=num_top,
        table_changes=None if changes is None else torch.from_numpy(changes),
        edits=edits,
        is_greedy=edits is None and not has_logprobs and not rows["temperature"].any(),
        has_logprobs=has_logprobs,
        has_prefill=has_prefill,
    )


def corrupt_chunks(planned: PlannedStep, host: HostStep, scores: PromptScores | None) -> Bools:
    """Which chunks had a logit that is not finite, bool[C]."""
    is_corrupt = np.zeros(len(planned.slots), dtype=np.bool_)
    num_samples = int(planned.samples.sum())
    is_corrupt[planned.samples] = host.is_corrupt_out[:num_samples] != 0
    if scores is not None:
        is_bad = ~np.isfinite(scores.logprobs.numpy())
        chunks = np.repeat(np.arange(len(planned.slots)), planned.num_prompt_rows)
        is_corrupt[chunks[is_bad]] = True
    return is_corrupt


def step_outputs(
    planned: PlannedStep, host: HostStep, scores: PromptScores | None, is_corrupt: Bools
) -> list[_core.SequenceOutput]:
    """Returns what a step reports, one output per chunk, once its event is done."""
    token_ids: list[int | None] = [None] * len(planned.slots)
    num_samples = int(planned.samples.sum())
    sampled = host.token_ids_out[:num_samples].tolist()
    if num_samples == len(token_ids):
        token_ids = sampled
    else:
        for index, token_id in zip(np.flatnonzero(planned.samples), sampled, strict=True):
            token_ids[index] = token_id
    rare = is_corrupt | (planned.num_prompt_rows > 0)
    rare[planned.samples] |= host.sampling_rows["num_top"][:num_samples] >= 0
    outputs = [
        _core.SequenceOutput(sequence.sequence_id, token_id)
        for sequence, token_id in zip(planned.sequences, token_ids, strict=True)
    ]
    for index in np.flatnonzero(rare):
        outputs[index] = _rare_output(planned, int(index), host, scores, bool(is_corrupt[index]))
    return outputs


def _fill_token_ids(
    planned: PlannedStep,
    table: SequenceTable,
    host: HostStep,
    places: tuple[np.ndarray, np.ndarray],
) -> None:
    starts, lengths = places
    is_last = (lengths == 1) & planned.samples
    host.token_ids[starts[is_last]] = table.last_token_ids[planned.slots[is_last]]
    for index in np.flatnonzero(~is_last):
        start, length, first = int(starts[index]), int(lengths[index]), int(planned.first[index])
        known = planned.sequences[index].token_ids[first : first + length]
        host.token_ids[start : start + len(known)] = known
        # The last one may be on the device alone.
        host.token_ids[start + len(known) : start + length] = UNKNOWN_TOKEN_ID


def _fill_prefill(
    planned: PlannedStep, host: HostStep, places: tuple[np.ndarray, np.ndarray]
) -> bool:
    """Writes the work of the prefill kernel; for the decode kernel its rows are empty sequences."""
    starts, lengths = places
    host.num_prefill_items[0] = 0
    if (lengths == 1).all():
        return False
    chosen = np.flatnonzero(is_for_prefill(planned.first, lengths, host.prefill_ctas))
    chunks = []
    for index in chosen:
        row, length = int(starts[index]), int(lengths[index])
        first, slot = int(planned.first[index]), int(planned.slots[index])
        chunks.append(PrefillChunk(row, length, first, slot))
        host.num_context_tokens[row : row + length] = 0
    items = prefill_items(chunks).numpy()
    host.num_prefill_items[0] = len(items)
    host.prefill_items[: len(items)] = items
    return bool(len(chosen))


def _fill_edits(planned: PlannedStep, table: SequenceTable, host: HostStep) -> torch.Tensor | None:
    """Writes the offsets of the rows' edits; returns the edits of all rows, if there is any."""
    chunks = np.flatnonzero(planned.samples)
    slots = planned.slots[chunks]
    host.edit_offsets[: len(chunks) + 1] = 0
    is_edited = table.has_edits[slots] | (planned.end[chunks] < table.masked_until[slots])
    if not is_edited.any():
        return None
    parts = []
    for row in np.flatnonzero(is_edited):
        parts.append(table.edits(planned, int(chunks[row])))
        host.edit_offsets[row + 1] = len(parts[-1])
    host.edit_offsets[: len(chunks) + 1] = np.cumsum(host.edit_offsets[: len(chunks) + 1])
    edits = np.concatenate(parts)
    return torch.from_numpy(edits) if len(edits) else None


def _fill_prompt_rows(
    planned: PlannedStep, host: HostStep, starts: np.ndarray
) -> tuple[list[int], int]:
    """Adds the rows that predict prompt tokens; returns those tokens, and the most rivals asked."""
    token_ids: list[int] = []
    num_top = 0
    place = int(planned.samples.sum())
    for index in np.flatnonzero(planned.num_prompt_rows):
        count, first = int(planned.num_prompt_rows[index]), int(planned.first[index])
        sequence = planned.sequences[index]
        token_ids += sequence.token_ids[first + 1 : first + 1 + count]
        num_top = max(num_top, sequence.sampling.prompt_logprobs or 0)
        host.logit_rows[place : place + count] = starts[index] + np.arange(count)
        place += count
    return token_ids, num_top


def _rare_output(
    planned: PlannedStep,
    index: int,
    host: HostStep,
    scores: PromptScores | None,
    is_corrupt: bool,
) -> _core.SequenceOutput:
    sequence = planned.sequences[index]
    if is_corrupt:
        return _core.SequenceOutput(sequence.sequence_id, is_corrupt=True)
    token_id = logprob = top = None
    num_top = sequence.sampling.top_logprobs
    if planned.samples[index]:
        row = int(planned.samples[:index].sum())
        token_id = int(host.token_ids_out[row])
        if num_top is not None:
            results = host.results
            logprob = float(results.logprobs[row])
            ids, logprobs = results.top_ids[row, :num_top], results.top_logprobs[row, :num_top]
            top = list(zip(ids.tolist(), logprobs.tolist(), strict=True))
    return _core.SequenceOutput(
        sequence.sequence_id,
        token_id=token_id,
        logprob=logprob,
        top=top,
        prompt_logprobs=None if scores is None else _prompt_logprobs(planned, index, scores),
    )


def _prompt_logprobs(
    planned: PlannedStep, index: int, scores: PromptScores
) -> list[tuple[int, float, list[tuple[int, float]]]]:
    count, first = int(planned.num_prompt_rows[index]), int(planned.first[index])
    start = int(planned.num_prompt_rows[:index].sum())
    sequence = planned.sequences[index]
    num_top = sequence.sampling.prompt_logprobs or 0
    return [
        (
            token_id,
            float(scores.logprobs[row]),
            list(
                zip(
                    scores.top_ids[row, :num_top].tolist(),
                    scores.top_logprobs[row, :num_top].tolist(),
                    strict=True,
                )
            ),
        )
        for row, token_id in enumerate(sequence.token_ids[first + 1 : first + 1 + count], start)
    ]
