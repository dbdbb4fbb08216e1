"""How many sequences of which length each lane of each attention GPU holds, step by step.

Owns the length process; never time: arrivals are counted per step, with the step's mean length.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from step3rt.errors import InvalidArgument
from step3rt.plan.deployment import MAX_BATCH, MAX_CONTEXT_TOKENS

Lengths = Literal["fixed", "spread", "stationary"]
_SPREAD = 0.5  # "spread ±50 %" of the decode benchmark
MAX_CELLS = 200_000_000  # steps x lanes x GPUs that are kept, in memory of 8 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is being served.

    Attributes:
        batch: sequences in flight over all lanes and attention GPUs; with arrivals, the limit.
        context_tokens: mean context of a running sequence.
        lengths: "fixed" holds all at the mean; "spread" draws them from +-50 % of it once;
            "stationary" lets sequences grow, finish and be replaced by new ones.
        output_tokens: mean tokens that a stationary sequence generates (geometric); its prompt is
            what is left of the mean context.
        arrivals_per_step: mean new requests in the time of a step, over all lanes and GPUs
            (Poisson); None replaces each finished sequence at once. Needs "stationary".
    """

    batch: int
    context_tokens: int
    lengths: Lengths = "fixed"
    output_tokens: int = 1024
    arrivals_per_step: float | None = None

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            InvalidArgument: a field is impossible or two contradict each other.
        """
        lengths = (self.context_tokens, self.output_tokens)
        if not 1 <= self.batch <= MAX_BATCH or not all(
            1 <= length <= MAX_CONTEXT_TOKENS for length in lengths
        ):
            raise InvalidArgument(
                f"The workload has batch {self.batch}, context {self.context_tokens} and output "
                f"{self.output_tokens}. All are at least 1, a batch at most {MAX_BATCH} and the "
                f"others at most {MAX_CONTEXT_TOKENS}. Correct them"
            )
        if self.arrivals_per_step is None:
            return
        if self.lengths != "stationary" or not 0 < self.arrivals_per_step <= MAX_BATCH:
            raise InvalidArgument(
                f"The workload has {self.arrivals_per_step} arrivals a step and {self.lengths} "
                "lengths. Sequences that never finish leave no room for arrivals. Use stationary "
                f"lengths and a number above 0, at most {MAX_BATCH}"
            )


@dataclass(frozen=True, slots=True)
class Load:
    """What each lane of each GPU holds: sequences and cached tokens, f32[steps, lanes, gpus]."""

    sequences: NDArray[np.float32]
    tokens: NDArray[np.float32]
    waiting: NDArray[np.int64]


def draw_load(
    workload: Workload, lanes: int, gpus: int, steps: int, rng: np.random.Generator
) -> Load:
    """The load of each step.

    Args:
        workload: what is served.
        lanes: of one attention GPU.
        gpus: attention GPUs.
        steps: how many.
        rng: the source of randomness.

    Raises:
        InvalidArgument: more than the planner keeps in memory.
    """
    if steps * lanes * gpus > MAX_CELLS:
        raise InvalidArgument(
            f"The simulation has {steps} steps of {lanes} lanes on {gpus} GPUs. It keeps at most "
            f"{MAX_CELLS} loads in memory. Simulate fewer steps"
        )
    # Sequences are dealt out in turn, so no two places differ by more than one.
    places = lanes * gpus
    per_place = np.full(places, workload.batch // places)
    per_place[: workload.batch % places] += 1
    owner = np.repeat(np.arange(places), per_place)
    shape = (steps, lanes, gpus)
    if workload.lengths != "stationary":
        low, high = (1 - _SPREAD, 1 + _SPREAD) if workload.lengths == "spread" else (1.0, 1.0)
        length = workload.context_tokens * rng.uniform(low, high, workload.batch)
        counts = np.bincount(owner, minlength=places).astype(np.float32)
        tokens = np.bincount(owner, length, places).astype(np.float32)
        return Load(
            np.broadcast_to(counts.reshape(lanes, gpus), shape),
            np.broadcast_to(tokens.reshape(lanes, gpus), shape),
            np.zeros(steps, np.int64),
        )
    return _stationary(workload, owner, shape, rng)


def _stationary(
    workload: Workload,
    owner: NDArray[np.intp],
    shape: tuple[int, int, int],
    rng: np.random.Generator,
) -> Load:
    steps, lanes, gpus = shape
    places = lanes * gpus
    # A geometric output has no memory: each step, a running sequence ends with the same chance,
    # and the age of one that runs has the output's own distribution and mean.
    end_chance = 1 / workload.output_tokens
    prompt = max(workload.context_tokens - workload.output_tokens, 1)
    length = prompt + rng.geometric(end_chance, owner.size).astype(np.float64)
    busy_share = 1.0
    if workload.arrivals_per_step is not None:
        # Little's law: what runs is arrivals times the steps that each stays.
        busy_share = min(1.0, workload.arrivals_per_step * workload.output_tokens / owner.size)
    is_running = rng.random(owner.size) < busy_share
    waiting = 0
    sequences = np.empty((steps, places), np.float32)
    tokens = np.empty((steps, places), np.float32)
    queue = np.zeros(steps, np.int64)
    for step in range(steps):
        ended = is_running & (rng.random(owner.size) < end_chance)
        length += 1
        length[ended] = prompt
        if workload.arrivals_per_step is not None:
            is_running &= ~ended
            waiting += rng.poisson(workload.arrivals_per_step)
            free = np.flatnonzero(~is_running)
            # Slots are in order of their place: a random choice among them keeps places even.
            taken = rng.permutation(free)[: min(waiting, free.size)]
            is_running[taken] = True
            length[taken] = prompt
            waiting -= taken.size
            queue[step] = waiting
        sequences[step] = np.bincount(owner, is_running, places)
        tokens[step] = np.bincount(owner, length * is_running, places)
    return Load(sequences.reshape(shape), tokens.reshape(shape), queue)
