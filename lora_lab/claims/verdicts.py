"""Is a claim true of the runs at hand? A difference over seeds, its interval, and a rule that was stated before.

A claim says that a number of one way of training (or its difference from another way) is higher, lower or equal. With
d the difference in the direction claimed and δ the smallest difference that counts, both told before the run:

* it **holds** where d = 0 is rejected in favour of d > 0;
* it **does not hold** where d ≥ δ is rejected in favour of d < δ: whatever there is, is too small to count;
* else it **cannot be told**.

Of "equal", d is the absolute difference: it holds where |d| ≥ δ is rejected (two one-sided tests, Schuirmann 1987), and
does not where |d| ≤ δ is. Each of the two families of p-values is corrected over all claims (Holm 1979), at 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.results.stats import Floats

Unit = tuple[int, ...]
"""The seeds that a value is of: one of a single adapter, two of a pair."""
Values = Mapping[Unit, tuple[float, float]]
"""Unit → a value, and half of its interval over the examples (0 where it has none)."""

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
DIRECTIONS = ("higher", "lower", "equal")


@dataclass(frozen=True)
class Difference:
    """A mean difference over units, in units of the statistic."""

    treated: float
    control: float | None
    """None where the claim is of one way of training alone."""
    value: float
    error: float
    """Standard error, of seeds and of examples together; NaN from fewer than two seeds."""
    freedom: float
    """Degrees of freedom of its t."""
    units: int
    seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of its 95 % interval; NaN from fewer than two seeds."""
        from scipy.stats import t

        from lora_lab.results.stats import LEVEL

        if not math.isfinite(self.error):
            return math.nan, math.nan
        half = float(t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error
        return self.value - half, self.value + half


def difference(treated: Values, control: Values | None, against: float = 0.0) -> Difference | None:
    """Treated less control over the units that both have (less `against`, without a control); None without any.

    Units that share a seed are not independent, so the variance between seeds is the delete-one jackknife's: with
    θ₋ₛ the mean without the units of seed s, (n − 1)/n Σ (θ₋ₛ − θ̄₋)², which of single seeds is that of a paired t-test
    (Efron & Stein 1981: never too small on average). All units are scored on the same examples; their variance is added
    as if treated and control had been scored on examples of their own, and as if all units had the largest of it,
    which is more than there is. Degrees of freedom: n − 1 of the seeds, joined by Satterthwaite's rule.
    """
    import numpy as np

    from lora_lab.results.stats import Z

    units = [unit for unit in treated if control is None or unit in control]
    units = [u for u in units if math.isfinite(treated[u][0]) and (control is None or math.isfinite(control[u][0]))]
    if not units:
        return None
    ours = np.array([treated[unit][0] for unit in units])
    theirs = np.array([control[unit][0] for unit in units]) if control is not None else None
    each = ours - (against if theirs is None else theirs)
    seeds = sorted({seed for unit in units for seed in unit})
    means = _without_each(each, units, seeds)
    of_seeds = math.nan
    if means is not None:
        of_seeds = (len(seeds) - 1) / len(seeds) * float(((means - means.mean()) ** 2).sum())
    halves = [max((values[unit][1] for unit in units), default=0.0) for values in (treated, control or {}) if values]
    of_examples = sum((half / Z) ** 2 for half in halves)
    variance = of_seeds + of_examples
    freedom = (len(seeds) - 1) * (variance / of_seeds) ** 2 if of_seeds else math.inf
    middle = None if theirs is None else float(theirs.mean())
    error = math.sqrt(variance) if math.isfinite(variance) else math.nan
    return Difference(float(ours.mean()), middle, float(each.mean()), error, freedom, len(units), len(seeds))


def _without_each(each: Floats, units: Sequence[Unit], seeds: Sequence[int]) -> Floats | None:
    """The mean without the units of each seed; None where that leaves nothing."""
    import numpy as np

    kept = [np.array([seed not in unit for unit in units]) for seed in seeds]
    if not all(mask.any() for mask in kept):
        return None
    return np.array([each[mask].mean() for mask in kept])


@dataclass(frozen=True)
class PValues:
    """p-values of the two null hypotheses: that what is claimed is not so, and that it is."""

    holds: float
    fails: float


def p_values(found: Difference, direction: str, least: float) -> PValues:
    """The two p-values of a difference; 1 of both where there is no standard error."""
    from scipy.stats import t

    if not math.isfinite(found.error):
        return PValues(1.0, 1.0)

    def above(value: float) -> float:
        """P of a t as large as that of value > 0."""
        if found.error == 0:
            return 0.0 if value > 0 else 1.0
        return float(t.sf(value / found.error, found.freedom))

    if direction == "equal":
        size = abs(found.value)
        return PValues(above(least - size), above(size - least))
    value = found.value if direction == "higher" else -found.value
    return PValues(above(value), above(least - value))


def verdicts(tested: Sequence[PValues]) -> list[tuple[str, float, float]]:
    """For every claim the verdict, and both p-values corrected over all of them."""
    from lora_lab.results.stats import LEVEL, holm

    level = 1 - LEVEL
    holds, fails = holm([each.holds for each in tested]), holm([each.fails for each in tested])
    named = [HOLDS if h < level else FAILS if f < level else OPEN for h, f in zip(holds, fails, strict=True)]
    return list(zip(named, holds, fails, strict=True))
