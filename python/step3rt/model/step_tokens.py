"""Owns the inputs of a step of the one-GPU decoder; computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from step3rt.model.prompt_steps import PromptStep

UNUSED_SLOT = -1
"""Of a token whose K and V are kept nowhere."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """T tokens of one step, on the host or the device.

    `token_ids` i32[T]. `positions` i32[T]. `slots` i32[T]: KV block * 64 + offset, or -1 for a
    token that is not kept. `num_context_tokens` i32[T]: what each attends to, itself included.
    `block_table` i32[T, B]: of each token's sequence; B at most that of the decoder.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_context_tokens: torch.Tensor
    block_table: torch.Tensor

    def rows(self, start: int, end: int) -> "StepTokens":
        """Returns some of the tokens, views of the same memory."""
        return StepTokens(*(getattr(self, field.name)[start:end] for field in fields(self)))

    @classmethod
    def allocate(cls, max_tokens: int, max_blocks: int, device: torch.device) -> "StepTokens":
        """Allocates for `max_tokens` tokens of sequences of up to `max_blocks` KV blocks."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            token_ids=zeros(max_tokens),
            positions=zeros(max_tokens),
            slots=zeros(max_tokens),
            num_context_tokens=zeros(max_tokens),
            block_table=zeros(max_tokens, max_blocks),
        )

    @classmethod
    def of_prompts(cls, step: PromptStep) -> "StepTokens":
        """The rows of a step of prompts, on the host."""
        lengths = torch.tensor([chunk.num_tokens for chunk in step.chunks])
        return cls(
            token_ids=step.token_ids,
            positions=step.positions,
            slots=step.slots,
            num_context_tokens=step.positions + 1,
            block_table=step.block_tables.repeat_interleave(lengths, dim=0),
        )

    @classmethod
    def concatenate(cls, steps: Sequence["StepTokens"]) -> "StepTokens":
        """Joins tokens whose block tables are equally wide."""
        return cls(
            *(torch.cat([getattr(step, field.name) for step in steps]) for field in fields(cls))
        )
