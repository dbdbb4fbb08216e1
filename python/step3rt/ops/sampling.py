"""Chooses tokens from logits: greedy, temperature, top-k, top-p, min-p, with reproducible noise."""

from dataclasses import dataclass

import numpy as np
import torch

from step3rt.ops.logit_adjust import LogitAdjuster


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """How to choose one row's token.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. position is the position that
    the chosen token will have in its sequence. masked_token_ids cannot be chosen. adjuster has the
    sequence's logit bias and penalties, if it has any.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    masked_token_ids: tuple[int, ...] = ()
    adjuster: LogitAdjuster | None = None


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """Chooses one token per row, each from its own row and parameters alone.

    Bias and penalties come first, greedy or not (see `LogitAdjuster`), and masks, which nothing
    undoes; then temperature; then top-k, then top-p over what top-k left, then min-p relative to
    the most likely token. Among the tokens that remain the largest `logit / temperature +
    gumbel_noise` wins, which draws from their softmax. Of equals the lower id wins, so that a row
    of which everything is masked gives token 0; the coordinator refuses to ask for one.

    A row without bias, penalties and masks is read where it is, whatever its neighbours have.

    Args:
        logits: f32[R, V], finite.
        rows: R entries.

    Returns:
        R token ids.
    """
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for index, row in enumerate(rows):
        is_changed = row.adjuster is not None or bool(row.masked_token_ids)
        if not is_changed and row.temperature <= 0:
            continue
        row_logits = _change(logits[index], row) if is_changed else logits[index]
        token_ids[index] = (
            _sample_row(row_logits, row) if row.temperature > 0 else int(row_logits.argmax())
        )
    return token_ids


def _change(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    changed = logits.clone() if row.adjuster is None else row.adjuster.apply(logits)
    ids = [token for token in row.masked_token_ids if token < logits.shape[0]]
    changed[ids] = -torch.inf
    return changed


def _sample_row(logits: torch.Tensor, row: SamplingRow) -> int:
    # float64: a tiny temperature must not overflow, and the tails of top-p must add up.
    scaled = logits.double()
    scaled = (scaled - scaled.max()) / row.temperature
    kept = _keep(scaled, row)
    noise = torch.from_numpy(gumbel_noise(row.seed, row.position, logits.shape[0]))
    return int(torch.where(kept, scaled + noise, -torch.inf).argmax())


def _keep(scaled: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """Returns bool[V]: which tokens the filters leave; the most likely one always."""
    kept = torch.isfinite(scaled)
    if 0 < row.top_k < scaled.shape[0] or row.top_p < 1.0:
        sorted_logits, order = scaled.sort(descending=True, stable=True)
        num_kept = min(row.top_k or scaled.shape[0], scaled.shape[0])
        if row.top_p < 1.0:
            probabilities = torch.softmax(sorted_logits[:num_kept], dim=0)
            # A token stays while those before it have not reached top_p.
            before = probabilities.cumsum(dim=0) - probabilities
            num_kept = max(1, int((before < row.top_p).sum()))
        kept[order[num_kept:]] = False
    if row.min_p > 0:
        # scaled is 0 for the most likely token, so that exp(scaled) is the ratio to it.
        kept &= scaled.exp() >= min(row.min_p, 1.0)
    return kept


def gumbel_noise(
    seed: int, position: int, vocab_size: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns float64[V], standard Gumbel noise that depends on (seed, position, token) alone.

    Word v of the counter-based generator Philox4x64-10 with key (seed, 0) and counter
    (0, position, 0, 0), incremented before each four words as numpy does, gives
    u = ((word >> 12) + 0.5) * 2^-52, which is never 0 or 1; the noise is -ln(-ln u).
    """
    generator = np.random.Philox(
        key=np.array([seed, 0], dtype=np.uint64),
        counter=np.array([0, position, 0, 0], dtype=np.uint64),
    )
    words = generator.random_raw(vocab_size)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    noise: np.ndarray[tuple[int], np.dtype[np.float64]] = -np.log(-np.log(uniform))
    return noise


def token_logprobs(
    logits: torch.Tensor, token_ids: list[int], num_top: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Returns each row's log-probability of its token, and of the most likely tokens.

    Computed from the raw logits: before bias, penalties, temperature, filters and masks.

    Args:
        logits: f32[R, V].
        token_ids: R ids, each below V.
        num_top: how many of the most likely tokens to return, at most V are.

    Returns:
        Per row (logprob, [(token id, logprob), …] most likely first, of equals the lower id).
    """
    found = score_tokens(logits.float(), torch.tensor(token_ids), min(num_top, logits.shape[1]))
    chosen, top_ids, top_logprobs = (values.tolist() for values in found)
    return [
        (logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen, top_ids, top_logprobs, strict=True)
    ]


def score_tokens(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores a token of each row, and the row's most likely tokens; waits for no device.

    Args:
        logits: f32[R, V].
        token_ids: i64[R], on the same device.
        num_top: N, at most V.

    Returns:
        Log-probabilities f32[R] of the tokens; ids i64[R, N] and log-probabilities f32[R, N] of the
        most likely ones, most likely first, of equals the lower id.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    if num_top == 0:
        return chosen, token_ids.new_zeros(len(token_ids), 0), logprobs[:, :0]
    top_logprobs, top_ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return chosen, top_ids[:, :num_top], top_logprobs[:, :num_top]
