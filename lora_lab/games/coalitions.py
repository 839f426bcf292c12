"""Coalitions to ask for, and how to weigh their worths for Shapley values. No torch in here.

φ_i = Σ over orders of i's marginal contribution / n! = ∫₀¹ E[v(R_p ∪ i) − v(R_p)] dp, R_p holding every other player
with probability p (Owen 1972). Every estimator is linear in the worths, φ̂ = W v, so an `Estimate` carries W: that
gives values by example, and intervals over examples, for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.brief import Brief
from lora_lab.errors import OptionError, unknown
from lora_lab.results.stats import Floats

Bools = npt.NDArray[np.bool_]
Game = Callable[[Bools], Floats]
"""Coalitions bool [m, n] → worths [m]; NaN where there is none."""

EXACT_LIMIT = 20
"""Players up to which all coalitions can be enumerated."""


@dataclass(frozen=True, repr=False)
class Draw(Brief):
    """One independent, unbiased guess of all values: φ̂ = weights @ v(coalitions)."""

    coalitions: Bools
    """[m, n]"""
    weights: Floats
    """[n, m]"""
    marginals: float | Fraction
    """Marginal contributions of each player that are averaged, or as many as would ask for as many coalitions."""


@dataclass(frozen=True, repr=False)
class Estimate(Brief):
    """Shapley values, or an approximation of them with its standard errors."""

    estimator: str
    values: Floats
    """[n]"""
    se: Floats
    """[n]; of the choice of coalitions, not of the examples: 0 for exact values, NaN where one draw tells nothing.

    The 95 % interval is `student(draws)` of them wide to each side; where all draws gave a player the same, see
    `stats.mean_and_error`.
    """
    coalitions: Bools
    """[m, n], every coalition once."""
    weights: Floats
    """[n, m]: values = weights @ worths, and `known` besides where it is there."""
    worths: Floats
    """[m]"""
    draws: int
    trace: list[dict[str, Any]] = field(default_factory=list)
    """How values and standard errors developed: rows of evaluations, values, se."""
    bias: str | None = None
    """What makes the estimator biased, if anything does."""
    known: Floats | None = None
    """[n]: values = known + weights @ worths, of an estimator that starts from what gates tell (see gates.py)."""
    known_of: Floats | None = None
    """[n, examples]: the same of every example; None where it is not known."""

    @property
    def efficiency_gap(self) -> float:
        """|Σφ − (v(N) − v(∅))|; NaN where one of the two is not among the coalitions."""
        sizes = self.coalitions.sum(1)
        full, empty = self.worths[sizes == self.coalitions.shape[1]], self.worths[sizes == 0]
        if not len(full) or not len(empty):
            return math.nan
        return float(abs(self.values.sum() - (full[0] - empty[0])))


def all_coalitions(n: int) -> Bools:
    """The 2^n coalitions; row i holds the binary digits of i, the first player as the lowest."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.bool_)


def every_coalition(n: int) -> Draw:
    """All 2^n coalitions, φ_i = Σ_S |S|! (n − |S| − 1)! / n! (v(S ∪ i) − v(S)) over the S without i."""
    if n > EXACT_LIMIT:
        raise OptionError(
            f"2^{n} coalitions are too many to enumerate (at most 2^{EXACT_LIMIT}); draws of them can be asked for"
        )
    coalitions = all_coalitions(n)
    size = coalitions.sum(1)
    share = np.array([1 / (n * math.comb(n - 1, k)) for k in range(n)])  # of the S of k players
    joined = share[np.maximum(size - 1, 0)][:, None] * coalitions
    stayed = share[np.minimum(size, n - 1)][:, None] * ~coalitions
    return Draw(coalitions, (joined - stayed).T, 2 ** (n - 1))


