"""Values from gradients: a game whose players have gates from 0 to 1, along the line on which all gates are equal.

f(g) is the worth with gates g ∈ [0, 1]ⁿ, v(S) = f(1_S). Aumann–Shapley values are AS_i = ∫₀¹ ∂_i f(t·1) dt (Aumann &
Shapley 1974), with Σ AS_i = v(N) − v(∅). They equal Shapley values where f is additive or multilinear with one degree
a term; elsewhere they differ, since f between the corners is not v's multilinear extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.polynomial import legendre

from lora_lab.brief import Brief
from lora_lab.errors import OptionError
from lora_lab.games.coalitions import GRIDS, Bools, Draw, Estimate, every_coalition
from lora_lab.results.stats import Floats, mean_and_error

OPTIONS: dict[str, Any] = {"nodes": 3, "temperature": 2.0, "batch": 0}
"""What can be set of every estimator that has gates: nodes of Gauss–Legendre, and options of the game itself."""

_LISTED = 12
_MARGINALS = 10_000_000
_CANCELS = 0.1


class Gated(Protocol):
    """A game with gates."""

    def __call__(self, coalitions: Bools) -> Floats:
        """Worths of coalitions [m, n]."""

    def along(self, gates: Floats, shares: Floats, **options: Any) -> Diagonal:
        """What is found with all gates at each of these values, and at 0 and 1.

        `shares` are those of an integral over the gates. A smooth worth may stand for another one.
        """


@dataclass(frozen=True, repr=False)
class Rows(Brief):
    """What the worths of a diagonal are means over: numbers of every example, of which its worth is made."""

    worths: Floats
    """[m, examples]"""
    slopes: Floats
    """[m, examples, n]"""
    ends: Floats
    """[2, examples]"""
    finish: Callable[[Floats], Floats] | None = None
    """Number by number, what makes worths of them, such as right (1) of a margin above 0; None: they are worths."""


@dataclass(frozen=True, repr=False)
class Diagonal(Brief):
    """A game where all gates are equal, at the nodes of an integral from 0 to 1."""

    gates: Floats
    """[m]"""
    shares: Floats
    """[m]: ∫₀¹ f(t) dt ≈ Σ shareₖ f(gateₖ)."""
    worths: Floats
    """[m]"""
    slopes: Floats
    """[m, n]: ∂f/∂g_i."""
    ends: Floats
    """[2]: worths at 0 and at 1, as smooth as `worths` are."""
    rows: Rows | None = None
    """What all this is the mean of; None where it is not known by example."""

    @property
    def values(self) -> Floats:
        """Aumann–Shapley values, [n]."""
        values: Floats = self.shares @ self.slopes
        return values


@dataclass(frozen=True, repr=False)
class Control(Brief):
    """A game known without asking for any coalition, whose values are known, too; what is left of v is estimated."""

    game: Callable[[Bools], Floats]
    values: Floats
    """[n]: its Shapley values."""
    se: Floats
    """[n]: their standard errors, 0 where every coalition was listed."""
    fit: Callable[[Bools, Floats], Estimate | None] | None = None
    """How the values of what is left come of all that was drawn; None: as those of any game."""
    by_example: Callable[[Bools, Floats], Floats] | None = None
    """(coalitions [m, n], weights [n, m]) → φ(h) − W h of every example, [n, examples]; None where it is not known."""

    def left(self, game: Callable[[Bools], Floats]) -> Callable[[Bools], Floats]:
        """The game that is left: v − h."""
        return lambda coalitions: game(coalitions) - self.game(coalitions)

    def restored(self, left: Estimate) -> Estimate:
        """Values of the game from those of what is left of it: φ(h) + W(v − h), so that `known` is φ(h) − W h."""
        known = self.values - left.weights @ self.game(left.coalitions)
        by_example = self.by_example(left.coalitions, left.weights) if self.by_example else None
        drawn = left.weights.any()  # where no coalition is weighed, none was drawn

        def joined(se: Any) -> Floats:
            both: Floats = np.hypot(se if drawn else 0.0, self.se)
            return both

        worths = left.worths + self.game(left.coalitions)
        values = self.values + left.values
        trace = [
            {**row, "values": (self.values + row["values"]).tolist(), "se": joined(row["se"]).tolist()}
            for row in left.trace
        ]
        return replace(
            left, values=values, se=joined(left.se), worths=worths, trace=trace, known=known, known_of=by_example
        )


def diagonal(game: Any, *, nodes: int = 3, temperature: float = 2.0, batch: int = 0) -> Diagonal:
    """The diagonal of a game with gates, exact for integrals of degree 2 · nodes − 1."""
    check(nodes=nodes, temperature=temperature, batch=batch)
    if not hasattr(game, "along"):
        raise OptionError("this game has no gates, only coalitions; estimators without gates can be asked for")
    along: Diagonal = game.along(*GRIDS["gauss"](nodes), temperature=temperature, batch=batch)
    return along


def check(*, nodes: int = 3, temperature: float = 2.0, batch: int = 0, passes: int = 2, **others: Any) -> None:
    """OptionError for an option that no pass with gates can work with; others are not looked at."""
    if nodes < 1:
        raise OptionError(f"{nodes} nodes; at least 1 is needed")
    if not temperature > 0:
        raise OptionError(f"a temperature of {temperature}; a number above 0 is needed")
    if batch < 0:
        raise OptionError(f"a batch of {batch} examples; at least 1 is needed, or 0 for those of scoring")
    if passes < 2:
        raise OptionError(f"{passes} passes; a coalition and its complement are 2")


def nothing(n: int, generator: np.random.Generator) -> Iterator[Draw]:
    """No coalition but nobody and all, whose worths the gates' own are held against."""
    while True:
        yield Draw(np.array([[False] * n, [True] * n]), np.zeros((n, 2)), math.inf)


