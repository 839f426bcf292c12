"""What gates on the diagonal say of every coalition: the worth's Taylor expansion about the nearest equal gates.

    h(S) = mean_e ω(f_e(t·1) + Σ_i (1_S(i) − t) ∂_i f_e(t·1)),   t = Σ_{i∈S} q_i,   q_i ∝ mean_e |AS_ei|

over the examples e: AS_ei are their Aumann–Shapley values, ω what makes a worth of a number (right of a margin). Where
only means are known, they are taken for one example. With slopes proportional to q everywhere it is the link game.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.polynomial import polynomial

from lora_lab.games.coalitions import Bools, every_coalition
from lora_lab.games.gates import Control, Diagonal, Rows, curve_through
from lora_lab.games.regression import fit_pairs, regression
from lora_lab.results.stats import Floats

_LISTED = 14
_PAIRS = 8192
_NUMBERS = 2**22
"""Numbers of coalitions by examples that are held at once."""


class Expansion:
    """The game h, between the worths of nobody and of all."""

    def __init__(self, along: Diagonal, ends: Floats) -> None:
        rows = along.rows
        if rows is None:
            rows = Rows(along.worths[:, None], along.slopes[:, None], along.ends[:, None])
        shares = np.abs(np.einsum("k,kei->ei", along.shares, rows.slopes)).mean(0)
        n, total = len(shares), float(shares.sum())
        self._at = shares / total if total > 0 else np.full(n, 1 / n)
        self._by_example = _Expanded(along.gates, rows, self._at)
        self._of_means = None if rows.finish else _Expanded(along.gates, _mean_of(rows), self._at)
        self._low, self._first, self._stretch = 0.0, 0.0, 1.0
        low, high = self(np.array([[False] * n, [True] * n]))
        self._low, self._first = low, ends[0]
        self._stretch = (ends[1] - ends[0]) / (high - low) if high != low else 1.0

    def __call__(self, coalitions: Bools) -> Floats:
        """Worths, [m]."""
        found = [self.rows(part, self._of_means).mean(1) for part in self.cut(coalitions)]
        return np.concatenate(found) if found else np.zeros(0)

    def rows(self, coalitions: Bools, of: _Expanded | None = None) -> Floats:
        """Worths by example, [m, examples]."""
        return self._first + self._stretch * ((of or self._by_example)(coalitions) - self._low)

    def cut(self, coalitions: Bools) -> list[Bools]:
        """Pieces of which the numbers of all examples can be held."""
        size = max(1, _NUMBERS // (self._of_means or self._by_example).examples)
        return [coalitions[start : start + size] for start in range(0, len(coalitions), size)]

    def weighed(self, coalitions: Bools, weights: Floats) -> Floats:
        """Σ_S w_iS h_e(S) of every example, [n, examples]."""
        size = max(1, _NUMBERS // self._by_example.examples)
        total = np.zeros((len(weights), self._by_example.examples))
        for start in range(0, len(coalitions), size):
            total += weights[:, start : start + size] @ self.rows(coalitions[start : start + size])
        return total


class _Expanded:
    """Every example's own worth, by the polynomial along the diagonal and slopes interpolated between the nodes."""

    def __init__(self, gates: Floats, rows: Rows, at: Floats) -> None:
        self._at, self._finish = at, rows.finish or (lambda numbers: numbers)
        self._curve = curve_through(gates, rows.worths, rows.slopes.sum(2), rows.ends)
        # Lagrange: the slope at t is Σ_k c_jk tʲ slope_k
        self._lagrange = np.linalg.inv(polynomial.polyvander(gates, len(gates) - 1))
        self._slopes = rows.slopes
        self.examples = rows.slopes.shape[1]

    def __call__(self, coalitions: Bools) -> Floats:
        t = coalitions @ self._at
        found = self._curve(t)
        shares = polynomial.polyvander(t, len(self._slopes) - 1) @ self._lagrange
        for share, slopes in zip(shares.T, self._slopes, strict=True):
            found += ((coalitions - t[:, None]) * share[:, None]) @ slopes.T
        return self._finish(found)


def _mean_of(rows: Rows) -> Rows:
    return Rows(rows.worths.mean(1)[:, None], rows.slopes.mean(1)[:, None], rows.ends.mean(1)[:, None])


def expansion(along: Diagonal, ends: Floats, linked: Control) -> Control:
    """The game h with its Shapley values: of all coalitions up to 14 players, else those of the link game and of the
    rest, by a fit to 8,192 pairs.
    """
    game = Expansion(along, ends)
    n = along.slopes.shape[1]
    if n <= _LISTED:
        every = every_coalition(n)
        coalitions, weights = every.coalitions, every.weights
        values, se = weights @ game(coalitions), np.zeros(n)
    else:
        drawn = itertools.islice(regression(n, np.random.default_rng(0)), _PAIRS + 1)
        asked = np.concatenate([draw.coalitions for draw in drawn])
        fitted = fit_pairs(asked, game(asked) - linked.game(asked))
        assert fitted is not None
        coalitions, weights = fitted.coalitions, fitted.weights
        values, se = linked.values + fitted.values, np.hypot(linked.se, fitted.se)

    def by_example(others: Bools, taken: Floats) -> Floats:
        return game.weighed(coalitions, weights) - game.weighed(others, taken)

    return Control(game, values, se, by_example=by_example if along.rows else None)
