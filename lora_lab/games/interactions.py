"""Pairwise Shapley interactions of a game, exact from all coalitions or sampled along random orders. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_lab.brief import Brief
from lora_lab.errors import OptionError
from lora_lab.games.coalitions import EXACT_LIMIT, Bools, Game, all_coalitions
from lora_lab.results.stats import Floats, mean_and_error, student


@dataclass(frozen=True, repr=False)
class Interactions(Brief):
    """Interactions of all pairs of n players, [n, n] each, symmetric, the diagonal 0."""

    values: Floats
    se: Floats
    """Standard errors of the choice of coalitions: 0 for exact values, NaN for pairs met less than twice."""
    half: Floats
    """Half widths of the 95 % intervals (Student's t over the orders in which the two were neighbours)."""


def interactions(game: Game, n: int, *, samples: int = 200, seed: int = 0, every: bool = False) -> Interactions:
    """Pairwise Shapley interactions with their standard errors and intervals.

    I_ij = mean over places and sets before of v(S∪ij) − v(S∪i) − v(S∪j) + v(S) (Grabisch & Roubens 1999): above 0 the
    two help more together than apart. With `every` coalition exact; else from `samples` random orders, in each of
    which neighbours i, j are looked at with all before them as S. A pair is met about 2·samples/n times; see
    `stats.mean_and_error` for pairs of which that gave the same every time.
    """
    nothing = np.zeros((n, n))
    if n < 2:
        return Interactions(nothing, nothing, nothing)
    if every:
        return Interactions(_exact(game, n), nothing, nothing)
    worths = game(interaction_coalitions(n, samples=samples, seed=seed)).reshape(samples, n - 1, 4)
    second = worths[:, :, 0] - worths[:, :, 1] - worths[:, :, 2] + worths[:, :, 3]
    met = np.full((samples, n, n), np.nan)
    for number, order in enumerate(_orders_of(n, samples, seed)):
        met[number, order[:-1], order[1:]] = met[number, order[1:], order[:-1]] = second[number]
    reach = float(np.ptp(worths[np.isfinite(worths)])) if np.isfinite(worths).any() else 0.0
    values, se = (part.reshape(n, n) for part in mean_and_error(met.reshape(samples, -1), reach=reach))
    times = np.isfinite(met).sum(0)
    widths = np.array([math.nan, math.nan, *(student(count) for count in range(2, times.max() + 1))])
    half = widths[times] * se
    for each in (values, se, half):
        np.fill_diagonal(each, 0)
    return Interactions(values, se, half)


def interaction_coalitions(n: int, *, samples: int, seed: int = 0) -> Bools:
    """The coalitions that sampled `interactions` ask for, four for every two neighbours of every order."""
    return np.concatenate([_neighbours(order) for order in _orders_of(n, samples, seed)])


def _orders_of(n: int, samples: int, seed: int) -> list[npt.NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    return [generator.permutation(n) for _ in range(samples)]


def _neighbours(order: npt.NDArray[np.int64]) -> Bools:
    """For each two neighbours i, j of an order, after all before them: with both, with i, with j, with neither."""
    n = len(order)
    rows = np.zeros((n - 1, 4, n), dtype=np.bool_)
    for place in range(n - 1):
        rows[place][:, order[:place]] = True
        rows[place, [0, 1], order[place]] = True
        rows[place, [0, 2], order[place + 1]] = True
    return rows.reshape(-1, n)


def _exact(game: Game, n: int) -> Floats:
    if n > EXACT_LIMIT:
        raise OptionError(f"2^{n} coalitions are too many to enumerate (at most 2^{EXACT_LIMIT})")
    ids, coalitions = np.arange(2**n), all_coalitions(n)
    worths, size = game(coalitions), coalitions.sum(1)
    share = np.array([1 / ((n - 1) * math.comb(n - 2, k)) for k in range(n - 1)])
    found = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            S = ids[~coalitions[:, i] & ~coalitions[:, j]]
            a, b = 1 << i, 1 << j
            second = worths[S | a | b] - worths[S | a] - worths[S | b] + worths[S]
            found[i, j] = found[j, i] = float(share[size[S]] @ second)
    return found
