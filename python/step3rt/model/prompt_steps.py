"""Cuts whole prompts into steps of chunks, several prompts to a step.

Owns the arithmetic of rows, positions and slots; computes nothing and allocates no KV blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from step3rt.errors import InvalidArgument
from step3rt.ops.mfa_prefill import PrefillChunk
from step3rt.ops.mfa_schedule import BLOCK_SIZE_TOKENS

MAX_ENDS = 16
"""Prompts that end in one step: of so many rows a step computes logits."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to be computed.

    Attributes:
        token_ids: All of its tokens.
        block_ids: Its KV blocks, enough for all tokens.
        num_computed: Tokens from the first on whose K and V are in the cache already.
    """

    token_ids: Sequence[int]
    block_ids: Sequence[int]
    num_computed: int = 0

    def check(self) -> None:
        """Checks that something is to be computed and that blocks hold it.

        Raises:
            InvalidArgument: it cannot be computed.
        """
        num_tokens, num_slots = len(self.token_ids), len(self.block_ids) * BLOCK_SIZE_TOKENS
        if not 0 <= self.num_computed < num_tokens or num_tokens > num_slots:
            raise InvalidArgument(
                f"A prompt of {num_tokens} tokens, {self.num_computed} of them computed, with "
                f"{len(self.block_ids)} KV blocks cannot be computed. Its last token is computed "
                f"for its logits, and a block holds {BLOCK_SIZE_TOKENS} tokens. Pass fewer "
                "computed tokens, or more blocks"
            )


@dataclass(frozen=True, slots=True)
class PromptStep:
    """T rows: chunks of C prompts, one after the other; all tensors on the host.

    Attributes:
        token_ids: i32[T].
        positions: i32[T].
        slots: i32[T], KV block * 64 + offset.
        chunks: Of T rows in all; the `sequence` of each is its place in this list.
        block_tables: i32[C, B], filled up with 0.
        end_rows: Last rows of the prompts that end here, at most `MAX_ENDS`.
        end_prompts: Which prompts those are.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    chunks: list[PrefillChunk]
    block_tables: torch.Tensor
    end_rows: list[int]
    end_prompts: list[int]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return self.token_ids.shape[0]


def prompt_steps(prompts: Sequence[Prompt], max_tokens: int) -> Iterator[PromptStep]:
    """Fills steps of up to `max_tokens` rows with the prompts in their order.

    Raises:
        InvalidArgument: a prompt cannot be computed.
    """
    for prompt in prompts:
        prompt.check()
    parts: list[tuple[int, int, int]] = []  # prompt, first token, end
    room, num_ends = max_tokens, 0
    for index, prompt in enumerate(prompts):
        first, length = prompt.num_computed, len(prompt.token_ids)
        while first < length:
            if room == 0 or num_ends == MAX_ENDS:
                yield _step(prompts, parts)
                parts, room, num_ends = [], max_tokens, 0
            end = min(length, first + room)
            parts.append((index, first, end))
            room -= end - first
            num_ends += end == length
            first = end
    if parts:
        yield _step(prompts, parts)


def _step(prompts: Sequence[Prompt], parts: list[tuple[int, int, int]]) -> PromptStep:
    chunks: list[PrefillChunk] = []
    token_ids: list[int] = []
    positions, slots = [], []
    width = max(len(prompts[index].block_ids) for index, _, _ in parts)
    tables = np.zeros((len(parts), width), dtype=np.int32)
    end_rows, end_prompts = [], []
    for place, (index, first, end) in enumerate(parts):
        prompt = prompts[index]
        chunks.append(PrefillChunk(len(token_ids), end - first, first, place))
        token_ids += prompt.token_ids[first:end]
        tables[place, : len(prompt.block_ids)] = prompt.block_ids
        places = np.arange(first, end, dtype=np.int32)
        positions.append(places)
        blocks = tables[place, places // BLOCK_SIZE_TOKENS]
        slots.append(blocks * BLOCK_SIZE_TOKENS + places % BLOCK_SIZE_TOKENS)
        if end == len(prompt.token_ids):
            end_rows.append(len(token_ids) - 1)
            end_prompts.append(index)
    return PromptStep(
        token_ids=torch.tensor(token_ids, dtype=torch.int32),
        positions=torch.from_numpy(np.concatenate(positions)),
        slots=torch.from_numpy(np.concatenate(slots)),
        chunks=chunks,
        block_tables=torch.from_numpy(tables),
        end_rows=end_rows,
        end_prompts=end_prompts,
    )
