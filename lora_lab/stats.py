"""Intervals for numbers that come from samples of examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95


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


def bootstrap(
    values: Floats, statistic: Callable[[Floats], Floats], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """A statistic of the points' means, [points, k] → [k], with its paired percentile interval."""
    point = float(statistic(values.mean(1, keepdims=True))[0])
    return point, *interval(statistic(resampled_means(values, seed=seed, resamples=resamples)))


def mean_and_spread(values: Floats) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), for numbers over seeds."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
