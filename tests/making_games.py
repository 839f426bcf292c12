"""Games whose Shapley values are known, for tests and benches."""

import math

import numpy as np


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
