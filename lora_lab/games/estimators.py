"""Estimators of Shapley values: which coalitions to ask for, and how to weigh their worths. No torch in here.

φ_i = Σ over orders of i's marginal contribution / n! = ∫₀¹ E[v(R_p ∪ i) − v(R_p)] dp, R_p holding every other player
with probability p (Owen 1972). Every estimator is linear in the worths, φ̂ = W v, so an `Estimate` carries W: that
gives values by example, and intervals over examples, for nothing.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.errors import LoraLabWarning, OptionError, unknown
from lora_lab.results.stats import Floats, Z, mean_and_error, student

Bools = npt.NDArray[np.bool_]
Game = Callable[[Bools], Floats]
"""Coalitions bool [m, n] → worths [m]; NaN where there is none."""

EXACT_LIMIT = 20
"""Players up to which all coalitions can be enumerated."""

_RIDGE = 0.01  # per player, on features of unit size: enough to hold 2n unknowns to n pairs, little beside 10n
_FEW = 4096  # coalitions of one size that are listed rather than drawn until a new one comes


@dataclass(frozen=True)
class Draw:
    """One independent, unbiased guess of all values: φ̂ = weights @ v(coalitions)."""

    coalitions: Bools
    """[m, n]"""
    weights: Floats
    """[n, m]"""
    marginals: int
    """Marginal contributions of each player that are averaged."""


@dataclass(frozen=True)
class Estimate:
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
    """[n, m]: values = weights @ worths."""
    worths: Floats
    """[m]"""
    draws: int
    trace: list[dict[str, Any]] = field(default_factory=list)
    """How values and standard errors developed: rows of evaluations, values, se."""
    bias: str | None = None
    """What makes the estimator biased, if anything does."""

    @property
    def efficiency_gap(self) -> float:
        """|Σφ − (v(N) − v(∅))|; NaN where one of the two is not among the coalitions."""
        sizes = self.coalitions.sum(1)
        full, empty = self.worths[sizes == self.coalitions.shape[1]], self.worths[sizes == 0]
        if not len(full) or not len(empty):
            return math.nan
        return float(abs(self.values.sum() - (full[0] - empty[0])))


def permutation(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Random orders: everybody's marginal contribution on joining those before (Castro et al. 2009)."""
    while True:
        yield _orders([generator.permutation(n)])


