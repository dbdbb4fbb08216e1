"""What a decode bench decodes, and for how long."""

import random
from dataclasses import dataclass

from step3rt.bench.decode_stages import MAX_STEPS
from step3rt.config import MAX_TRACE_STEPS
from step3rt.errors import InvalidArgument

_SLACK_STEPS = 48
"""Streams start one after the other; so many steps may pass until the last one decodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """What decodes, and for how long.

    Attributes:
        batch: sequences at a time over all lanes and attention instances, a multiple of those.
        context_tokens: mean length of a sequence over the measured steps.
        spread: lengths are drawn from `context_tokens` times 1 - spread to 1 + spread.
        steps: measured steps of each lane, after `warmup_steps`.
    """

    batch: int
    context_tokens: int
    spread: float = 0.0
    steps: int = 200
    warmup_steps: int = 100
    seed: int = 0

    @property
    def trace_steps(self) -> int:
        """Steps of a lane that devices record: what stages are means of, and those that follow."""
        return min(MAX_TRACE_STEPS, self.stage_steps + 2 * _SLACK_STEPS)

    @property
    def max_new_tokens(self) -> int:
        """Tokens that every stream generates: before, while and after it is measured."""
        return self.warmup_steps + self.steps + 2 * _SLACK_STEPS

    @property
    def grown_tokens(self) -> int:
        """Tokens that a sequence has generated when half of the measured steps are over."""
        return _SLACK_STEPS + self.warmup_steps + self.steps // 2

    @property
    def stage_steps(self) -> int:
        """Steps of each lane that stages are means of: the last ones with every sequence."""
        return min(MAX_STEPS, self.steps)

    @property
    def stage_context_tokens(self) -> float:
        """Mean length of a sequence over those steps, the last of which begins the last token."""
        after_middle = self.max_new_tokens - self.grown_tokens - self.stage_steps / 2
        return self.context_tokens + after_middle

    def prompt_lengths(self) -> list[int]:
        """Tokens of each sequence at the start: `context_tokens` are reached half way."""
        draw = random.Random(self.seed)
        shares = [1 + self.spread * draw.uniform(-1, 1) for _ in range(self.batch)]
        return [round(self.context_tokens * share) - self.grown_tokens for share in shares]


def check(load: DecodeLoad, num_lanes: int, max_context_tokens: int) -> None:
    """Checks that lanes get equal shares, and that sequences begin and end within a context.

    Raises:
        InvalidArgument: they do not.
    """
    if load.batch < 1 or load.batch % num_lanes:
        raise InvalidArgument(
            f"batch={load.batch} cannot be spread over {num_lanes} lanes. Every lane gets as many "
            f"sequences as any other. Use a multiple of {num_lanes}"
        )
    if load.steps < 1 or load.warmup_steps < 0 or not 0 <= load.spread < 1:
        raise InvalidArgument(
            f"steps={load.steps}, warmup_steps={load.warmup_steps}, spread={load.spread} cannot be "
            "measured. Use 1 step or more, a warm-up of 0 or more, and a spread from 0 to below 1"
        )
    lengths = load.prompt_lengths()
    if min(lengths) < 1:
        raise InvalidArgument(
            f"A sequence would begin with {min(lengths)} tokens, to have its share of "
            f"context={load.context_tokens} once it has generated {load.grown_tokens}. A sequence "
            "begins with one token or more. Use a longer context, fewer steps or a smaller spread"
        )
    longest = max(lengths) + load.max_new_tokens
    if longest > max_context_tokens:
        raise InvalidArgument(
            f"The longest sequence would reach {longest} tokens. The model takes "
            f"{max_context_tokens}. Use a shorter context or fewer steps"
        )
