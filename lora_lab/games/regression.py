"""Shapley values by a regression on pairs of complements: which pairs to ask for, and the fit to their worths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.brief import Brief
from lora_lab.games.coalitions import Bools, Draw, Estimate
from lora_lab.results.stats import Floats

_RIDGE = 0.01  # per player, on features of unit size: enough to hold 2n unknowns to n pairs, little beside 10n
_TRIES = 8  # pairs to choose one from
_FEW = 4096  # coalitions of one size that are listed rather than drawn until a new one comes


def regression(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Pairs of a coalition and its complement, sizes drawn evenly (leverage scores, Musco & Witter 2025), none twice.

    The values come from one fit to all pairs, see `fit_pairs`; a draw alone carries no weights. The first has the empty
    and the full coalition. An order of n players asks for n − 1 others, so that a pair counts as 2 / (n − 1) of one.
    """
    return _pairs(n, generator, tries=1)


def balanced(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Pairs as `regression` draws them, each of the first 4n the least foreseen one of eight by those before.

    Least foreseen is the largest leverage zᵀ(ZᵀZ + I/100)⁻¹z, z = ±1 for in or out: the columns of so few pairs come
    out nearly orthogonal, as those of an experiment that is planned.
    """
    return _pairs(n, generator, tries=_TRIES)


def _pairs(n: int, generator: np.random.Generator, *, tries: int) -> Iterator[Draw]:
    yield Draw(np.array([[False] * n, [True] * n]), np.zeros((n, 2)), 0)
    left = {k: pairs_of(n, k) for k in range(1, n // 2 + 1)}
    rest: dict[int, list[npt.NDArray[Any]]] = {}
    seen: set[bytes] = set()
    inverse, drawn = 100.0 * np.eye(n), 0
    while any(left.values()):
        for size in generator.permutation(np.arange(1, n)):
            k = min(int(size), n - int(size))
            if not left[k]:
                continue
            if k not in rest and math.comb(n, k) <= _FEW:
                every = list(itertools.combinations(range(n), k))
                rest[k] = [np.array(every[i]) for i in generator.permutation(len(every))]
            count = min(left[k], tries if drawn < 4 * n else 1)
            found = _unseen(n, k, generator, rest.get(k), seen, count)
            z = 2.0 * np.array(found) - 1
            best = int(np.einsum("ti,ij,tj->t", z, inverse, z).argmax()) if count > 1 else 0
            if count > 1:  # Sherman–Morrison: (G + zzᵀ)⁻¹ = G⁻¹ − G⁻¹z zᵀG⁻¹ / (1 + zᵀG⁻¹z)
                foreseen = inverse @ z[best]
                inverse -= np.outer(foreseen, foreseen) / (1 + z[best] @ foreseen)
            coalition = found.pop(best)
            if k in rest:
                rest[k] += [np.flatnonzero(other) for other in found]
            left[k] -= 1
            drawn += 1
            seen |= {coalition.tobytes(), (~coalition).tobytes()}
            yield Draw(np.stack([coalition, ~coalition]), np.zeros((n, 2)), Fraction(2, n - 1))


def _unseen(
    n: int,
    k: int,
    generator: np.random.Generator,
    listed: list[npt.NDArray[Any]] | None,
    seen: set[bytes],
    count: int,
) -> list[Bools]:
    """So many different coalitions of k players of which no pair was drawn, taken from a list where there is one."""
    found: dict[bytes, Bools] = {}
    while len(found) < count:
        coalition = np.zeros(n, dtype=np.bool_)
        coalition[listed.pop() if listed is not None else generator.permutation(n)[:k]] = True
        if coalition.tobytes() not in seen and (2 * k < n or (~coalition).tobytes() not in found):
            found[coalition.tobytes()] = coalition
    return list(found.values())


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
    pairs = pairs_among(coalitions, worths)
    if pairs is None or n < 2 or len(pairs.one) < min(n, 2 ** (n - 1) - 1):
        return None
    L, se = _solved(coalitions[pairs.one], pairs.odd, pairs.odd_of_all)
    return pairs.estimate("regression", L, se)


@dataclass(frozen=True, repr=False)
class Pairs(Brief):
    """The pairs of complements among coalitions, with worths that are finite."""

    coalitions: Bools
    """[m, n]"""
    worths: Floats
    """[m]"""
    one: npt.NDArray[Any]
    """[pairs]: the places of those with fewer players (of as many, the first), the empty one left out."""
    other: npt.NDArray[Any]
    """[pairs]: the places of their complements."""
    ends: tuple[int, int]
    """The places of the full and of the empty coalition."""

    @property
    def odd(self) -> Floats:
        """o(S) = (v(S) − v(N∖S))/2, which is all of the worths that Shapley values hang on, [pairs]."""
        odd: Floats = (self.worths[self.one] - self.worths[self.other]) / 2
        return odd

    @property
    def odd_of_all(self) -> float:
        """o(N)."""
        return float(self.worths[self.ends[0]] - self.worths[self.ends[1]]) / 2

    def estimate(self, name: str, L: Floats, se: Floats) -> Estimate:
        """Values that take L [n, pairs + 1] of each o(S) and of o(N)."""
        weights = np.zeros((len(L), len(self.coalitions)))
        weights[:, self.one], weights[:, self.other] = L[:, :-1] / 2, -L[:, :-1] / 2
        weights[:, self.ends[0]], weights[:, self.ends[1]] = L[:, -1] / 2, -L[:, -1] / 2
        used = np.flatnonzero(weights.any(0))
        values = weights @ np.where(weights.any(0), self.worths, 0)
        return Estimate(name, values, se, self.coalitions[used], weights[:, used], self.worths[used], len(self.one))


def pairs_among(coalitions: Bools, worths: Floats) -> Pairs | None:
    """Each pair once; None without a finite worth of the empty or of the full coalition, which belong to no pair."""
    n = coalitions.shape[1]
    index = {row.tobytes(): i for i, row in enumerate(coalitions)}
    size = coalitions.sum(1)
    partners = [index.get((~row).tobytes()) for row in coalitions]
    pairs = [
        (i, j)
        for i, j in enumerate(partners)
        if j is not None and size[i] > 0 and (size[i], i) < (size[j], j) and np.isfinite(worths[[i, j]]).all()
    ]
    full, empty = (index.get(np.full(n, on).tobytes()) for on in (True, False))
    if full is None or empty is None or not np.isfinite(worths[[full, empty]]).all():
        return None
    one, other = np.array(pairs, dtype=int).reshape(-1, 2).T
    return Pairs(coalitions, worths, one, other, (full, empty))


def _solved(coalitions: Bools, odd: Floats, odd_of_all: float) -> tuple[Floats, Floats]:
    """What the values take of each o(S) and of o(N), [n, pairs + 1], and their standard errors.

    The fit is β = argmin Σ wₛ (o(S) − aₛβ)² + Σ λⱼβⱼ², wₛ = (n − 1) / (C(n, k) k (n − k)) / seenₖ for |S| = k, with
    o(N) as one more row of a weight that makes it hold; the values are Bᵀβ, B those of each feature.
    """
    n, k = coalitions.shape[1], coalitions.sum(1)
    found = np.bincount(k, minlength=n)[k]
    seen = np.array([int(count) / pairs_of(n, int(size)) for count, size in zip(found, k, strict=True)])
    kernel = (n - 1) / (found * k * (n - k)) / np.where(2 * k == n, 2, 1)  # C(n, k), too large for a float, cancels
    A, B = _design(coalitions, n)
    top = _design(np.ones((1, n), np.bool_), n)[0]
    kernel = kernel / kernel.mean()
    A, weight = np.vstack([A, top]), np.append(kernel, 1e4 * len(k))
    scale = np.sqrt((A * A).mean(0)).clip(min=1e-12)
    penalty = np.concatenate([np.full(n, 1e-9), np.full(n, _RIDGE * n), np.full(A.shape[1] - 2 * n, 1e-9)])
    X = A / scale
    root = np.sqrt(weight)
    solve = np.linalg.pinv(np.vstack([X * root[:, None], np.diag(np.sqrt(penalty))]))[:, : len(X)] * root
    L = efficient((B.T / scale) @ solve)
    # HC3: Var φ = Σ Lₛ² (eₛ / (1 − hₛ))² (1 − seen), e the residuals, h the leverages
    residual = odd - A[:-1] @ ((solve @ np.append(odd, odd_of_all)) / scale)
    leverage = np.einsum("ij,ji->i", X[:-1], solve[:, :-1])
    se = np.sqrt(((L[:, :-1] * (residual / (1 - leverage).clip(min=0.05))) ** 2 * (1 - seen)).sum(1))
    if len(k) < 2 * n and (seen < 1).any():  # fewer pairs than features leave no residual to judge by
        se = np.full(n, np.nan)
    return L, se


def efficient(L: Floats) -> Floats:
    """What values take of each o(S) and of o(N), [n, pairs + 1], so that Σφ = 2 o(N) to the last digit."""
    L = L - L.sum(0) / len(L)
    L[:, -1] += 2 / len(L)
    return L


def pairs_of(n: int, k: int) -> int:
    """Pairs of complements whose smaller half has k players."""
    return math.comb(n, k) // (2 if 2 * k == n else 1)


def _design(coalitions: Bools, n: int) -> tuple[Floats, Floats]:
    """Features [m, f] of o(S), and the Shapley values [f, n] of each feature."""
    z = 2.0 * coalitions - 1
    s = z.mean(1, keepdims=True)
    features = np.hstack([z / 2, z * s**2, s, s**3, s**5])
    itself, other = values_of_bent(n)
    values = np.vstack([np.eye(n), np.full((n, n), other) + (itself - other) * np.eye(n), np.full((3, n), 2 / n)])
    return features, values


def values_of_bent(n: int) -> tuple[float, float]:
    """Shapley values of the game z_i s², s the mean of z: of i itself and, by efficiency, of every other player."""
    even = ((2 * np.arange(n + 1) - n) / n) ** 2
    itself = float(np.mean(even[:-1] + even[1:]))
    return itself, (2 * even[-1] - itself) / max(1, n - 1)
