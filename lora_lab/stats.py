"""Intervals for numbers that come from samples of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
Z = 1.959964
"""Half width of a 95 % interval in standard errors, for means over many examples."""


def student(draws: float) -> float:
    """The same for means over few draws, whose standard errors are no more certain (Student's t, draws − 1)."""
    from scipy.special import stdtrit  # which figures, drawn from results alone, have no need of

    return float(stdtrit(draws - 1, (1 + LEVEL) / 2))


def half_width(draws: Floats) -> float:
    """Half width of the 95 % interval of a mean over few draws; 0 for one alone, which tells nothing of it."""
    n = len(draws)
    return student(n) * float(draws.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def resampled_means(values: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Means over bootstrap samples of the examples: [points, n] → [points, resamples].

    Paired: every point is averaged over the same resampled examples, so that differences between points keep
    what they have in common (Efron & Tibshirani 1993).
    """
    points, n = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((points, resamples))
    for start in range(0, resamples, 100):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(100, resamples - start))
        means[:, start : start + len(counts)] = values @ counts.T / n
    return means


def interval(samples: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; NaN of none."""
    if not len(samples):
        return math.nan, math.nan
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Sampled:
    """Means of some points, with the means that bootstrap samples of the same examples would have given."""

    means: Floats
    """[points, 1]"""
    samples: Floats
    """[points, resamples]"""

    @classmethod
    def of(cls, values: Floats, *, seed: int, resamples: int = RESAMPLES) -> Sampled:
        """From values [points, examples]; all points share each resampling, so their differences are paired."""
        return cls(values.mean(1, keepdims=True), resampled_means(values, seed=seed, resamples=resamples))

    def __getitem__(self, points: Sequence[int]) -> Sampled:
        return Sampled(self.means[points], self.samples[points])

    def estimate(self, statistic: Callable[[Floats], Floats]) -> tuple[float, float, float]:
        """A statistic of the points, [points, k] → [k]: its value, and the ends of its percentile interval."""
        return float(statistic(self.means)[0]), *interval(statistic(self.samples))

    def largest(self, *profiles: Callable[[Floats], Floats]) -> tuple[float, float, float]:
        """The largest row of a profile of the points, [points, k] → [rows, k]; less that of a second one, if given.

        The largest of several noisy values lies above the largest true one, and that of resampled ones higher still,
        so that their percentiles would miss it. The interval is that of errors common to all rows: the true maximum
        is at least the found one less the 97.5 % quantile of the largest resampled error, and likewise above. It
        holds the truth at least as often as it says. Of a profile of one row, it is the percentile interval.
        """
        found = [(profile(self.means), profile(self.samples)) for profile in profiles]
        if len(found) == 1 and len(found[0][0]) == 1:
            return float(found[0][0][0, 0]), *interval(found[0][1][0])
        value, over, under = 0.0, 0.0, 0.0
        for sign, (means, samples) in zip((1, -1), found, strict=False):
            above, below = (samples - means).max(0), (means - samples).max(0)
            value += sign * float(means.max())
            over, under = (over + above, under + below) if sign > 0 else (over + below, under + above)
        tail = (1 + LEVEL) / 2
        return value, value - float(np.quantile(over, tail)), value + float(np.quantile(under, tail))


def mean_and_spread(values: Floats) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), for numbers over seeds."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
