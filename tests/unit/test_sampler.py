import math
from dataclasses import dataclass, field

import pytest
import torch

from step3rt.instance import sampler
from step3rt.instance.sampler import ChunkResult, sample_chunks
from step3rt.instance.sequences import PlannedChunk, Sequence
from step3rt.model.batch import Chunk
from step3rt.model.weights import AttentionWeights
from step3rt.ops.logit_adjust import LogitAdjuster

VOCAB = 6


@dataclass
class Sampling:
    """The fields of `_core.Sampling`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)


def greedy_adjuster(tokens: list[int], num_prompt: int) -> LogitAdjuster:
    """Frequency penalty 1.5 and a bias of -100 on token 5."""
    return LogitAdjuster(
        presence=0.0,
        frequency=1.5,
        repetition=1.0,
        bias=([5], [-100.0]),
        token_ids=tokens,
        num_prompt_tokens=num_prompt,
    )


def planned(
    tokens: list[int],
    *,
    num_prompt: int,
    num_new: int,
    num_prompt_rows: int = 0,
    samples: bool = True,
    sampling: Sampling | None = None,
) -> PlannedChunk:
    sequence = Sequence(tokens, num_prompt, sampling or Sampling())  # type: ignore[arg-type]
    first = len(tokens) - num_new
    return PlannedChunk(
        9, sequence, Chunk(tokens[first:], first, [0], []), num_prompt_rows, samples
    )


def run(logits: list[list[float]], chunks: list[PlannedChunk]) -> list[ChunkResult]:
    """An identity head makes the final hidden state the logits."""
    identity = torch.eye(VOCAB, dtype=torch.float64)
    weights = AttentionWeights(identity, (), identity, identity)
    return sample_chunks(torch.tensor(logits), chunks, weights)


ROW = [0.0, 5.0, 1.0, 4.0, 2.0, 3.0]


def test_greedy_chunk_reports_its_token_and_nothing_else() -> None:
    (result,) = run([ROW], [planned([3, 4], num_prompt=2, num_new=2)])
    assert result == ChunkResult(9, token_id=1)


def test_chunk_that_does_not_sample_reports_no_token() -> None:
    chunks = [
        planned([3, 4], num_prompt=4, num_new=2, samples=False),
        planned([3, 4], num_prompt=2, num_new=1),
    ]
    assert [result.token_id for result in run([ROW], chunks)] == [None, 1]


def test_logprobs_come_for_the_token_and_the_most_likely() -> None:
    chunk = planned([3, 4], num_prompt=2, num_new=1, sampling=Sampling(top_logprobs=2))
    (result,) = run([ROW], [chunk])
    total = math.log(sum(math.exp(value) for value in ROW))
    assert result.logprob == pytest.approx(5 - total, abs=1e-5)
    assert result.top is not None
    assert [token for token, _ in result.top] == [1, 3]


def test_prompt_tokens_are_scored_by_the_rows_before_them() -> None:
    chunk = planned(
        [0, 3, 5],
        num_prompt=3,
        num_new=3,
        num_prompt_rows=2,
        sampling=Sampling(prompt_logprobs=1),
    )
    (result,) = run([ROW, ROW[::-1], ROW], [chunk])
    total = math.log(sum(math.exp(value) for value in ROW))
    tokens = [token for token, _, _ in result.prompt_logprobs]
    assert tokens == [3, 5]
    assert [value for _, value, _ in result.prompt_logprobs] == pytest.approx(
        [4 - total, 0 - total], abs=1e-5
    )
    assert [top[0][0] for _, _, top in result.prompt_logprobs] == [1, 4]
    assert (result.token_id, result.logprob) == (1, None)


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    sampling = Sampling(min_tokens=2, stop_token_ids=[1])
    tokens = [3, 4]
    found = []
    for _ in range(4):
        (result,) = run([ROW], [planned(tokens, num_prompt=2, num_new=1, sampling=sampling)])
        assert result.token_id is not None
        found.append(result.token_id)
        tokens.append(result.token_id)
    assert found == [3, 3, 1, 1]


def test_penalties_follow_the_tokens_that_a_sequence_samples_and_logprobs_do_not() -> None:
    chunk = planned([1, 1], num_prompt=2, num_new=1, sampling=Sampling(top_logprobs=1))
    chunk.sequence.adjuster = greedy_adjuster([1, 1], 2)
    total = math.log(sum(math.exp(value) for value in ROW))
    found = []
    for _ in range(6):
        (result,) = run([ROW], [chunk])
        assert result.token_id is not None
        assert result.logprob == pytest.approx(ROW[result.token_id] - total, abs=1e-5)
        assert result.top is not None
        assert result.top[0][0] == 1
        found.append(result.token_id)
        chunk.sequence.append(result.token_id)
    # 5 | 3.5, 4 | 3.5, 2.5 | 2, 2.5 | 2, 1, 2 (4th) | 0.5, 1, 2 (4th) ...; 5 is banned.
    assert found == [1, 3, 1, 3, 1, 4]
    assert chunk.sequence.token_ids == [1, 1, *found]


def test_logits_that_are_not_finite_corrupt_their_sequence_alone() -> None:
    chunks = [planned([3], num_prompt=1, num_new=1) for _ in range(3)]
    bad = [math.nan, *ROW[1:]]
    results = run([ROW, bad, ROW], chunks)
    assert [result.is_corrupt for result in results] == [False, True, False]
    assert [result.token_id for result in results] == [1, None, 1]


def test_noise_moves_with_the_position() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    tokens, found = [3], []
    for _ in range(30):
        (result,) = run(
            [[0.0] * VOCAB], [planned(tokens, num_prompt=1, num_new=1, sampling=sampling)]
        )
        assert result.token_id is not None
        found.append(result.token_id)
        tokens.append(result.token_id)
    assert len(set(found)) > 3


def test_many_rows_are_scored_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, VOCAB, generator=generator).tolist()
    chunks = [
        planned(
            [0, 3, 5],
            num_prompt=3,
            num_new=3,
            num_prompt_rows=2,
            sampling=Sampling(prompt_logprobs=1, top_logprobs=1, temperature=0.8, seed=index),
        )
        for index in range(6)
    ]
    whole = run(logits[:18], chunks)
    monkeypatch.setattr(sampler, "MAX_LOGIT_ROWS", 4)
    assert run(logits[:18], chunks) == whole
