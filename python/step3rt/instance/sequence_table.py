"""Owns what one lane of the device pipeline knows of its sequences, as arrays with a row for each.

It never decides what to compute; the coordinator's plans do, as deltas. A step of a thousand
sequences costs the host a few operations on arrays: nothing here computes a token's row in a loop
unless its request asks for something rare.

A sequence has two states: *accepted*, what steps that are over gave, and *launched*, what it will
be when those in flight have succeeded. Plans are checked against the latter. Its last token may be
known to the device alone; the next step then says so and not which token it is.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from step3rt import _core
from step3rt.errors import Internal
from step3rt.instance.sequences import PLACEHOLDER_TOKEN_ID, StepNotDueError
from step3rt.model.device_inputs import UNKNOWN_TOKEN_ID
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS
from step3rt.ops.sample import SAMPLING_ROW, DeviceSamplingRow, pack_row

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_UNKNOWN = -1
"""Computed tokens of a sequence whose first chunk has not come."""


@dataclass(slots=True)
class TableSequence:
    """What is rarely looked at of a sequence; the rest is in the table's arrays.

    `token_ids`: those that the host knows. `generated` counts the generated ones for penalties,
    None without any. `bias`: of the logits, by token.
    """

    sequence_id: int
    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: _core.Sampling
    generated: dict[int, int] | None = None
    bias: dict[int, float] = field(default_factory=dict)

    def append(self, token_id: int) -> None:
        """Takes the token that was sampled last."""
        self.token_ids.append(token_id)
        if self.generated is not None:
            self.generated[token_id] = self.generated.get(token_id, 0) + 1

    def device_row(self, *, is_masked: bool) -> DeviceSamplingRow:
        """How to choose its next token, but for the position."""
        sampling, adjustments = self.sampling, self.sampling.adjustments
        return DeviceSamplingRow(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            presence=adjustments.presence_penalty if adjustments else 0.0,
            frequency=adjustments.frequency_penalty if adjustments else 0.0,
            repetition=adjustments.repetition_penalty if adjustments else 1.0,
            bias=self.bias,
            generated=self.generated or {},
            prompt_token_ids=self.token_ids[: self.num_prompt_tokens],
            masked_token_ids=sampling.stop_token_ids if is_masked else (),
            num_top=sampling.top_logprobs,
        )


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The chunks of a plan with their sequences: all arrays have one entry per chunk.

    `slots` of the table, and `stays`, which tell a slot's sequence from its next one. A chunk
    computes tokens [first, end) and samples if `samples`. `num_prompt_rows`: how many of its rows,
    from the first on, predict a prompt token whose log-probability is wanted. `must_wait`: a row
    cannot be made before the host knows the tokens of the steps in flight.
    """

    number: int
    sequences: list[TableSequence]
    slots: Ints
    stays: Ints
    first: Ints
    end: Ints
    samples: Bools
    num_prompt_rows: Ints
    must_wait: bool

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return int((self.end - self.first).sum())