def antithetic(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Random orders, each with its reverse, whose errors partly cancel."""
    while True:
        order = generator.permutation(n)
        yield _orders([order, order[::-1]])


def stratified(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """A random order and all its rotations: everybody stands once in every place, so the places need no sampling."""
    while True:
        order = generator.permutation(n)
        yield _orders([np.roll(order, shift) for shift in range(n)])


def owen(n: int, generator: np.random.Generator, *, nodes: int = 0, grid: str = "gauss") -> Iterator[Draw]:
    """The multilinear extension, ∫ E[v(R_p ∪ i) − v(R_p)] dp over a grid of p, in antithetic halves.

    After Okhrati & Lipani 2020. `gauss`: Gauss–Legendre with ⌈n/2⌉ nodes (`nodes` = 0) has no error in p; fewer have.
    `trapezoid` always has one. At each p, R_p and its complement (which is R_{1−p}) are used.
    """
    if grid not in ("gauss", "trapezoid"):
        raise unknown("grid", grid, ["gauss", "trapezoid"])
    if nodes < 0:
        raise OptionError(f"{nodes} nodes; at least 1 is needed, or 0 for ⌈n/2⌉")
    count = nodes or -(-n // 2)
    if grid == "gauss":
        x, w = np.polynomial.legendre.leggauss(count)
        places, shares = (x + 1) / 2, w / 2
    else:
        places = np.linspace(0, 1, max(2, count))
        shares = np.full(len(places), 1 / (len(places) - 1))
        shares[[0, -1]] /= 2
    while True:
        yield _join([_multilinear(generator.random(n) < p, share) for p, share in zip(places, shares, strict=True)])


def regression(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """Pairs of a coalition and its complement, sizes drawn evenly (leverage scores, Musco & Witter 2025), none twice.

    The values come from one fit to all pairs, see `fit_pairs`; a draw alone carries no weights.
    """
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
            yield Draw(np.stack([coalition, ~coalition]), np.zeros((n, 2)), 1)


ESTIMATORS: dict[str, Callable[..., Iterator[Draw]]] = {
    "permutation": permutation,
    "antithetic": antithetic,
    "stratified": stratified,
    "owen": owen,
    "regression": regression,
}
"""Name → function (n, generator, *, options) → endless draws; "exact" needs none."""


def estimate(
    game: Game,
    n: int,
    *,
    estimator: str = "antithetic",
    samples: int = 200,
    seed: int = 0,
    until_se: float | None = None,
    budget: int | None = None,
    **options: Any,
) -> Estimate:
    """Shapley values of a game of n players.

    `samples` marginal contributions a player (orders, for the permutation estimators; `regression` gets as many
    coalitions as so many orders have). It stops earlier once every standard error is at most `until_se`, or before
    the different coalitions asked for would exceed `budget`. Draws with a worth that is NaN are left out.
    """
    if estimator not in ("exact", *ESTIMATORS):
        raise unknown("estimator", estimator, ["exact", *ESTIMATORS])
    check(n, samples=samples, estimator=estimator, until_se=until_se, budget=budget)
    if estimator == "exact" or n == 1:  # of one player, any order is all of them
        return exact(game, n)
    if n <= EXACT_LIMIT and samples > 2**n:
        warnings.warn(
            f"{samples} samples, but there are only {2**n} coalitions of {n} players: --estimator exact is cheaper",
            LoraLabWarning,
            stacklevel=2,
        )
    drawn: list[Draw] = []
    worths: dict[bytes, float] = {}
    planned = plan(n, estimator=estimator, samples=samples, seed=seed, budget=budget, **options)
    for chunk in _rounds(planned, whole=until_se is None):
        drawn += chunk
        _ask(game, chunk, worths)
        if until_se is not None and _reached(estimator, drawn, worths, until_se):
            break
    trace = []
    for upto in _checkpoints(len(drawn)):
        values, se = _values(estimator, drawn[:upto], worths)
        asked = len({row.tobytes() for draw in drawn[:upto] for row in draw.coalitions})
        trace.append({"draws": upto, "evaluations": asked, "values": values.tolist(), "se": se.tolist()})
    found = _fitted(drawn, worths) if estimator == "regression" else _averaged(estimator, drawn, worths)
    if found is None:
        more = "--samples" if budget is None else "--budget"
        raise OptionError(f"{len(drawn) - 1} pairs of coalitions are too few for a fit to {n} players; more {more}")
    return replace(found, trace=trace, bias=_bias(estimator, n, options))


def plan(
    n: int, *, estimator: str, samples: int, seed: int = 0, budget: int | None = None, **options: Any
) -> list[Draw]:
    """The draws that `estimate` would at most make; their coalitions tell the cost beforehand."""
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ["exact", *ESTIMATORS])
    if n == 1:
        return [_orders([np.zeros(1, dtype=int)])]
    draws: list[Draw] = []
    asked = {np.zeros(n, np.bool_).tobytes(), np.ones(n, np.bool_).tobytes()}
    marginals = 0
    source = ESTIMATORS[estimator](n, np.random.default_rng(seed), **options)
    if estimator == "regression":  # an order of n players asks for n − 1 coalitions besides the empty and the full
        draws.append(Draw(np.array([[False] * n, [True] * n]), np.zeros((n, 2)), 0))
        samples = math.ceil(samples * (n - 1) / 2)
    least = len(draws)
    for draw in source:
        asked |= {row.tobytes() for row in draw.coalitions}
        if budget is not None and len(asked) > budget:
            break
        draws.append(draw)
        marginals += draw.marginals
        if marginals >= samples:
            break
    if len(draws) == least:
        raise OptionError(f"a budget of {budget} coalitions; one draw of {estimator} alone asks for {len(asked)}")
    return draws


def all_coalitions(n: int) -> Bools:
    """The 2^n coalitions; row i holds the binary digits of i, the first player as the lowest."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.bool_)


def exact(game: Game, n: int) -> Estimate:
    """All 2^n coalitions; efficiency, symmetry, null player and linearity hold to rounding."""
    if n > EXACT_LIMIT:
        raise OptionError(
            f"2^{n} coalitions are too many to enumerate (at most 2^{EXACT_LIMIT}); --estimator antithetic"
        )
    coalitions = all_coalitions(n)
    worths = game(coalitions)
    bad = np.flatnonzero(~np.isfinite(worths))
    if len(bad):
        raise OptionError(
            f"exact values need every coalition, and {len(bad)} of {len(worths)} have no finite worth; "
            "--estimator antithetic leaves them out"
        )
    size = coalitions.sum(1)
    share = np.array([1 / (n * math.comb(n - 1, k)) for k in range(n)])
    joined = share[np.maximum(size - 1, 0)][:, None] * coalitions
    stayed = share[np.minimum(size, n - 1)][:, None] * ~coalitions
    weights = (joined - stayed).T
    values = weights @ (worths - worths[0])  # the weights sum to 0: this only makes equal worths exactly 0
    return Estimate("exact", values, np.zeros(n), coalitions, weights, worths, 1)


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
    some, others = np.array(pairs).T
    k = size[some]
    seen = np.bincount(k, minlength=n)[k] / np.array([float(_pairs_of(n, int(each))) for each in k])
    kernel = np.array([(n - 1) / (float(math.comb(n, int(each))) * each * (n - each)) for each in k]) / seen
    A, B = _design(coalitions[some], n)
    top, value_of_top = _design(np.ones((1, n), np.bool_), n)[0], (worths[ends[0]] - worths[ends[1]]) / 2
    odd = (worths[some] - worths[others]) / 2
    kernel = kernel / kernel.mean()
    A, weight = np.vstack([A, top]), np.append(kernel, 1e4 * len(k))
    scale = np.sqrt((A * A).mean(0)).clip(min=1e-12)
    penalty = np.concatenate([np.full(n, 1e-9), np.full(n, _RIDGE * n), np.full(A.shape[1] - 2 * n, 1e-9)])
    X = A / scale
    root = np.sqrt(weight)
    solve = np.linalg.pinv(np.vstack([X * root[:, None], np.diag(np.sqrt(penalty))]))[:, : len(X)] * root
    L = (B.T / scale) @ solve  # [n, pairs + 1]
    L[:, -1] += (2 - L[:, -1].sum()) / n  # efficiency to the last digit
    L[:, :-1] -= L[:, :-1].sum(0) / n
    residual = odd - A[:-1] @ ((solve @ np.append(odd, value_of_top)) / scale)
    leverage = np.einsum("ij,ji->i", X[:-1], solve[:, :-1])
    se = np.sqrt(((L[:, :-1] * (residual / (1 - leverage).clip(min=0.05))) ** 2 * (1 - seen)).sum(1))
    if len(k) < 2 * n and (seen < 1).any():  # fewer pairs than features leave no residual to judge by
        se = np.full(n, np.nan)
    weights = np.zeros((n, len(coalitions)))
    weights[:, some], weights[:, others] = L[:, :-1] / 2, -L[:, :-1] / 2
    weights[:, ends[0]], weights[:, ends[1]] = L[:, -1] / 2, -L[:, -1] / 2
    used = np.flatnonzero(weights.any(0))
    return Estimate(
        "regression",
        weights @ np.where(weights.any(0), worths, 0),
        se,
        coalitions[used],
        weights[:, used],
        worths[used],
        len(k),
    )


def check(
    n: int,
    *,
    samples: int,
    estimator: str | None = None,
    until_se: float | None = None,
    budget: int | None = None,
) -> None:
    """Raise what `estimate` would raise for these numbers."""
    if samples < 1:
        raise OptionError(f"{samples} samples; at least 1 is needed")
    if until_se is not None and not until_se > 0:
        raise OptionError(f"a standard error of {until_se} can not be reached; a number above 0 is needed")
    if budget is not None and budget < n + 1:
        raise OptionError(f"a budget of {budget} coalitions; one order of {n} players alone needs {n + 1}")
    if estimator == "exact" and budget is not None and budget < 2**n:
        raise OptionError(f"a budget of {budget} coalitions; exact values of {n} players need {2**n}")


def _orders(orders: list[npt.NDArray[Any]]) -> Draw:
    """Marginal contributions along orders, averaged."""
    n = len(orders[0])
    return _join([_along(order, n, 1 / len(orders)) for order in orders])


def _along(order: npt.NDArray[Any], n: int, share: float) -> Draw:
    coalitions = np.zeros((n + 1, n), dtype=np.bool_)
    weights = np.zeros((n, n + 1))
    for place, player in enumerate(order):
        coalitions[place + 1 :, player] = True
        weights[player, place : place + 2] = -share, share
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


def _join(draws: list[Draw]) -> Draw:
    """One draw of several, every coalition once."""
    coalitions = np.concatenate([draw.coalitions for draw in draws])
    unique, inverse = np.unique(coalitions, axis=0, return_inverse=True)
    weights = np.zeros((coalitions.shape[1], len(unique)))
    np.add.at(weights.T, inverse.ravel(), np.concatenate([draw.weights for draw in draws], axis=1).T)
    return Draw(unique, weights, sum(draw.marginals for draw in draws))


def _rounds(draws: list[Draw], *, whole: bool) -> Iterator[list[Draw]]:
    """All at once (prefixes are shared best), or growing by a quarter each time."""
    start, size = 0, len(draws) if whole else 8
    while start < len(draws):
        yield draws[start : start + size]
        start += size
        size = max(8, start // 4)


def _ask(game: Game, draws: list[Draw], worths: dict[bytes, float]) -> None:
    new = {row.tobytes(): row for draw in draws for row in draw.coalitions if row.tobytes() not in worths}
    if new:
        worths |= dict(zip(new, game(np.array(list(new.values()))).tolist(), strict=True))


def _finite(draws: list[Draw], worths: dict[bytes, float]) -> tuple[list[Draw], Floats]:
    """The draws whose worths are all finite, and the values [draws, n] that each of them gives."""
    known = [(draw, np.array([worths[row.tobytes()] for row in draw.coalitions])) for draw in draws]
    good = [(draw, v) for draw, v in known if np.isfinite(v).all()]
    if not good:
        raise OptionError("no draw of coalitions has finite worths throughout; nothing can be said of any player")
    return [draw for draw, _ in good], np.array([draw.weights @ v for draw, v in good])


def _averaged(estimator: str, draws: list[Draw], worths: dict[bytes, float]) -> Estimate:
    good, each = _finite(draws, worths)
    joined = _join(good)
    known = np.array([worths[row.tobytes()] for row in joined.coalitions])
    values, se = mean_and_error(each, reach=float(np.ptp(known)))
    return Estimate(estimator, values, se, joined.coalitions, joined.weights / len(good), known, len(good))


def _fitted(draws: list[Draw], worths: dict[bytes, float]) -> Estimate | None:
    coalitions = np.unique(np.concatenate([draw.coalitions for draw in draws]), axis=0)
    return fit_pairs(coalitions, np.array([worths[row.tobytes()] for row in coalitions]))


def _values(estimator: str, draws: list[Draw], worths: dict[bytes, float]) -> tuple[Floats, Floats]:
    """Values and standard errors after these draws; NaN where they are too few."""
    n = draws[0].coalitions.shape[1]
    if estimator == "regression":
        found = _fitted(draws, worths)
        return (found.values, found.se) if found else (np.full(n, np.nan), np.full(n, np.nan))
    try:
        good, each = _finite(draws, worths)
        known = [worths[row.tobytes()] for draw in good for row in draw.coalitions]
        return mean_and_error(each, reach=float(np.ptp(known)))
    except OptionError:
        return np.full(n, np.nan), np.full(n, np.nan)


def _reached(estimator: str, draws: list[Draw], worths: dict[bytes, float], target: float) -> bool:
    """Whether all standard errors are small enough, with what few draws leave uncertain of them."""
    values = _values(estimator, draws, worths)[1]
    few = student(len(draws)) / Z if len(draws) > 1 else math.inf
    return bool(np.isfinite(values).all() and values.max() * few <= target)


def _checkpoints(draws: int) -> list[int]:
    """At most two dozen places, evenly spaced on a log scale."""
    return sorted({round(x) for x in np.geomspace(1, draws, 24)} | {draws}) if draws else []


def _bias(estimator: str, n: int, options: dict[str, Any]) -> str | None:
    if estimator == "regression":
        return "the penalty on the size-dependent terms, which vanishes with more pairs"
    nodes = options.get("nodes") or -(-n // 2)
    if estimator == "owen" and (options.get("grid") == "trapezoid" or nodes < -(-n // 2)):
        return f"the grid of {nodes} probabilities; grid=gauss with {-(-n // 2)} nodes has none"
    return None


def _pairs_of(n: int, k: int) -> int:
    """Pairs of complements whose smaller half has k players."""
    return math.comb(n, k) // (2 if 2 * k == n else 1)


def _design(coalitions: Bools, n: int) -> tuple[Floats, Floats]:
    """Features [m, f] of o(S), and the Shapley values [f, n] of each feature."""
    z = 2.0 * coalitions - 1
    s = z.mean(1, keepdims=True)
    features = np.hstack([z / 2, z * s**2, s, s**3, s**5])
    even = ((2 * np.arange(n + 1) - n) / n) ** 2
    own = float(np.mean(even[:-1] + even[1:]))  # of z_i s²: for i itself, and by efficiency for the others
    other = (2 * even[-1] - own) / max(1, n - 1)
    values = np.vstack([np.eye(n), np.full((n, n), other) + (own - other) * np.eye(n), np.full((3, n), 2 / n)])
    return features, values
