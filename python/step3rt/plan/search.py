"""Every sensible deployment of an inventory of cards, each at its best batch within the target.

Owns the search space and its evaluation with mean stage times; never randomness (`verdict` runs
the simulator on the winners) and never advice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from step3rt.errors import InvalidArgument
from step3rt.plan.architecture import Model
from step3rt.plan.cost import TOKENS_PER_PRICE, Precision
from step3rt.plan.deployment import (
    MAX_LANES,
    Deployment,
    FfnParallelism,
    Placement,
    max_batch_by_memory,
)
from step3rt.plan.hardware import Hardware
from step3rt.plan.profile import Profile
from step3rt.plan.stages import Floats, stage_times, step_us
from step3rt.plan.tiles import whole_tiles

_LANES = (1, 2, 3, 4)
# Sizes of one side in hosts. Larger deployments are several units side by side.
_HOSTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
_SWEEP_POINTS = 40
MAX_INVENTORY_GPUS = 65_536
_EULER_GAMMA = 0.5772


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
        if self.context_tokens < 1 or not self.tpot_ms > 0:
            raise InvalidArgument(
                f"The target has a context of {self.context_tokens} tokens and {self.tpot_ms} ms "
                "TPOT. Both are above 0. Correct them"
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A deployment unit at its best batch, and as many units as the inventory holds.

    Attributes:
        deployment: the unit.
        num_units: units side by side, each with a model of its own.
        batch: sequences in flight of one unit.
        max_batch: what memory would hold.
        tpot_ms: expected mean, jitter included.
        tokens_per_s: of all units.
        tokens_per_s_per_gpu: over all cards of the inventory, idle ones included.
        usd_per_1m_tokens: of the cards in use; the others may be given back.
    """

    deployment: Deployment
    num_units: int
    batch: int
    max_batch: int
    tpot_ms: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    usd_per_1m_tokens: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the best candidate of each placement that has one, most tokens first.
        front: the Pareto fronts of TPOT against tokens/s/GPU and of TPOT against USD per token,
            over all batches, fastest first.
        num_evaluated: deployments looked at.
    """

    best: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    num_evaluated: int


def search(
    model: Model, inventory: Inventory, target: Target, profile: Profile, precision: Precision
) -> SearchResult:
    """The best deployments of `model` on `inventory`.

    Raises:
        InvalidArgument: the inventory is empty or larger than the planner takes.
    """
    if not 1 <= inventory.num_gpus <= MAX_INVENTORY_GPUS:
        raise InvalidArgument(
            f"The inventory has {inventory.num_gpus} cards. The planner takes from 1 to "
            f"{MAX_INVENTORY_GPUS}. Correct the counts"
        )
    best: dict[tuple[Placement, str, str], Candidate] = {}
    sweeps: list[_Sweep] = []
    for deployment, num_units in deployments(inventory, target):
        # A disaggregated dense FFN is split either way; colocated experts are spread either way.
        is_dense = model.sparsity is None
        if deployment.ffn_parallelism == "tp_ep" and is_dense != deployment.is_colocated:
            continue
        for sweep in _sweeps(model, deployment, num_units, target, profile, precision):
            sweeps.append(sweep)
            within = np.flatnonzero(sweep.tpot_ms <= target.tpot_ms)
            if not within.size:
                continue
            top = int(within[np.argmax(sweep.tokens_per_s[within])])
            key = (deployment.placement, deployment.attention_card.key, deployment.ffn_card.key)
            if key not in best or sweep.tokens_per_s[top] > best[key].tokens_per_s:
                best[key] = sweep.candidate(top, inventory)
    ranked = sorted(best.values(), key=lambda candidate: -candidate.tokens_per_s)
    return SearchResult(tuple(ranked), _front(sweeps, inventory), len(sweeps))


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
                        if parallelism == "tp_ep" and ffn < ffn_card.gpus_per_host:
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


def jitter_us(model: Model, deployment: Deployment, profile: Profile) -> float:
    """Expected delay of a step by jitter: per layer, the slowest GPU of each side.

    The maximum of n exponential delays is the n-th harmonic number of their mean.
    """
    if deployment.is_colocated:
        sides = [deployment.num_attention_gpus] * 2
    else:
        sides = [deployment.num_attention_gpus, deployment.num_ffn_gpus]
    slowest = sum(np.log(side) + _EULER_GAMMA + 1 / (2 * side) for side in sides)
    return float(profile.jitter_us * slowest * model.num_layers)


def evaluate(
    model: Model,
    deployment: Deployment,
    target: Target,
    profile: Profile,
    precision: Precision,
    sizes: Floats,
    lanes: Floats | None = None,
) -> Floats:
    """Expected TPOT in ms for so many sequences of each lane and attention GPU: f64[sizes].

    Takes the deployment's lanes, or `lanes` [sizes] if given.
    """
    times = stage_times(model, deployment, profile, sizes, target.context_tokens, precision)
    mean_us = step_us(times, deployment, lanes)
    tpot_ms: Floats = (mean_us + jitter_us(model, deployment, profile)) / 1e3
    return tpot_ms


def most_sequences(
    model: Model,
    deployment: Deployment,
    target: Target,
    profile: Profile,
    precision: Precision,
) -> int:
    """The most sequences of each lane and GPU within target and memory; 0 if none.

    TPOT grows with the batch. So do tokens per second, but where the last tile is hardly filled:
    then `whole_tiles` of the most may be better.
    """
    places = deployment.lanes * deployment.num_attention_gpus
    limit = max_batch_by_memory(model, deployment, target.context_tokens, precision) / places
    low, high = 0, int(limit)
    while low < high:
        # A few sizes at a time: evaluating an array costs little more than a number.
        sizes = np.unique(np.linspace(low + 1, high, 16).astype(np.int64))
        tpot_ms = evaluate(model, deployment, target, profile, precision, sizes.astype(float))
        within = sizes[tpot_ms <= target.tpot_ms]
        above = sizes[tpot_ms > target.tpot_ms]
        low = int(within[-1]) if within.size else low
        high = int(above[0]) - 1 if above.size else low
    return low


@dataclass(frozen=True, slots=True)
class _Sweep:
    """One deployment over many batches: arrays of the same length."""

    deployment: Deployment
    num_units: int
    max_batch: float
    batch: Floats
    tpot_ms: Floats
    tokens_per_s: Floats

    @property
    def usd_per_1m_tokens(self) -> Floats:
        usd_per_s = self.num_units * self.deployment.usd_per_hour / 3600
        usd: Floats = TOKENS_PER_PRICE * usd_per_s / self.tokens_per_s
        return usd

    def candidate(self, index: int, inventory: Inventory) -> Candidate:
        rate = float(self.tokens_per_s[index])
        return Candidate(
            deployment=self.deployment,
            num_units=self.num_units,
            batch=int(self.batch[index]),
            max_batch=int(self.max_batch),
            tpot_ms=float(self.tpot_ms[index]),
            tokens_per_s=rate,
            tokens_per_s_per_gpu=rate / inventory.num_gpus,
            usd_per_1m_tokens=float(self.usd_per_1m_tokens[index]),
        )


def _sweeps(
    model: Model,
    deployment: Deployment,
    num_units: int,
    target: Target,
    profile: Profile,
    precision: Precision,
) -> Iterator[_Sweep]:
    """The deployment with every number of lanes over batches from one sequence to full memory.

    All lanes are evaluated as one array: a call costs far more than its elements.
    """
    max_batch = max_batch_by_memory(model, deployment, target.context_tokens, precision)
    gpus = deployment.num_attention_gpus
    options = _LANES if target.lanes is None else (target.lanes,)
    limits = {lanes: int(max_batch / (lanes * gpus)) for lanes in options}
    grids = {
        lanes: _with_whole_tiles(np.geomspace(1, limit, _SWEEP_POINTS), profile)
        for lanes, limit in limits.items()
        if limit >= 1
    }
    if not grids:
        return
    first = _evaluate_grids(model, deployment, target, profile, precision, grids)
    # Where the target lies between two points of a grid, look closer.
    finer = {}
    for lanes, tpot_ms in first.items():
        within = np.flatnonzero(tpot_ms <= target.tpot_ms)
        if within.size and within[-1] + 1 < tpot_ms.size:
            low, high = grids[lanes][within[-1]], grids[lanes][within[-1] + 1]
            if high - low > 1:
                finer[lanes] = np.unique(np.linspace(low + 1, high - 1, 10).astype(np.int64))
    second = _evaluate_grids(model, deployment, target, profile, precision, finer) if finer else {}
    for lanes, tpot_ms in first.items():
        sizes = grids[lanes]
        if lanes in finer:
            sizes = np.append(sizes, finer[lanes])
            tpot_ms = np.append(tpot_ms, second[lanes])
        batch = sizes.astype(float) * lanes * gpus
        tokens_per_s = num_units * batch / tpot_ms * 1e3
        unit = replace(deployment, lanes=lanes)
        yield _Sweep(unit, num_units, max_batch, batch, tpot_ms, tokens_per_s)


def _with_whole_tiles(sizes: Floats, profile: Profile) -> NDArray[np.int64]:
    """Whole sizes, and those below each that fill their tiles, in order."""
    points = sizes.astype(np.int64)
    full = whole_tiles(points.astype(float), profile.linear_tile_rows).astype(np.int64)
    return np.unique(np.concatenate((points, full)))


def _evaluate_grids(
    model: Model,
    deployment: Deployment,
    target: Target,
    profile: Profile,
    precision: Precision,
    grids: dict[int, NDArray[np.int64]],
) -> dict[int, Floats]:
    """TPOT in ms at each size of each number of lanes."""
    sizes = np.concatenate(list(grids.values())).astype(float)
    lanes = np.concatenate([np.full(grid.size, float(lane)) for lane, grid in grids.items()])
    tpot_ms = evaluate(model, deployment, target, profile, precision, sizes, lanes)
    ends = np.cumsum([grid.size for grid in grids.values()])[:-1]
    return dict(zip(grids, np.split(tpot_ms, ends), strict=True))


def _front(sweeps: list[_Sweep], inventory: Inventory) -> tuple[Candidate, ...]:
    """Those that no other beats in TPOT and rate, or that no other beats in TPOT and price."""
    if not sweeps:
        return ()
    tpot_ms = np.concatenate([sweep.tpot_ms for sweep in sweeps])
    rate = np.concatenate([sweep.tokens_per_s for sweep in sweeps])
    cheapness = 1 / np.concatenate([sweep.usd_per_1m_tokens for sweep in sweeps])
    owner = np.concatenate([np.full(len(s.tpot_ms), i) for i, s in enumerate(sweeps)])
    index = np.concatenate([np.arange(len(sweep.tpot_ms)) for sweep in sweeps])
    chosen = set[int]()
    for goodness in (rate, cheapness):
        order = np.lexsort((-goodness, tpot_ms))
        best_before = np.concatenate(([0.0], np.maximum.accumulate(goodness[order])[:-1]))
        chosen |= set(order[goodness[order] > best_before].tolist())
    ranked = sorted(chosen, key=lambda item: float(tpot_ms[item]))
    return tuple(sweeps[owner[i]].candidate(int(index[i]), inventory) for i in ranked)


def with_batch(candidate: Candidate, batch: int, tpot_ms: float) -> Candidate:
    """The same candidate at another batch and TPOT, rates scaled to them."""
    ratio = (batch / tpot_ms) / (candidate.batch / candidate.tpot_ms)
    return replace(
        candidate,
        batch=batch,
        tpot_ms=tpot_ms,
        tokens_per_s=candidate.tokens_per_s * ratio,
        tokens_per_s_per_gpu=candidate.tokens_per_s_per_gpu * ratio,
        usd_per_1m_tokens=candidate.usd_per_1m_tokens / ratio,
    )
