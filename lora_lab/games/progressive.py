"""Both sides of CoTo's progressive-optimisation inequality from sampled keep-sets (arXiv:2506.05713, Theorem 3.1).

With a mask δ of active players, of which all with equally many are equally likely, and a loss ℓ convex in the outputs,

    E_δ[ℓ(ŷ)] = Σ_j P(j) E[ℓ(ŷ) | j active] ≥ Σ_j P(j) ℓ(ỹ_j),    ỹ_j the mean output with j players active,

by Jensen's inequality for each j. LAWS are the P(j) that are offered; the theorem is about masks as CoTo draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.brief import Brief
from lora_lab.results.stats import Floats, half_of_strata, half_width


def binomial(n: int, p: float) -> Floats:
    """Probabilities of 0 … n players being on, each with probability p."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def conditional(n: int, p: float) -> Floats:
    """The same given that at least one is on; at p = 0 the limit, exactly one."""
    chances = binomial(n, p)
    chances[0], chances[1] = 0.0, chances[1] if p > 0 else 1.0
    found: Floats = chances / chances.sum()
    return found


LAWS: dict[str, Callable[[int, float], Floats]] = {"at least one": conditional, "independent": binomial}
"""Law of the masks → function (players, p) → probabilities of 0 … n active ones.

at least one: as CoTo draws its masks in training, j = 1 … G and divided by 1 − (1 − p)^G: the law of the theorem.
independent: a coin for every player and nothing else, so that j = 0 is among them: the law of the p-curve.
"""


@dataclass(frozen=True, repr=False)
class Stratum(Brief):
    """What the keep-sets of one size say of the sides and of their difference."""

    by_example: Mapping[str, Floats]
    """left, right, gap → [examples]."""
    variance: Mapping[str, float]
    """left, right, gap → variance of the mean over examples that comes from the choice of keep-sets."""
    draws: int
    of: int
    """Keep-sets that there are of this size."""


def stratum(logits: Sequence[npt.NDArray[Any]], labels: npt.NDArray[np.int64], of: int) -> Stratum:
    """From the logits [examples, labels] of m different keep-sets of one size, of which there are `of`.

    The loss of the mean of m outputs lies above that of the mean of all by about c·(1/m − 1/of), so that the gap seen
    is (m − 1)/m of the true one where many more could have been drawn. What leaving out each keep-set in turn changes
    tells c (jackknife, Quenouille 1956), and its pseudo-values tell the variance (Tukey 1958). A gap of one keep-set
    out of several is NaN.
    """
    m = len(logits)
    total: Floats = np.stack(logits).sum(0, dtype=np.float64)
    left = np.stack([cross_entropy(each, labels) for each in logits])
    gap = left.mean(0) - cross_entropy(total / m, labels)
    variance = dict.fromkeys(("left", "right", "gap"), 0.0)
    if m < of and m > 1:
        less = [cross_entropy((total - each) / (m - 1), labels) for each in logits]
        without = (left.sum(0) - left) / (m - 1) - np.stack(less)
        pseudo = m * gap.mean() - (m - 1) * without.mean(1)
        gap = gap + (m - 1) * (1 - m / of) * (gap - without.mean(0))
        values = {"left": left.mean(1), "right": left.mean(1) - pseudo, "gap": pseudo}
        variance = {name: float(each.var(ddof=1)) / m * (1 - m / of) for name, each in values.items()}
    elif m < of:
        gap, variance = np.full_like(gap, np.nan), dict.fromkeys(variance, math.nan)
    by_example = {"left": left.mean(0), "right": left.mean(0) - gap, "gap": gap}
    return Stratum(by_example, variance, m, of)


def inequality(strata: Mapping[int, Stratum], n: int, grid: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A row for every law and probability: left, right and gap, each with the ends of its 95 % interval.

    The interval is for the choice of keep-sets (Student's t, Satterthwaite's degrees of freedom) and of examples
    together. Sizes without a keep-set (their losses are not finite) are left out, and the others weighed up to 1; the
    row then says which share of the law they have (`covered`). A law that gives no chance to any size that there is
    has no row.
    """
    sizes = sorted(strata)
    for law, chances in LAWS.items():
        for p in grid:
            every = chances(n, p)
            covered = float(every[sizes].sum())
            if not covered:
                continue
            weights = {k: float(every[k]) / covered for k in sizes if every[k] > 0}
            row: dict[str, Any] = {"law": law, "p": p, "covered": covered}
            for name in ("left", "right", "gap"):
                values = np.sum([weight * strata[k].by_example[name] for k, weight in weights.items()], axis=0)
                parts = [(w * w * strata[k].variance[name], strata[k].draws) for k, w in weights.items()]
                value, half = float(values.mean()), math.hypot(half_of_strata(parts), half_width(values))
                row |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
            for name in ("left", "right"):  # losses are not negative
                row[f"{name}_low"] = row[f"{name}_low"] if math.isnan(row[name]) else max(0.0, row[f"{name}_low"])
            yield row


def cross_entropy(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Floats:
    """−log softmax(logits)[label] of each example, in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(1, keepdims=True)
    log_total = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    right: Floats = log_total - logits[np.arange(len(labels)), labels]
    return right