class SequenceTable:
    """The sequences of one lane.

    What a plan says of `left`, `joined` and new blocks takes effect when its step's turn comes, for
    good, even if the step then fails; what is said again changes nothing the second time. Chunks
    count as launched with `launched`, and as accepted with `accept`; `fail` takes them back.
    """

    def __init__(
        self, *, num_slots: int, num_blocks: int, max_model_len: int, vocab_size: int
    ) -> None:
        """Makes a table of `num_slots` sequences of up to `max_model_len` tokens."""
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._max_blocks = -(-max_model_len // BLOCK_SIZE_TOKENS)
        self._by_id: dict[int, TableSequence] = {}
        self._free = list(range(num_slots - 1, -1, -1))

        def zeros(dtype: Any = np.int64) -> Any:
            return np.zeros(num_slots, dtype=dtype)

        self.stays: Ints = zeros()
        self.accepted_computed: Ints = zeros()
        self.accepted_known: Ints = zeros()
        self.computed: Ints = zeros()
        self.known: Ints = zeros()
        self.last_token_ids: Ints = zeros()
        self.is_corrupt: Bools = zeros(np.bool_)
        self.sampling_rows = zeros(SAMPLING_ROW)
        self.has_edits: Bools = zeros(np.bool_)
        self.masked_until: Ints = zeros()
        self._counts_tokens: Bools = zeros(np.bool_)
        self._wants_prompt: Bools = zeros(np.bool_)
        self._num_prompt: Ints = zeros()
        self.num_held_blocks: Ints = zeros()
        self.blocks = np.zeros((num_slots, self._max_blocks), dtype=np.int32)
        self._changed_places: list[Ints] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def apply(self, plan: _core.StepPlan) -> PlannedStep:
        """Forgets, learns, grows block tables, and returns what is to be computed.

        Raises:
            StepNotDueError: an earlier step failed, and this one was planned on its success.
            Internal: the plan does not fit what this instance knows.
        """
        for sequence_id in plan.left:
            self._leave(sequence_id)
        for join in plan.joined:
            self._join(join)
        chunks = plan.chunks
        sequences = [self._find(chunk.sequence_id) for chunk in chunks]
        for chunk, sequence in zip(chunks, sequences, strict=True):
            new_block_ids = chunk.new_block_ids
            if new_block_ids:
                self._grow(sequence, new_block_ids)
        columns = np.array(
            [
                (sequence.slot, chunk.num_computed_tokens, chunk.num_new_tokens, chunk.samples)
                for chunk, sequence in zip(chunks, sequences, strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 4)
        slots, first, num_new = (np.ascontiguousarray(columns[:, index]) for index in range(3))
        samples = columns[:, 3] != 0
        self._check(plan, sequences, (slots, first, first + num_new, samples))
        end = first + num_new
        num_prompt_rows = np.where(
            self._wants_prompt[slots],
            np.maximum(0, np.minimum(end, self._num_prompt[slots] - 1) - first),
            0,
        )
        is_pending = self.last_token_ids[slots] == UNKNOWN_TOKEN_ID
        return PlannedStep(
            number=plan.step,
            sequences=sequences,
            slots=slots,
            stays=self.stays[slots],
            first=first,
            end=end,
            samples=samples,
            num_prompt_rows=num_prompt_rows,
            must_wait=bool((samples & is_pending & self._counts_tokens[slots]).any()),
        )

    def launched(self, planned: PlannedStep) -> None:
        """Takes note that a step is on its way."""
        slots = planned.slots
        self.computed[slots] = planned.end
        sampled = slots[planned.samples]
        self.known[sampled] += 1
        self.last_token_ids[sampled] = UNKNOWN_TOKEN_ID

    def accept(self, planned: PlannedStep, token_ids: Ints, is_corrupt: Bools) -> Bools:
        """Takes what the oldest step in flight gave: its sequences are further.

        A corrupt sequence stays one: its later chunks, if any were planned, mean nothing.

        Args:
            planned: The step.
            token_ids: Of the chunks that sample, in order.
            is_corrupt: Of every chunk, what the step found.

        Returns:
            Which chunks are of a corrupt sequence.
        """
        slots, samples = planned.slots, planned.samples
        stays = self.stays[slots] == planned.stays
        is_corrupt = is_corrupt | (self.is_corrupt[slots] & stays)
        token_ids = np.where(is_corrupt[samples], PLACEHOLDER_TOKEN_ID, token_ids)
        sampled = [
            sequence
            for sequence, does in zip(planned.sequences, samples.tolist(), strict=True)
            if does
        ]
        for sequence, token_id in zip(sampled, token_ids.tolist(), strict=True):
            sequence.append(token_id)
        # Those that have left meanwhile have no row any more.
        here = slots[stays]
        self.is_corrupt[here] = is_corrupt[stays]
        self.accepted_computed[here] = planned.end[stays]
        has_row = stays[samples]
        here, token_ids = slots[samples][has_row], token_ids[has_row]
        self.accepted_known[here] += 1
        is_last = self.accepted_known[here] == self.known[here]
        self.last_token_ids[here[is_last]] = token_ids[is_last]
        return is_corrupt

    def fail(self, planned: PlannedStep) -> None:
        """Takes a launched step back: its sequences are where the accepted ones left them."""
        for sequence, slot, stay in zip(
            planned.sequences, planned.slots.tolist(), planned.stays.tolist(), strict=True
        ):
            if self.stays[slot] == stay:
                self.computed[slot] = self.accepted_computed[slot]
                self.known[slot] = self.accepted_known[slot]
                self.last_token_ids[slot] = sequence.token_ids[-1]

    def take_table_changes(self) -> npt.NDArray[np.int32] | None:
        """Returns the entries of block tables that are new since the last call, i32[2, N].

        The first row has their places (slot * max_blocks + index), each once, the second the KV
        blocks.
        """
        if not self._changed_places:
            return None
        # A plan that was not launched may have filled what a later sequence of the slot has now: of
        # two blocks for one place a device keeps either.
        places = np.unique(np.concatenate(self._changed_places))
        self._changed_places.clear()
        return np.stack([places, self.blocks.reshape(-1)[places]]).astype(np.int32)

    def edits(self, planned: PlannedStep, index: int) -> npt.NDArray[np.uint8]:
        """Returns what penalties, bias and mask change of chunk `index`'s logits, u8[E, 16]."""
        is_masked = bool(planned.end[index] < self.masked_until[planned.slots[index]])
        row = planned.sequences[index].device_row(is_masked=is_masked)
        return pack_row(row, self._vocab_size)[1]

    def _find(self, sequence_id: int) -> TableSequence:
        sequence = self._by_id.get(sequence_id)
        if sequence is None:
            raise Internal(
                f"The plan computes sequence {sequence_id}, which has not joined this lane. "
                "The coordinator's plan is wrong."
            )
        return sequence

    def _leave(self, sequence_id: int) -> None:
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is not None:
            self.stays[sequence.slot] += 1
            self.num_held_blocks[sequence.slot] = 0
            self._free.append(sequence.slot)

    def _join(self, join: _core.Join) -> None:
        token_ids, sampling = join.token_ids, join.sampling
        adjustments = sampling.adjustments
        bias = (
            dict(zip(adjustments.bias_token_ids, adjustments.biases, strict=True))
            if adjustments
            else {}
        )
        for what, ids in (("tokens", token_ids), ("a logit bias for tokens", list(bias))):
            if (what == "tokens" and not ids) or (ids and max(ids) >= self._vocab_size):
                raise Internal(
                    f"Sequence {join.sequence_id} joins with {what} {ids[:8]}. There must be one "
                    f"token or more, each below {self._vocab_size}. The coordinator's plan is "
                    "wrong."
                )
        known = self._by_id.get(join.sequence_id)
        if known is None and not self._free:
            raise Internal(
                f"Sequence {join.sequence_id} joins a lane that holds {len(self._by_id)}. It has "
                "room for no more than a micro-batch has tokens. The coordinator's plan is wrong."
            )
        # A join that is sent again finds the blocks that came with the first one.
        slot = self._free.pop() if known is None else known.slot
        sequence = TableSequence(
            join.sequence_id, slot, token_ids, join.num_prompt_tokens, sampling, bias=bias
        )
        row = sequence.device_row(is_masked=False)
        counts = (row.presence, row.frequency, row.repetition) != (0, 0, 1)
        if counts:
            sequence.generated = {}
            for token_id in token_ids[join.num_prompt_tokens :]:
                sequence.generated[token_id] = sequence.generated.get(token_id, 0) + 1
        self._by_id[join.sequence_id] = sequence
        self.stays[slot] += 1
        self.accepted_computed[slot] = self.computed[slot] = _UNKNOWN
        self.accepted_known[slot] = self.known[slot] = len(token_ids)
        self.last_token_ids[slot] = token_ids[-1]
        self.is_corrupt[slot] = False
        self.sampling_rows[slot] = pack_row(row, self._vocab_size)[0]
        self.has_edits[slot] = counts or bool(bias)
        is_ever_masked = bool(sampling.stop_token_ids) and sampling.min_tokens > 0
        self.masked_until[slot] = is_ever_masked * (join.num_prompt_tokens + sampling.min_tokens)
        self._counts_tokens[slot] = counts
        self._wants_prompt[slot] = sampling.prompt_logprobs is not None
        self._num_prompt[slot] = join.num_prompt_tokens

    def _grow(self, sequence: TableSequence, new_block_ids: list[int]) -> None:
        slot = sequence.slot
        num_held = int(self.num_held_blocks[slot])
        held = set(self.blocks[slot, :num_held].tolist())
        added = [block for block in new_block_ids if block not in held]
        end = num_held + len(added)
        if end > self._max_blocks or max(new_block_ids) >= self._num_blocks:
            raise Internal(
                f"Sequence {sequence.sequence_id} gets new blocks {new_block_ids[:8]} to the "
                f"{num_held} that it has. A sequence has up to {self._max_blocks}, and the pool "
                f"{self._num_blocks}. The coordinator's plan is wrong."
            )
        if added:
            self.blocks[slot, num_held:end] = added
            self.num_held_blocks[slot] = end
            self._changed_places.append(slot * self._max_blocks + np.arange(num_held, end))

    def _check(
        self,
        plan: _core.StepPlan,
        sequences: list[TableSequence],
        columns: tuple[Ints, Ints, Ints, Bools],
    ) -> None:
        slots, first, end, samples = columns
        is_new = self.computed[slots] == _UNKNOWN
        if is_new.any():
            new = slots[is_new]
            self.computed[new] = self.accepted_computed[new] = first[is_new]
        is_off = self.computed[slots] != first
        if is_off.any():
            index = int(is_off.argmax())
            raise StepNotDueError(
                f"a chunk of sequence {sequences[index].sequence_id} starts at token "
                f"{first[index]}, and {self.computed[slots[index]]} are computed"
            )
        capacity = self.num_held_blocks[slots] * BLOCK_SIZE_TOKENS
        known = self.known[slots]
        is_bad = (end <= first) | (end > np.minimum(known, capacity)) | (samples != (end == known))
        if is_bad.any():
            index = int(is_bad.argmax())
            raise Internal(
                f"The plan of step {plan.step} computes tokens {first[index]}..{end[index]} of "
                f"sequence {sequences[index].sequence_id} (samples: {samples[index]}). Here it has "
                f"{known[index]} tokens and {self.num_held_blocks[slots[index]]} blocks of "
                f"{BLOCK_SIZE_TOKENS}. The coordinator's plan is wrong."
            )
