"""Every sensible deployment of an inventory of cards, each at its best batch within the target.

Owns the comparison, with mean stage times; never randomness (`verdict` runs the simulator on the
winners) and never advice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from step3rt.errors import InvalidArgument
from step3rt.plan.architecture import Model
from step3rt.plan.batches import best_size, evaluate
from step3rt.plan.cost import TOKENS_PER_PRICE, Precision
from step3rt.plan.deployment import Deployment, Placement, max_batch_by_memory
from step3rt.plan.profile import Profile
from step3rt.plan.search_space import Inventory, Target, deployments
from step3rt.plan.stages import Floats
from step3rt.plan.tiles import whole_tiles

_LANES = (1, 2, 3, 4)
_SWEEP_POINTS = 40
MAX_INVENTORY_GPUS = 65_536
# A sweep's points are a few per cent apart: whoever is as close to the best may be the best.
_CONTENDER_SHARE = 0.96


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
    sweeps = [
        sweep
        for deployment, num_units in deployments(inventory, target)
        if (unit := _meant(model, deployment, target)) is not None
        for sweep in _sweeps(model, unit, num_units, target, profile, precision)
    ]
    most: dict[_Key, float] = {}
    for sweep in sweeps:
        most[sweep.key] = max(most.get(sweep.key, 0.0), sweep.rates_within(target).max())
    best: dict[_Key, Candidate] = {}
    for index, sweep in enumerate(sweeps):
        reached = sweep.rates_within(target).max()
        if not reached or reached < _CONTENDER_SHARE * most[sweep.key]:
            continue
        sweeps[index] = exact = sweep.refined(model, target, profile, precision)
        top = int(np.argmax(exact.rates_within(target)))
        if sweep.key not in best or exact.tokens_per_s[top] > best[sweep.key].tokens_per_s:
            best[sweep.key] = exact.candidate(top, inventory)
    ranked = sorted(best.values(), key=lambda candidate: -candidate.tokens_per_s)
    return SearchResult(tuple(ranked), _front(sweeps, inventory), len(sweeps))


def _meant(model: Model, deployment: Deployment, target: Target) -> Deployment | None:
    """The deployment, in the one of two equal forms that is looked at; None is the other form.

    A disaggregated dense FFN is split either way; colocated experts are spread either way.
    """
    is_dense = model.sparsity is None
    if deployment.ffn_parallelism == "ep" or is_dense == deployment.is_colocated:
        return deployment
    return None if target.ffn_parallelism is None else replace(deployment, ffn_parallelism="ep")


_Key = tuple[Placement, str, str]


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
    def key(self) -> _Key:
        """Of those with the same key, only the best is a candidate."""
        unit = self.deployment
        return unit.placement, unit.attention_card.key, unit.ffn_card.key

    def rates_within(self, target: Target) -> Floats:
        """Tokens per second of the points within the target; 0 of the others."""
        return np.where(self.tpot_ms <= target.tpot_ms, self.tokens_per_s, 0.0)

    def refined(
        self, model: Model, target: Target, profile: Profile, precision: Precision
    ) -> "_Sweep":
        """With the best batch within the target as one more point; some point is within it."""
        unit = self.deployment
        size = np.array([float(best_size(model, unit, target, profile, precision))])
        tpot_ms = evaluate(model, unit, target, profile, precision, size)
        batch = size * unit.lanes * unit.num_attention_gpus
        return replace(
            self,
            batch=np.append(self.batch, batch),
            tpot_ms=np.append(self.tpot_ms, tpot_ms),
            tokens_per_s=np.append(self.tokens_per_s, self.num_units * batch / tpot_ms * 1e3),
        )

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