def permutation(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Random orders: everybody's marginal contribution on joining those before (Castro et al. 2009)."""
    while True:
        yield orders([generator.permutation(n)])


def antithetic(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Random orders, each with its reverse, whose errors partly cancel."""
    while True:
        order = generator.permutation(n)
        yield orders([order, order[::-1]])


def stratified(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """A random order and all its rotations: everybody stands once in every place, so the places need no sampling."""
    while True:
        order = generator.permutation(n)
        yield orders([np.roll(order, shift) for shift in range(n)])


def owen(n: int, generator: np.random.Generator, *, nodes: int = 0, grid: str = "gauss") -> Iterator[Draw]:
    """The multilinear extension, ∫ E[v(R_p ∪ i) − v(R_p)] dp over a grid of p, in antithetic halves.

    After Okhrati & Lipani 2020. `gauss`: Gauss–Legendre with ⌈n/2⌉ nodes (`nodes` = 0) has no error in p; fewer have.
    `trapezoid` always has one. At each p, R_p and its complement (which is R_{1−p}) are used.
    """
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    if nodes < 0:
        raise OptionError(f"{nodes} nodes; at least 1 is needed, or 0 for ⌈n/2⌉")
    chances, shares = GRIDS[grid](nodes or -(-n // 2))  # ∫₀¹ f(p) dp ≈ Σ shareₖ f(chanceₖ)
    while True:
        yield join([_multilinear(generator.random(n) < p, share) for p, share in zip(chances, shares, strict=True)])


def owen_bias(n: int, options: Mapping[str, Any]) -> str | None:
    """What makes `owen` biased with these options; of degree n − 1 in p, the integrand needs ⌈n/2⌉ nodes of Gauss."""
    nodes, needed = options.get("nodes") or -(-n // 2), -(-n // 2)
    if options.get("grid", "gauss") == "gauss" and nodes >= needed:
        return None
    return f"the grid of {nodes} probabilities; grid=gauss with {needed} nodes has none"


def _gauss(count: int) -> tuple[Floats, Floats]:
    x, w = np.polynomial.legendre.leggauss(count)  # on [−1, 1]
    return (x + 1) / 2, w / 2


def _trapezoid(count: int) -> tuple[Floats, Floats]:
    chances = np.linspace(0, 1, max(2, count))
    shares = np.full(len(chances), 1 / (len(chances) - 1))
    shares[[0, -1]] /= 2
    return chances, shares


GRIDS = {"gauss": _gauss, "trapezoid": _trapezoid}
"""Number of nodes → probabilities in [0, 1], and the share of the integral that each stands for."""


def orders(along: Sequence[npt.NDArray[Any]]) -> Draw:
    """Marginal contributions along orders, averaged."""
    n = len(along[0])
    return join([_along(order, n, 1 / len(along)) for order in along])


def _along(order: npt.NDArray[Any], n: int, share: float) -> Draw:
    coalitions = np.zeros((n + 1, n), dtype=np.bool_)
    weights = np.zeros((n, n + 1))
    for before, player in enumerate(order):  # how many join before: coalition number `before` is what they are
        coalitions[before + 1 :, player] = True
        weights[player, before : before + 2] = -share, share
    return Draw(coalitions, weights, 1)


def _multilinear(base: Bools, share: float) -> Draw:
    """Every player's marginal contribution to R and to R's complement, weighed half of `share` each."""
    n = len(base)
    rows, weights = [], []
    for half in (base, ~base):
        for player in range(n):
            for on, sign in ((True, 1), (False, -1)):
                row = half.copy()
                row[player] = on
                rows.append(row)
                weights.append(sign * share / 2 * (np.arange(n) == player))
    return Draw(np.array(rows), np.array(weights).T, 2)


def join(draws: list[Draw]) -> Draw:
    """One draw of several, every coalition once."""
    coalitions = np.concatenate([draw.coalitions for draw in draws])
    unique, inverse = np.unique(coalitions, axis=0, return_inverse=True)
    weights = np.zeros((coalitions.shape[1], len(unique)))
    np.add.at(weights.T, inverse.ravel(), np.concatenate([draw.weights for draw in draws], axis=1).T)
    return Draw(unique, weights, sum(draw.marginals for draw in draws))
