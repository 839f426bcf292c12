"""Is a claim true of the runs at hand? A difference over seeds, its interval, and a rule that was stated before.

A claim says that a number of one way of training (or its difference from another way) is higher, lower or equal. With
d the difference in the direction claimed and δ the smallest difference that counts, both told before the run:

* it **holds** where d = 0 is rejected in favour of d > 0;
* it **does not hold** where d ≥ δ is rejected in favour of d < δ: whatever there is, is too small to count;
* else it **cannot be told**.

Of "equal", d is the absolute difference: it holds where |d| ≥ δ is rejected (two one-sided tests, Schuirmann 1987), and
does not where |d| ≤ δ is. Each of the two families of p-values is corrected over all claims (Holm 1979), at 0.05.

Seeds and examples are both samples, and crossed: every seed is scored on the same examples. See `difference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_lab.brief import Brief

if TYPE_CHECKING:
    from lora_lab.results.stats import Floats

Unit = tuple[int, ...]
"""The seeds that a value is of: one of a single adapter, two of a pair."""


@dataclass(frozen=True, eq=False, repr=False)
class Value(Brief):
    """What a statistic is of one unit."""

    value: float
    half: float = 0.0
    """Half of its interval over the examples; 0 where it has none."""
    examples: tuple[Floats, ...] = ()
    """For each task numbers of its examples: the sum of their means has the variance of the value. () where not known.
    """


Values = Mapping[Unit, Value]

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
    paired: bool | None = None
    """Whether the noise of examples is that of differences on the same ones; None where none is known."""

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
    θ₋ₛ the mean without the units of seed s, (S − 1)/S Σ (θ₋ₛ − θ̄₋)², which of single seeds is that of a paired t-test
    (Efron & Stein 1981: never too small on average). To it the variance is added that all units have in common, as they
    are scored on the same examples (see `_of_examples`). Degrees of freedom: S − 1 of the seeds and n − 1 of the
    examples, joined by Satterthwaite's rule.
    """
    import numpy as np

    units = [unit for unit in treated if control is None or unit in control]
    units = [
        u for u in units if math.isfinite(treated[u].value) and (control is None or math.isfinite(control[u].value))
    ]
    if not units:
        return None
    sides = [[values[unit] for unit in units] for values in (treated, control) if values is not None]
    ours, *theirs = (np.array([value.value for value in side]) for side in sides)
    each = ours - (theirs[0] if theirs else against)
    seeds = sorted({seed for unit in units for seed in unit})
    means = _without_each(each, units, seeds)
    of_seeds = math.nan
    if means is not None:
        of_seeds = (len(seeds) - 1) / len(seeds) * float(((means - means.mean()) ** 2).sum())
    of_examples, free, paired = _of_examples(sides)
    variance = of_seeds + of_examples
    parts = [(of_seeds, len(seeds) - 1), (of_examples, free)]
    uncertain = sum(part**2 / free for part, free in parts if part > 0)
    freedom = variance**2 / uncertain if uncertain else math.inf
    middle = float(theirs[0].mean()) if theirs else None
    error = math.sqrt(variance) if math.isfinite(variance) else math.nan
    return Difference(float(ours.mean()), middle, float(each.mean()), error, freedom, len(units), len(seeds), paired)


_FEW = 10
"""Examples that must differ from the others; fewer tell too little of those that were not seen."""


def _of_examples(sides: Sequence[Sequence[Value]]) -> tuple[float, float, bool | None]:
    """The variance of a mean over units that comes from their examples alone, its degrees of freedom, and `paired`.

    With d_ue the difference of unit u on example e, d_ue = μ + a_u + b_e + ε_ue, the mean over U units and n examples
    has the variance σ_a²/U + σ_b²/n + σ_ε²/Un. That between seeds has the first and the last of these in it, so
    what is left is σ_b²/n: the variance of d̄_e over n, less that of ε (two-way analysis of variance), and not below 0.
    Pairs that share a seed share some of ε, of which the less is taken off.

    Where numbers of the examples are not known, or hardly any example differs, the variances of both sides are added as
    if they had examples of their own, of all units the largest: which is more than there is.
    """
    from lora_lab.results.stats import Z

    tables = _tables(sides)
    if tables:
        return sum(map(_in_common, tables)), min(table.shape[1] for table in tables) - 1, True
    variance = sum((max(each.half for each in side) / Z) ** 2 for side in sides)
    return variance, math.inf, False if variance else None


def _tables(sides: Sequence[Sequence[Value]]) -> list[Floats]:
    """For each task the differences d_ue, [units, examples]; none where they are not known or hardly any differs."""
    import numpy as np

    if len({tuple(map(len, each.examples)) for side in sides for each in side}) > 1:
        return []
    stacked = [[np.stack(task) for task in zip(*(each.examples for each in side), strict=True)] for side in sides]
    tables = stacked[0] if len(sides) == 1 else [ours - theirs for ours, theirs in zip(*stacked, strict=True)]
    tables = [table.astype(np.float64) for table in tables]
    if not all(np.isfinite(table).all() for table in tables):
        return []
    away = [abs(table.mean(0) - np.median(table.mean(0))) for table in tables]
    differing = sum(int((each > 1e-6 * each.max()).sum()) for each in away)
    return tables if differing >= _FEW else []


def _in_common(table: Floats) -> float:
    """σ_b²/n of differences [units, examples]."""
    units, n = table.shape
    mean: Floats = table.mean(0)
    found: float = float(mean.var(ddof=1)) / n
    if units > 1:
        left = table - mean - table.mean(1, keepdims=True) + table.mean()
        found -= float((left**2).sum()) / ((units - 1) * (n - 1)) / (units * n)
    return max(0.0, found)


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
