"""Games whose Shapley values are known, for tests and benches."""

import math

import numpy as np

from lora_lab.games.coalitions import all_coalitions
from lora_lab.games.gates import Diagonal


def table_game(table):
    """Worths of all coalitions, the first player as the lowest bit."""
    table = np.asarray(table, dtype=float)
    n = int(math.log2(len(table)))
    return lambda coalitions: table[coalitions @ (1 << np.arange(n))]


def saturating(n, seed=0, total=3.0):
    """v(S) = 1 − exp(−Σ a), and its values by the multilinear extension in closed form."""
    a = np.random.default_rng(seed).lognormal(0, 1, n)
    a *= total / a.sum()
    x, w = np.polynomial.legendre.leggauss(n)
    values = np.zeros(n)
    for p, share in zip((x + 1) / 2, w / 2, strict=True):
        others = 1 - p * (1 - np.exp(-a))
        values += share * (1 - np.exp(-a)) * others.prod() / others
    return (lambda coalitions: 1 - np.exp(-(coalitions @ a))), values


class Multilinear:
    """A game in a table whose gates are Owen's multilinear extension of that game, or of another one."""

    def __init__(self, table, gates=None):
        self.table = np.asarray(table if gates is None else gates, dtype=float)
        self.game = table_game(table)
        self.every = all_coalitions(int(math.log2(len(self.table))))

    def __call__(self, coalitions):
        return self.game(coalitions)

    def along(self, places, shares, **options):
        n, size = self.every.shape[1], self.every.sum(1)
        chances = np.array([place**size * (1 - place) ** (n - size) for place in places])
        # ∂f/∂g_i = Σ_S P(S) v(S) (1_S(i)/t − (1 − 1_S(i))/(1 − t))
        scores = [self.every / place - ~self.every / (1 - place) for place in places]
        slopes = np.array([(chance * self.table) @ score for chance, score in zip(chances, scores, strict=True)])
        return Diagonal(places, shares, chances @ self.table, slopes, self.table[[0, -1]])