def additive(along: Diagonal, ends: Floats) -> Control:
    """a(S) = v(∅) + Σ_{i∈S} AS_i, whose Shapley values are the AS_i."""
    values = along.values
    return Control(lambda coalitions: ends[0] + coalitions @ values, values, np.zeros(len(values)))


def link(along: Diagonal, ends: Floats) -> Control:
    """h(S) = ψ(Σ_{i∈S} AS_i / Σ AS): how much of all is there, through the curve of the worth on the diagonal.

    ψ is the polynomial of degree 2m + 1 through f(0), f(1) and the m nodes' worths and slopes Σ_i ∂_i f, its
    argument cut to [0, 1], mapped so that its ends are v(∅) and v(N). Where the AS_i cancel (|Σ AS| < 0.1 Σ |AS|)
    every player has the same share. Fixed before any coalition is drawn, it takes nothing from the mean of an unbiased
    estimator: φ̂ = φ(h) + φ̂(v − h).
    """
    values = along.values
    n, total = len(values), float(values.sum())
    cancels = abs(total) < _CANCELS * float(np.abs(values).sum()) or total == 0
    share = np.full(n, 1 / n) if cancels else values / total
    curve = _stretched(along, ends)

    def game(coalitions: Bools) -> Floats:
        return curve((coalitions @ share).clip(0, 1))

    if n <= _LISTED:
        every = every_coalition(n)
        return Control(game, every.weights @ game(every.coalitions), np.zeros(n))
    return Control(game, *_by_orders(curve, share))


def _stretched(along: Diagonal, ends: Floats) -> Callable[[Floats], Floats]:
    """ψ on [0, 1] between the worths of nobody and of all."""
    curve = curve_through(along.gates, along.worths[:, None], along.slopes.sum(1)[:, None], along.ends[:, None])
    low, high = along.ends
    stretch = (ends[1] - ends[0]) / (high - low) if high != low else 1.0
    return lambda x: ends[0] + stretch * (curve(x.ravel())[:, 0].reshape(x.shape) - low)


def curve_through(gates: Floats, worths: Floats, slopes: Floats, ends: Floats) -> Callable[[Floats], Floats]:
    """t [k] → [k, c]: the polynomials of degree 2m + 1 through the ends [2, c], worths and slopes [m, c] of c curves.

    In Legendre polynomials P_j(2t − 1), so that the conditions stay far from singular.
    """
    degree = 2 * len(gates) + 1
    where = np.concatenate([[0.0, 1.0], gates])
    derivative = np.stack([legendre.legval(2 * gates - 1, legendre.legder(row)) for row in np.eye(degree + 1)], 1)
    conditions = np.vstack([legendre.legvander(2 * where - 1, degree), 2 * derivative])
    coefficients: Floats = np.linalg.solve(conditions, np.vstack([ends, worths, slopes]))

    def curve(t: Floats) -> Floats:
        return np.asarray(legendre.legvander(2 * t - 1, degree) @ coefficients, dtype=np.float64)

    return curve


def _by_orders(curve: Callable[[Floats], Floats], share: Floats) -> tuple[Floats, Floats]:
    """Shapley values of ψ(Σ share) from random orders, each with its reverse, and their standard errors."""
    n, generator = len(share), np.random.default_rng(0)
    pairs = []
    for _ in range(max(100, _MARGINALS // (2 * n * 100))):
        order = np.argsort(generator.random((100, n)), 1)
        both = np.zeros((100, n))
        for way in (order, order[:, ::-1]):
            reached = np.cumsum(share[way], 1).clip(0, 1)
            worths = curve(np.hstack([np.zeros((100, 1)), reached]))
            np.put_along_axis(joined := np.empty((100, n)), way, np.diff(worths, axis=1), 1)
            both += joined / 2
        pairs.append(both)
    return mean_and_error(np.concatenate(pairs))
