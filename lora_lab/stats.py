"""Intervals for numbers that come from samples of examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
Z = 1.959964
"""Half width of a 95 % interval in standard errors, for means over many examples."""


def student(draws: float) -> float:
    """The same for means over few draws, whose standard errors are no more certain (Student's t, draws − 1)."""
    return float(stdtrit(draws - 1, (1 + LEVEL) / 2))


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
    """The percentile interval of bootstrap samples."""
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


def mean_and_spread(values: Floats) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), for numbers over seeds."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
