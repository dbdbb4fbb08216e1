"""What a fit is worth on runs that it has not seen, over many ways to draw the halves.

Owns which splits are looked at; the fit and the errors are `compare`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np

from step3rt.plan.architecture import Model
from step3rt.plan.compare import Row, compare, fit, median_error, split
from step3rt.plan.measurement import Measurement
from step3rt.plan.profile import Profile

MAX_SPLITS = 12


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """One entry a split: the tested half's readings, predicted by a fit to the other half."""

    rows: tuple[tuple[Row, ...], ...]

    def errors(self, quantity: str = "tokens_per_s_per_gpu") -> list[float]:
        """Each split's median error in one quantity, or in all of "stages", smallest first."""
        found = [median_error(rows, quantity) for rows in self.rows]
        return sorted(error for error in found if not isnan(error))

    def median(self, quantity: str = "tokens_per_s_per_gpu") -> float | None:
        """The median over the splits; None where no run has a reading."""
        found = self.errors(quantity)
        return float(np.median(found)) if found else None

    def worst(self, quantity: str = "tokens_per_s_per_gpu") -> float | None:
        """The largest over the splits; None where no run has a reading."""
        return max(self.errors(quantity), default=None)


def cross_validate(
    model: Model, measurements: Sequence[Measurement], profile: Profile, splits: int = MAX_SPLITS
) -> CrossValidation:
    """Fits to one half of the runs and tests on the other, for the halves of seeds 0, 1, ...

    The same for the same runs; halves that two seeds both give count once. A single run cannot be
    tested: it has no splits.
    """
    seen_splits = set[frozenset[str]]()
    tested = []
    for seed in range(splits if len(measurements) > 1 else 0):
        fitted_to, tested_on = split(measurements, seed)
        half = frozenset(each.name for each in fitted_to)
        if half in seen_splits:
            continue
        seen_splits.add(half)
        tested.append(compare(model, tested_on, fit(model, fitted_to, profile)))
    return CrossValidation(tuple(tested))
