"""What a search looks at: the cards at hand, what must hold, and every sensible deployment unit.

Owns the enumeration; never a time or a batch (`batches`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from step3rt.errors import InvalidArgument
from step3rt.plan.deployment import (
    MAX_CONTEXT_TOKENS,
    MAX_LANES,
    Deployment,
    FfnParallelism,
    Placement,
)
from step3rt.plan.hardware import Hardware

# Sizes of one side in hosts. Larger deployments are several units side by side.
_HOSTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The cards at hand: (card, how many) for each kind."""

    cards: tuple[tuple[Hardware, int], ...]

    @property
    def num_gpus(self) -> int:
        """Cards of all kinds."""
        return sum(count for _, count in self.cards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What must hold.

    Attributes:
        context_tokens: mean context of running sequences.
        tpot_ms: longest time per output token.
        percentile: which TPOT must hold it: "p50" or "p99".
        placement: only this one; None looks at both.
        lanes: only so many; None looks at 1 to 4.
        ffn_parallelism: only this one; None looks at both.
    """

    context_tokens: int
    tpot_ms: float = 50.0
    percentile: str = "p99"
    placement: Placement | None = None
    lanes: int | None = None
    ffn_parallelism: FfnParallelism | None = None

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            InvalidArgument: a field is impossible.
        """
        is_time = math.isfinite(self.tpot_ms) and self.tpot_ms > 0
        if not 1 <= self.context_tokens <= MAX_CONTEXT_TOKENS or not is_time:
            raise InvalidArgument(
                f"The target has a context of {self.context_tokens} tokens and {self.tpot_ms} ms "
                f"TPOT. Both are above 0, a context at most {MAX_CONTEXT_TOKENS} and the TPOT "
                "finite. Correct them"
            )
        if self.lanes is not None and not 1 <= self.lanes <= MAX_LANES:
            raise InvalidArgument(
                f"The target has {self.lanes} lanes. `step3rt serve` takes from 1 to {MAX_LANES}. "
                "Correct the number"
            )
        if self.percentile not in ("p50", "p99"):
            raise InvalidArgument(
                f"The target has percentile {self.percentile!r}. The planner knows p50 and p99. "
                "Take one of them"
            )


def deployments(inventory: Inventory, target: Target) -> Iterator[tuple[Deployment, int]]:
    """Every deployment unit that the inventory holds, with the number of units, of one lane."""
    parallelisms: tuple[FfnParallelism, ...] = ("ep", "tp_ep")
    if target.ffn_parallelism is not None:
        parallelisms = (target.ffn_parallelism,)
    for attention_card, attention_count in inventory.cards:
        if target.placement != "disaggregated":
            for gpus in _sizes(attention_card, attention_count):
                for parallelism in parallelisms:
                    unit = Deployment(
                        placement="colocated",
                        attention_card=attention_card,
                        ffn_card=attention_card,
                        num_attention_gpus=gpus,
                        num_ffn_gpus=0,
                        lanes=1,
                        ffn_parallelism=parallelism,
                    )
                    yield unit, attention_count // gpus
        if target.placement == "colocated":
            continue
        for ffn_card, ffn_count in inventory.cards:
            is_same = ffn_card.key == attention_card.key
            for attention in _sizes(attention_card, attention_count):
                for ffn in _sizes(ffn_card, ffn_count):
                    units = (
                        attention_count // (attention + ffn)
                        if is_same
                        else min(attention_count // attention, ffn_count // ffn)
                    )
                    if not units:
                        continue
                    for parallelism in parallelisms:
                        is_part = ffn < ffn_card.gpus_per_host
                        if parallelism == "tp_ep" and is_part and len(parallelisms) > 1:
                            continue  # within a part of a host, EP over NVLink is the choice
                        unit = Deployment(
                            placement="disaggregated",
                            attention_card=attention_card,
                            ffn_card=ffn_card,
                            num_attention_gpus=attention,
                            num_ffn_gpus=ffn,
                            lanes=1,
                            ffn_parallelism=parallelism,
                        )
                        yield unit, units


def _sizes(card: Hardware, count: int) -> list[int]:
    """GPU counts of one side: all up to a host, then whole hosts."""
    per_host = card.gpus_per_host
    return [*range(1, min(per_host, count) + 1)] + [
        hosts * per_host for hosts in _HOSTS if hosts > 1 and hosts * per_host <= count
    ]
