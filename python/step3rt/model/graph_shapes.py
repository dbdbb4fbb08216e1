"""Which graphs a lane of the device pipeline captures, and in which one a step runs.

Owns sizes only: it launches and captures nothing.

A bucket has a graph of decode rows alone, and one with the prefill kernel behind the decode kernel
if a step of its size may have chunks that are worth it. How many chunks, and which, is no part of a
shape: the kernel reads that from device memory.
"""

from dataclasses import dataclass

from step3rt.model.gpu_decoder import BUCKETS
from step3rt.ops.mfa_prefill_choice import fewest_prefill_rows

FEW_LOGIT_ROWS = 16
"""A step that wants logits of no more rows than this does not compute them for its whole bucket."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Of one graph: its bucket, rows of logits, and whether the prefill kernel is in it."""

    num_rows: int
    num_logits: int
    has_prefill: bool

    @classmethod
    def of_step(
        cls, num_rows: int, num_logits: int, max_tokens: int, *, has_prefill: bool
    ) -> "GraphShape":
        """The smallest graph that holds a step."""
        bucket = min(next(bucket for bucket in BUCKETS if bucket >= num_rows), max_tokens)
        is_few = num_logits <= FEW_LOGIT_ROWS < bucket
        return cls(bucket, FEW_LOGIT_ROWS if is_few else bucket, has_prefill)


def graph_shapes(max_tokens: int, prefill_ctas: int) -> list[GraphShape]:
    """Shapes of all graphs, largest first: later ones fit in what those allocated.

    Args:
        max_tokens: Rows of the largest step.
        prefill_ctas: As given to `ops.mfa_prefill_choice.is_for_prefill`.
    """
    fewest = fewest_prefill_rows(prefill_ctas)
    buckets = sorted({min(bucket, max_tokens) for bucket in BUCKETS}, reverse=True)
    return [
        GraphShape(bucket, num_logits, has_prefill)
        for bucket in buckets
        for num_logits in sorted({bucket, min(bucket, FEW_LOGIT_ROWS)}, reverse=True)
        for has_prefill in (False, True)
        if not has_prefill or bucket >= fewest
    ]
