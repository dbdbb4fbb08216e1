"""Owns what one lane of an attention instance knows of its sequences: tokens and block tables.

It never decides what to compute; the coordinator's plans do, as deltas.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from step3rt import _core
from step3rt.errors import Internal
from step3rt.model.batch import Chunk
from step3rt.ops.logit_adjust import LogitAdjuster

# Stands for the token that a corrupt sequence could not sample. A step that was planned ahead may
# compute it; nobody is told what that gives.
PLACEHOLDER_TOKEN_ID = 0


class StepNotDueError(Exception):
    """A chunk starts where its sequence is not; all else that its plan says has taken effect."""


@dataclass(slots=True)
class Sequence:
    """All known tokens of a sequence, how to sample it, and its KV blocks in order.

    adjuster has its logit bias and penalties, and counts its tokens for them; most have none.
    num_computed_tokens: those whose K and V are in the cache. The first chunk says how many are
    there before it; until then None.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    sampling: _core.Sampling
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int | None = None
    is_corrupt: bool = False
    adjuster: LogitAdjuster | None = None

    def append(self, token_id: int) -> None:
        """Takes the token that was sampled last."""
        self.token_ids.append(token_id)
        if self.adjuster is not None:
            self.adjuster.count(token_id)


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A chunk of a plan with its sequence.

    num_prompt_rows: how many of its rows, from the first on, predict a prompt token whose
    log-probability is wanted. samples: whether its last row predicts a token to sample.
    """

    sequence_id: int
    sequence: Sequence
    chunk: Chunk
    num_prompt_rows: int
    samples: bool

    def accept(self, token_id: int | None, is_corrupt: bool) -> None:
        """Takes what its step gave: the sequence is further, and knows what it sampled.

        A corrupt sequence stays one: its later chunks, if any were planned, mean nothing.
        """
        sequence = self.sequence
        sequence.num_computed_tokens = self.chunk.first_position + len(self.chunk.token_ids)
        sequence.is_corrupt |= is_corrupt
        if self.samples:
            sequence.append(PLACEHOLDER_TOKEN_ID if token_id is None else token_id)


class LaneSequences:
    """The sequences of one lane.

    What a plan says of `left`, `joined` and new blocks takes effect when its step's turn comes, for
    good, even if the step then fails; what is said again changes nothing the second time. Chunks
    take effect when their step has succeeded (`PlannedChunk.accept`), and only then.
    """

    def __init__(self, *, num_blocks: int, block_size_tokens: int, vocab_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size_tokens = block_size_tokens
        self._vocab_size = vocab_size
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: _core.StepPlan) -> list[PlannedChunk]:
        """Forgets, learns, grows block tables, and returns what is to be computed.

        Raises:
            StepNotDueError: an earlier step failed, and this one was planned on its success.
            Internal: the plan does not fit what this instance knows.
        """
        for sequence_id in plan.left:
            self._sequences.pop(sequence_id, None)
        for join in plan.joined:
            self._join(join)
        chunks = [(chunk, self._grow(chunk)) for chunk in plan.chunks]
        for chunk, sequence in chunks:
            if chunk.num_computed_tokens != sequence.num_computed_tokens:
                raise StepNotDueError(
                    f"a chunk of sequence {chunk.sequence_id} starts at token "
                    f"{chunk.num_computed_tokens}, and {sequence.num_computed_tokens} are computed"
                )
        return [self._plan_chunk(chunk, sequence) for chunk, sequence in chunks]

    def _join(self, join: _core.Join) -> None:
        token_ids = join.token_ids
        if not token_ids or max(token_ids) >= self._vocab_size:
            raise Internal(
                f"Sequence {join.sequence_id} joins with {len(token_ids)} tokens. It must have one "
                f"or more, each below {self._vocab_size}. The coordinator's plan is wrong."
            )
        adjustments = join.sampling.adjustments
        biased = [] if adjustments is None else adjustments.bias_token_ids
        if biased and max(biased) >= self._vocab_size:
            raise Internal(
                f"Sequence {join.sequence_id} joins with a logit bias for token {max(biased)}. It "
                f"must be below {self._vocab_size}. The coordinator's plan is wrong."
            )
        known = self._sequences.get(join.sequence_id)
        self._sequences[join.sequence_id] = Sequence(
            token_ids=token_ids,
            num_prompt_tokens=join.num_prompt_tokens,
            sampling=join.sampling,
            # A join that is sent again finds the blocks that came with the first one.
            block_ids=known.block_ids if known is not None else [],
            adjuster=None if adjustments is None else _adjuster(join, adjustments),
        )

    def _grow(self, chunk: _core.Chunk) -> Sequence:
        """Extends the block table of the chunk's sequence, and returns that."""
        sequence = self._sequences.get(chunk.sequence_id)
        if sequence is None:
            raise Internal(
                f"The plan computes sequence {chunk.sequence_id}, which has not joined this lane. "
                "The coordinator's plan is wrong."
            )
        if chunk.new_block_ids:
            held = set(sequence.block_ids)
            sequence.block_ids.extend(block for block in chunk.new_block_ids if block not in held)
        if sequence.num_computed_tokens is None:
            sequence.num_computed_tokens = chunk.num_computed_tokens
        return sequence

    def _plan_chunk(self, chunk: _core.Chunk, sequence: Sequence) -> PlannedChunk:
        first, num_known = chunk.num_computed_tokens, len(sequence.token_ids)
        end = first + chunk.num_new_tokens
        capacity = len(sequence.block_ids) * self._block_size_tokens
        if (
            chunk.num_new_tokens < 1
            or end > min(num_known, capacity)
            or chunk.samples != (end == num_known)
            or any(block >= self._num_blocks for block in chunk.new_block_ids)
        ):
            raise Internal(
                f"The plan computes tokens {first}..{end} of sequence {chunk.sequence_id} "
                f"(samples: {chunk.samples}) with new blocks {list(chunk.new_block_ids)}. Here it "
                f"has {num_known} tokens, {len(sequence.block_ids)} blocks of "
                f"{self._block_size_tokens}, and the pool {self._num_blocks} blocks. "
                "The coordinator's plan is wrong."
            )
        num_prompt_rows = 0
        if sequence.sampling.prompt_logprobs is not None:
            # Row r predicts token r + 1; the prompt's last row predicts what is sampled.
            num_prompt_rows = max(0, min(end, sequence.num_prompt_tokens - 1) - first)
        return PlannedChunk(
            sequence_id=chunk.sequence_id,
            sequence=sequence,
            chunk=Chunk(
                token_ids=sequence.token_ids[first:end],
                first_position=first,
                block_ids=sequence.block_ids,
                logit_offsets=_logit_offsets(num_prompt_rows, end - first, chunk.samples),
            ),
            num_prompt_rows=num_prompt_rows,
            samples=chunk.samples,
        )


def _adjuster(join: _core.Join, adjustments: _core.LogitAdjustments) -> LogitAdjuster:
    return LogitAdjuster(
        presence=adjustments.presence_penalty,
        frequency=adjustments.frequency_penalty,
        repetition=adjustments.repetition_penalty,
        bias=(adjustments.bias_token_ids, adjustments.biases),
        token_ids=join.token_ids,
        num_prompt_tokens=join.num_prompt_tokens,
    )


def _logit_offsets(num_prompt_rows: int, length: int, samples: bool) -> Items[int]:
    offsets = list(range(num_prompt_rows))
    return [*offsets, length - 1] if samples else offsets
