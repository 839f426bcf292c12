"""Intervals for numbers that come from samples of examples, and for means over few draws.

What is promised is 95 %. Measured over games and proportions of all sizes (tests/test_coverage.py), no interval of this
module holds the truth in less than 85 % of the cases, and most of them in 92 to 99 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.brief import Brief

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
Z = 1.959964
"""Half width of a 95 % interval in standard errors, for means over many examples."""

UNDEFINED = 0.05
"""Share of bootstrap samples without a value from which on there is no interval."""

ADDED = 4
"""Examples added to outcomes that are right or wrong, half of them right (Agresti & Coull 1998)."""

_FEW = 3
"""Right or wrong ones up to which Wilson's interval is mended (Brown, Cai & DasGupta 2001, section 4.1.1)."""


INTERVALS = 2
"""Which way intervals are made: results that were made in another way are made again from the scores that are kept."""


def student(draws: float) -> float:
    """Half width of a 95 % interval in standard errors for a mean over few draws (Student's t, draws − 1)."""
    from scipy.special import stdtrit  # which figures, drawn from results alone, have no need of

    return float(stdtrit(draws - 1, (1 + LEVEL) / 2))


def unseen(draws: float) -> float:
    """The largest probability that something can have and still be missed by all draws in 2.5 % of the cases."""
    return float(1 - ((1 - LEVEL) / 2) ** (1 / draws))


def mean_and_error(draws: Floats, reach: float = 0.0) -> tuple[Floats, Floats]:
    """Means of independent draws [draws, n], and their standard errors; NaN from one draw alone.

    NaNs among the draws are left out. Draws that are all equal do not show that every draw is: another one may have a
    probability of up to `unseen` and not have come. It is taken to be as far off as two draws of one column are from
    each other at most (as `reach`, where every column is constant), and the standard error is the one whose interval
    by Student's t is as wide as that. So intervals of rare contributions hold the truth, which [v, v] would not.
    """
    known = np.isfinite(draws)
    count = known.sum(0)
    width = np.where(known, draws, -np.inf).max(0) - np.where(known, draws, np.inf).min(0)
    width = np.where(count > 0, width, 0.0)
    farthest, rounding = float(width.max(initial=0.0)), 1e-9 * float(np.abs(draws[known]).max(initial=0.0))
    if farthest > rounding:
        reach = farthest
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, draws, 0).sum(0) / count
        square = np.where(known, draws - mean, 0) ** 2
        error = np.sqrt(square.sum(0) / (count - 1) / count)
    for i in np.flatnonzero((count > 1) & (width <= rounding)):
        error[i] = reach * unseen(int(count[i])) / student(int(count[i]))
    error[count < 2] = np.nan
    return mean, error


def half_width(draws: Floats, *, reach: float = 0.0, of: float = math.inf) -> float:
    """Half width of the 95 % interval of a mean over few draws; 0 for one alone, which tells nothing of it.

    `reach` as in `mean_and_error`. Draws without replacement from `of` things leave the less uncertain the more of them
    they are, and nothing once they are all (the finite population correction; Cochran 1977, section 2.6).
    """
    n = len(draws)
    if n < 2 or n >= of:
        return 0.0
    return student(n) * float(mean_and_error(draws[:, None], reach)[1][0]) * math.sqrt(1 - n / of)


def half_of_strata(strata: Sequence[tuple[float, float]]) -> float:
    """Half width of the 95 % interval of a sum over strata of (variance, draws) (Satterthwaite 1946)."""
    variance, freedom = _of_strata(strata)
    return student(1 + freedom) * math.sqrt(variance) if variance else 0.0


def _of_strata(strata: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The variance of a sum over strata of (variance, draws), and its degrees of freedom."""
    variance = sum(each for each, _ in strata)
    return variance, variance**2 / sum(each**2 / (draws - 1) for each, draws in strata if each) if variance else 0.0


def p_of_strata(value: float, strata: Sequence[tuple[float, float]]) -> float:
    """The two-sided p-value of a value of which 0 is the null hypothesis, by the t that `half_of_strata` takes."""
    from scipy.special import stdtr

    variance, freedom = _of_strata(strata)
    if not variance:
        return 1.0 if not value else 0.0
    return float(2 * stdtr(freedom, -abs(value) / math.sqrt(variance)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several hypotheses, corrected so that one is rejected wrongly in 5 % of the cases (Holm 1979).

    With p₁ ≤ … ≤ pₘ, p̃ᵢ = max over j ≤ i of min(1, (m − j + 1) pⱼ), in the order that was given.
    """
    order, corrected, most = np.argsort(p, kind="stable"), [1.0] * len(p), 0.0
    for j, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - j) * p[i]))
        corrected[i] = most
    return corrected


ENOUGH = 20
"""Draws of a null with which p = 1 / (draws + 1) can fall below 0.05."""


