"""Shapley values by a regression on pairs of complements: which pairs to ask for, and the fit to their worths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.games.coalitions import Bools, Draw, Estimate
from lora_lab.results.stats import Floats

_RIDGE = 0.01  # per player, on features of unit size: enough to hold 2n unknowns to n pairs, little beside 10n
_FEW = 4096  # coalitions of one size that are listed rather than drawn until a new one comes


def regression(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Pairs of a coalition and its complement, sizes drawn evenly (leverage scores, Musco & Witter 2025), none twice.

    The values come from one fit to all pairs, see `fit_pairs`; a draw alone carries no weights. The first has the empty
    and the full coalition. An order of n players asks for n − 1 others, so that a pair counts as 2 / (n − 1) of one.
    """
    yield Draw(np.array([[False] * n, [True] * n]), np.zeros((n, 2)), 0)
    left = {k: _pairs_of(n, k) for k in range(1, n // 2 + 1)}
    rest: dict[int, list[npt.NDArray[Any]]] = {}
    seen: set[bytes] = set()
    while any(left.values()):
        for size in generator.permutation(np.arange(1, n)):
            k = min(int(size), n - int(size))
            if not left[k]:
                continue
            if k not in rest and math.comb(n, k) <= _FEW:
                every = list(itertools.combinations(range(n), k))
                rest[k] = [np.array(every[i]) for i in generator.permutation(len(every))]
            coalition = np.zeros(n, dtype=np.bool_)
            while coalition.tobytes() in seen or not coalition.any():
                coalition[:] = False
                coalition[rest[k].pop() if k in rest else generator.permutation(n)[:k]] = True
            left[k] -= 1
            seen |= {coalition.tobytes(), (~coalition).tobytes()}
            yield Draw(np.stack([coalition, ~coalition]), np.zeros((n, 2)), Fraction(2, n - 1))


def fit_pairs(coalitions: Bools, worths: Floats) -> Estimate | None:
    """Values from all pairs of complements among the coalitions, by one weighted least-squares fit.

    Shapley values hang only on o(S) = (v(S) − v(N∖S))/2. It is fitted by Σ z_i (b_i + c_i s²) + d₁s + d₃s³ + d₅s⁵ with
    z_i = ±1 for in or out and s the mean of the z_i: what a player adds may change with how many are there, as it
    does wherever a worth saturates. The values of the fit are known in closed form. The weights are the Shapley
    kernel over each size's share of coalitions seen; the linear terms carry next to no penalty, so with all pairs
    the values are exact whatever the game (Witter et al. 2025 adjust by other models). Standard errors are
    those of a sandwich estimator (HC3) with a finite-population correction, NaN from fewer than 2n pairs. None where
    there are fewer pairs than players.
    """
    n = coalitions.shape[1]
    index = {row.tobytes(): i for i, row in enumerate(coalitions)}
    size = coalitions.sum(1)
    partners = [index.get((~row).tobytes()) for row in coalitions]
    pairs = [  # each once, the smaller coalition first; the empty and the full one are not fitted but kept to
        (i, j)
        for i, j in enumerate(partners)
        if j is not None and size[i] > 0 and (size[i], i) < (size[j], j) and np.isfinite(worths[[i, j]]).all()
    ]
    ends = [index.get(np.full(n, on).tobytes()) for on in (True, False)]
    if n < 2 or len(pairs) < min(n, 2 ** (n - 1) - 1) or None in ends or not np.isfinite(worths[ends]).all():  # type: ignore[index]
        return None
    smaller, larger = np.array(pairs).T
    k = size[smaller]
    seen = np.bincount(k, minlength=n)[k] / np.array([float(_pairs_of(n, int(count))) for count in k])
    odd, odd_of_all = (worths[smaller] - worths[larger]) / 2, float(worths[ends[0]] - worths[ends[1]]) / 2
    L, se = _solved(coalitions[smaller], odd, odd_of_all, seen)
    weights = np.zeros((n, len(coalitions)))
    weights[:, smaller], weights[:, larger] = L[:, :-1] / 2, -L[:, :-1] / 2
    weights[:, ends[0]], weights[:, ends[1]] = L[:, -1] / 2, -L[:, -1] / 2
    used = np.flatnonzero(weights.any(0))
    values = weights @ np.where(weights.any(0), worths, 0)
    return Estimate("regression", values, se, coalitions[used], weights[:, used], worths[used], len(k))


def _solved(coalitions: Bools, odd: Floats, odd_of_all: float, seen: Floats) -> tuple[Floats, Floats]:
    """What the values take of each o(S) and of o(N), [n, pairs + 1], and their standard errors.

    The fit is β = argmin Σ wₛ (o(S) − aₛβ)² + Σ λⱼβⱼ², wₛ = (n − 1) / (C(n, k) k (n − k)) / seenₖ for |S| = k, with
    o(N) as one more row of a weight that makes it hold; the values are Bᵀβ, B those of each feature.
    """
    n, k = coalitions.shape[1], coalitions.sum(1)
    kernel = np.array([(n - 1) / (float(math.comb(n, int(count))) * count * (n - count)) for count in k]) / seen
    A, B = _design(coalitions, n)
    top = _design(np.ones((1, n), np.bool_), n)[0]
    kernel = kernel / kernel.mean()
    A, weight = np.vstack([A, top]), np.append(kernel, 1e4 * len(k))
    scale = np.sqrt((A * A).mean(0)).clip(min=1e-12)
    penalty = np.concatenate([np.full(n, 1e-9), np.full(n, _RIDGE * n), np.full(A.shape[1] - 2 * n, 1e-9)])
    X = A / scale
    root = np.sqrt(weight)
    solve = np.linalg.pinv(np.vstack([X * root[:, None], np.diag(np.sqrt(penalty))]))[:, : len(X)] * root
    L = (B.T / scale) @ solve
    L[:, -1] += (2 - L[:, -1].sum()) / n  # efficiency to the last digit: Σφ = 2 o(N)
    L[:, :-1] -= L[:, :-1].sum(0) / n
    # HC3: Var φ = Σ Lₛ² (eₛ / (1 − hₛ))² (1 − seen), e the residuals, h the leverages
    residual = odd - A[:-1] @ ((solve @ np.append(odd, odd_of_all)) / scale)
    leverage = np.einsum("ij,ji->i", X[:-1], solve[:, :-1])
    se = np.sqrt(((L[:, :-1] * (residual / (1 - leverage).clip(min=0.05))) ** 2 * (1 - seen)).sum(1))
    if len(k) < 2 * n and (seen < 1).any():  # fewer pairs than features leave no residual to judge by
        se = np.full(n, np.nan)
    return L, se


def _pairs_of(n: int, k: int) -> int:
    """Pairs of complements whose smaller half has k players."""
    return math.comb(n, k) // (2 if 2 * k == n else 1)


def _design(coalitions: Bools, n: int) -> tuple[Floats, Floats]:
    """Features [m, f] of o(S), and the Shapley values [f, n] of each feature."""
    z = 2.0 * coalitions - 1
    s = z.mean(1, keepdims=True)
    features = np.hstack([z / 2, z * s**2, s, s**3, s**5])
    even = ((2 * np.arange(n + 1) - n) / n) ** 2
    itself = float(np.mean(even[:-1] + even[1:]))  # of z_i s²: for i itself, and by efficiency for the others
    other = (2 * even[-1] - itself) / max(1, n - 1)
    values = np.vstack([np.eye(n), np.full((n, n), other) + (itself - other) * np.eye(n), np.full((3, n), 2 / n)])
    return features, values