def p_of_draws(value: float, draws: Floats) -> float | None:
    """(1 + draws that are as large) / (1 + draws): how rarely a null reaches the value; None with fewer than ENOUGH.

    Exact where value and draws are exchangeable under the null hypothesis (Phipson & Smyth 2010).
    """
    if len(draws) < ENOUGH or not (math.isfinite(value) and np.isfinite(draws).all()):
        return None
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))


def proportion(values: npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """The mean of outcomes from 0 to 1, and the ends of its 95 % interval (Wilson 1927), never of no width.

    Of examples that are right or wrong it is Wilson's, but that with 1 to 3 right (or wrong) ones its end goes by the
    Poisson law, without which it would hold only 84 % of the smallest proportions. Of shares, such as tokens right or
    means over models, which vary less, the number of examples is the one of as many right or wrong ones (effective
    sample size, Korn & Graubard 1998), with Student's t.
    """
    from scipy.special import gammaincinv

    n, p = len(values), float(values.mean())
    if math.isnan(p):
        return p, p, p
    z, size = Z, float(n)
    spread = float(values.std(ddof=1)) ** 2 if n > 1 else 0.0
    if 0 < spread < p * (1 - p):  # of right or wrong ones it is p(1 − p)·n/(n − 1)
        z, size = student(n), n * p * (1 - p) / spread
    centre = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2)
    ends = [p - (centre - half), centre + half - p]
    for i, share in enumerate((p, 1 - p)):
        if 0 < share < 0.5 and share * size <= _FEW + 1e-9:
            ends[i] = max(ends[i], share - float(gammaincinv(share * size, 1 - LEVEL)) / size)
    return p, max(0.0, min(p, p - ends[0])), min(1.0, max(p, p + ends[1]))


def resampled_means(values: Floats, *, seed: int, resamples: int = RESAMPLES, added: float = 0.0) -> Floats:
    """Means over bootstrap samples of the examples: [points, n] → [points, resamples].

    Paired: every point is averaged over the same resampled examples, so that differences between points keep
    what they have in common (Efron & Tibshirani 1993). Among the examples are `added` ones on which every point is
    right or wrong by a coin of its own.
    """
    points, n = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((points, resamples))
    size = math.ceil(n + added)
    chances = np.append(np.full(n, 1 / (n + added)), added / (n + added)) if added else np.full(n, 1 / n)
    for start in range(0, resamples, 100):
        counts = generator.multinomial(size, chances, size=min(100, resamples - start))
        total = values @ counts[:, :n].T
        if added:
            total = total + generator.binomial(counts[:, n], 0.5, size=total.shape)
        means[:, start : start + len(counts)] = total / size
    return means


def interval(samples: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; NaN of none, and where more than UNDEFINED of them have no value.

    A correlation of few examples, say, has none in a resample whose targets are all alike: such ones are left out.
    """
    known = samples[~np.isnan(samples)]
    if not len(known) or len(known) < (1 - UNDEFINED) * len(samples):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def around(value: float, ends: tuple[float, float]) -> tuple[float, float]:
    """The ends of an interval, moved where they would leave the value out; an end that is not known stays so."""
    low, high = ends
    return low if math.isnan(low) else min(value, low), high if math.isnan(high) else max(value, high)


@dataclass(frozen=True, repr=False)
class Sampled(Brief):
    """Means of some points, with the means that bootstrap samples of the same examples would have given."""

    means: Floats
    """[points, 1]"""
    samples: Floats
    """[points, resamples]"""
    drawn: Floats | None = None
    """[points, 1]: means of what the samples were drawn from, where that is more than the examples."""

    @classmethod
    def of(
        cls,
        values: npt.NDArray[Any],
        *,
        seed: int,
        resamples: int = RESAMPLES,
        added: float | None = None,
    ) -> Sampled:
        """From values [points, examples]; all points share each resampling, so their differences are paired.

        Samples of examples of which none is wrong are all alike, as if that were certain. So to outcomes that are right
        or wrong (bool), ADDED examples are `added`, as Agresti and Coull do for one proportion and Agresti and Min
        (2005) for two paired ones; losses and shares are taken as they are.
        """
        added = (ADDED if values.dtype == np.bool_ else 0) if added is None else added
        n, numbers = values.shape[1], values.astype(np.float64)
        drawn = (numbers.sum(1, keepdims=True) + added / 2) / (n + added)
        samples = resampled_means(numbers, seed=seed, resamples=resamples, added=added)
        return cls(numbers.mean(1, keepdims=True), samples, drawn if added else None)

    def __getitem__(self, points: Sequence[int]) -> Sampled:
        return Sampled(self.means[points], self.samples[points], None if self.drawn is None else self.drawn[points])

    def with_points(self, others: Sampled) -> Sampled:
        """These points and others of the same resampling."""
        drawn = None
        if self.drawn is not None and others.drawn is not None:
            drawn = np.concatenate([self.drawn, others.drawn])
        means, samples = np.concatenate([self.means, others.means]), np.concatenate([self.samples, others.samples])
        return Sampled(means, samples, drawn)

    def estimate(self, statistic: Callable[[Floats], Floats]) -> tuple[float, float, float]:
        """A statistic of the points, [points, k] → [k]: its value, and the ends of its percentile interval."""
        value = float(statistic(self.means)[0])
        return value, *around(value, interval(statistic(self.samples)))

    def largest(self, *profiles: Callable[[Floats], Floats]) -> tuple[float, float, float]:
        """The largest row of a profile of the points, [points, k] → [rows, k]; less that of a second one, if given.

        The largest of several noisy values lies above the largest true one, and that of resampled ones higher still,
        so that their percentiles would miss it. The interval is that of errors common to all rows: the true maximum
        is at least the found one less the 97.5 % quantile of the largest resampled error, and likewise above. It
        holds the truth at least as often as it says. Of a profile of one row, it is the percentile interval.
        """
        drawn = self.means if self.drawn is None else self.drawn
        found = [(profile(self.means), profile(drawn), profile(self.samples)) for profile in profiles]
        value = sum(sign * float(means.max()) for sign, (means, _, _) in zip((1, -1), found, strict=False))
        if len(found) == 1 and len(found[0][0]) == 1:
            return value, *around(value, interval(found[0][2][0]))
        middle, over, under = 0.0, 0.0, 0.0
        for sign, (_, means, samples) in zip((1, -1), found, strict=False):
            above, below = (samples - means).max(0), (means - samples).max(0)
            middle += sign * float(means.max())
            over, under = (over + above, under + below) if sign > 0 else (over + below, under + above)
        tail = (1 + LEVEL) / 2
        ends = middle - float(np.quantile(over, tail)), middle + float(np.quantile(under, tail))
        return value, *around(value, ends)


def mean_and_spread(values: Floats) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), for numbers over seeds."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def paired_differences(first: Sets, others: Sequence[Sets], *, independent: float) -> list[Strata]:
    """For each of the others, the mean of its outcomes less the first's, and the variances that `half_of_strata` takes.

    Sets are draws (of training seeds, say), tasks are not; all sets have the same examples of a task. With
    Y_se = μ + a_s + b_e + ε_se of a set and an example, the variance of the mean over S sets and n examples is
    σ_a²/S + σ_b²/n + σ_ε²/Sn. The variance between sets has the first and the last of these in it, from so few sets
    that half of it is taken from the pair, and half from all other pairs (the interaction of the analysis of variance),
    never less than its part ε alone. Of one set, the examples alone are counted; two further ones, right or wrong at
    random, stand for those that were not seen (Agresti & Min 2005). `independent` sets are in the data: fewer than S,
    where sets share adapters.
    """
    table = np.array([[np.mean([task.mean() for task in one]) for one in sets] for sets in (first, *others)])
    found = []
    for m, sets in enumerate(others, start=1):
        pair = [[task - base for task, base in zip(*each, strict=True)] for each in zip(sets, first, strict=True)]
        common, residual = _of_examples(pair)
        strata = [(common, float(min(len(task) for task in pair[0])))]
        if len(pair) > 1 and independent > 1:
            own = float((table[m] - table[0]).var(ddof=1))
            between = [(own, independent)]
            rest = np.delete(table, m, axis=0)
            if len(rest) > 1:
                freedom = (len(rest) - 1) * (independent - 1)
                left = rest - rest.mean(0) - rest.mean(1, keepdims=True) + rest.mean()
                pooled = 2 * float((left**2).sum()) / ((len(rest) - 1) * (len(pair) - 1))
                between = [(own / 2, independent), (pooled / 2, 1 + freedom)]
            if sum(variance for variance, _ in between) < residual:
                between = [(residual, independent + strata[0][1])]
            strata += [(variance / independent, draws) for variance, draws in between]
        found.append((float((table[m] - table[0]).mean()), strata))
    return found


Sets = Sequence[Sequence[Floats]]
"""For each set and each task, the outcomes of all examples."""
Strata = tuple[float, list[tuple[float, float]]]


def _of_examples(pair: Sets) -> tuple[float, float]:
    """Of a mean over tasks: the variance that sets have in common (of one set, all), and that of one set's own ε."""
    if len({tuple(map(len, each)) for each in pair}) > 1:  # other tasks: as if the worst set's were in all of them
        return max(_of_examples([each])[0] for each in pair), 0.0
    common = residual = 0.0
    for values in (np.stack(task) for task in zip(*pair, strict=True)):
        sets, n = values.shape
        mean = values.mean(0)
        if sets == 1:
            added = 2 if np.isin(mean, (-1, 0, 1)).all() else 0  # examples, of which each is ±1 with probability 1/4
            size = n + added
            own = (float((mean**2).sum()) + added / 2 - float(mean.sum()) ** 2 / size) / size**2
            common += own / len(pair[0]) ** 2
            continue
        left = values - mean - values.mean(1, keepdims=True) + values.mean()
        of_set = float((left**2).sum()) / max(1, (sets - 1) * (n - 1)) / n
        residual += of_set / len(pair[0]) ** 2
        common += max(0.0, float(mean.var(ddof=1)) / n - of_set / sets) / len(pair[0]) ** 2
    return common, residual
