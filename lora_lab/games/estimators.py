"""Estimators of Shapley values by name: which coalitions are drawn, and how values come of their worths."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.games import gates, rankings
from lora_lab.games.coalitions import (
    EXACT_LIMIT,
    Bools,
    Draw,
    Estimate,
    Game,
    antithetic,
    every_coalition,
    join,
    orders,
    owen,
    owen_bias,
    permutation,
    stratified,
)
from lora_lab.games.joint import joint
from lora_lab.games.regression import balanced, fit_pairs, regression
from lora_lab.registry import Registry
from lora_lab.results.stats import Floats, Z, mean_and_error, student

Fit = Callable[[Bools, Floats], Estimate | None]
"""Function (different coalitions [m, n], worths [m]) → values from all of them, or None where they are too few."""


@dataclass(frozen=True)
class Estimator:
    """Which coalitions an estimator asks for, and how values come of them."""

    draws: Callable[..., Iterator[Draw]] | None
    """(n, generator, *, options) → endless draws; None: every coalition there is, so that the values are exact."""
    fit: Fit | None = None
    """How values come of all that was drawn; None: the mean of those that each draw gives."""
    bias: Callable[[int, Mapping[str, Any]], str | None] = lambda n, options: None
    """(n, options) → what makes it biased, if anything does."""
    control: Callable[[gates.Diagonal, Floats], gates.Control] | None = None
    """(the game along its gates, worths of nobody and of all) → what is known of it without coalitions; the draws then
    estimate what is left. None: the game needs no gates."""

    ranking: Callable[..., tuple[Floats, Floats]] | None = None
    """(game, n, generator, *, options) → numbers that rank the players, but are no values, and their errors."""
    about: str = ""
    """What it does, and its source."""

    @property
    def whole(self) -> bool:
        """Whether it asks for every coalition there is, so that nothing is left to sample."""
        return self.draws is None

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        return {**_keywords(self.ranking), **self.of_draws, **(gates.OPTIONS if self.control else {})}

    @property
    def of_draws(self) -> dict[str, Any]:
        """Those options that `draws` takes."""
        return _keywords(self.draws)

    def passes(self, options: Mapping[str, Any]) -> int:
        """Passes with gradients that it makes with these options."""
        given = {**self.options, **options}
        if self.ranking:
            return int(given.get("passes", "batch" in given))  # one, if it takes any gradient
        return int(given["nodes"]) if self.control else 0

    def least(self, n: int) -> int:
        """Coalitions that it has to ask for at least."""
        return 2 if self.draws in (gates.nothing, balanced) else n + 1

    @property
    def settled(self) -> bool:
        """Whether the game's gates say everything, so that no coalition is drawn."""
        return self.draws is gates.nothing


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
    the different coalitions asked for would exceed `budget`. Draws with a worth that is NaN are left out. Estimators
    with a `control` need a game with gates (see `gates.Gated`) and first ask for it along them.
    """
    entry = ESTIMATORS[estimator]
    check(n, samples=samples, estimator=estimator, until_se=until_se, budget=budget)
    if entry.whole or n == 1:  # of one player, any order is all of them
        return exact(game, n)
    if n <= EXACT_LIMIT and samples > 2**n and not entry.settled:
        warnings.warn(
            f"{samples} samples, but there are only {2**n} coalitions of {n} players: the estimator exact is cheaper",
            LoraLabWarning,
            stacklevel=2,
        )
    if entry.ranking:
        return _ranked(game, n, estimator, seed, options)
    planned = plan(n, estimator=estimator, samples=samples, seed=seed, budget=budget, **options)
    control = _controlled(game, n, entry, options)
    fit = control.fit if control and control.fit else entry.fit
    found = _from_draws(control.left(game) if control else game, estimator, fit, planned, until_se, budget)
    return replace(control.restored(found) if control else found, bias=entry.bias(n, options))


def _ranked(game: Any, n: int, estimator: str, seed: int, options: Mapping[str, Any]) -> Estimate:
    entry = ESTIMATORS[estimator]
    assert entry.ranking is not None
    gates.check(**options)
    if not hasattr(game, "slopes"):
        raise OptionError(f"{estimator} needs a game with gates, and this one has only coalitions")
    values, se = entry.ranking(game, n, np.random.default_rng(seed), **options)
    ends = np.array([[False] * n, [True] * n])
    return Estimate(estimator, values, se, ends, np.zeros((n, 2)), game(ends), 1, bias=rankings.NO_VALUES)


def _keywords(function: Callable[..., Any] | None) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values() if function else ()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _controlled(game: Game, n: int, entry: Estimator, options: Mapping[str, Any]) -> gates.Control | None:
    """What the game's gates tell before any coalition is drawn."""
    if entry.control is None:
        return None
    along = gates.diagonal(game, **{name: value for name, value in options.items() if name in gates.OPTIONS})
    return entry.control(along, game(np.array([[False] * n, [True] * n])))


def _from_draws(
    game: Game, estimator: str, fit: Fit | None, planned: list[Draw], until_se: float | None, budget: int | None
) -> Estimate:
    drawn: list[Draw] = []
    worths: dict[bytes, float] = {}
    for chunk in _rounds(planned, whole=until_se is None):
        drawn += chunk
        _ask(game, chunk, worths)
        if until_se is not None and _reached(fit, drawn, worths, until_se):
            break
    trace = []
    for upto in _checkpoints(len(drawn)):
        values, se = _values(fit, drawn[:upto], worths)
        asked = len({row.tobytes() for draw in drawn[:upto] for row in draw.coalitions})
        trace.append({"draws": upto, "evaluations": asked, "values": values.tolist(), "se": se.tolist()})
    estimate = _fitted(fit, drawn, worths) if fit else _averaged(estimator, drawn, worths)
    if estimate is None:
        enough = "more samples are needed" if budget is None else "a larger budget is needed"
        count, n = sum(draw.marginals > 0 for draw in drawn), drawn[0].coalitions.shape[1]
        raise OptionError(f"{count} draws of coalitions are too few for a fit to {n} players; {enough}")
    return replace(estimate, estimator=estimator, trace=trace)


def plan(
    n: int, *, estimator: str, samples: int, seed: int = 0, budget: int | None = None, **options: Any
) -> list[Draw]:
    """The draws that `estimate` would at most make; their coalitions tell the cost beforehand."""
    entry = ESTIMATORS[estimator]
    source = entry.draws
    if n == 1:
        return [orders([np.zeros(1, dtype=int)])]
    if source is None:
        return [every_coalition(n)]
    draws: list[Draw] = []
    asked = {np.zeros(n, np.bool_).tobytes(), np.ones(n, np.bool_).tobytes()}
    marginals: Any = 0
    own = {name: value for name, value in options.items() if name not in entry.options or name in entry.of_draws}
    for draw in source(n, np.random.default_rng(seed), **own):
        asked |= {row.tobytes() for row in draw.coalitions}
        if budget is not None and len(asked) > budget:
            break
        draws.append(draw)
        marginals += draw.marginals
        if marginals >= samples:
            break
    if not draws or not (marginals or entry.control):
        raise OptionError(f"a budget of {budget} coalitions; one draw of {estimator} alone asks for {len(asked)}")
    return draws


def exact(game: Game, n: int) -> Estimate:
    """All 2^n coalitions; efficiency, symmetry, null player and linearity hold to rounding."""
    every = every_coalition(n)
    worths = game(every.coalitions)
    bad = np.flatnonzero(~np.isfinite(worths))
    if len(bad):
        raise OptionError(
            f"exact values need every coalition, and {len(bad)} of {len(worths)} have no finite worth; "
            "the estimators that draw leave them out"
        )
    values = every.weights @ (worths - worths[0])  # the weights sum to 0: this only makes equal worths exactly 0
    return Estimate("exact", values, np.zeros(n), every.coalitions, every.weights, worths, 1)


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
    entry = ESTIMATORS.get(estimator)
    least = entry.least(n) if entry else n + 1
    if budget is not None and budget < least:
        needed = (
            f"one order of {n} players alone needs {least}" if least > 2 else "at least 2 are needed: nobody, and all"
        )
        raise OptionError(f"a budget of {budget} coalitions; {needed}")
    if entry and entry.whole and budget is not None and budget < 2**n:
        raise OptionError(f"a budget of {budget} coalitions; exact values of {n} players need {2**n}")


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
    asked = [(draw, np.array([worths[row.tobytes()] for row in draw.coalitions])) for draw in draws]
    good = [(draw, v) for draw, v in asked if np.isfinite(v).all()]
    if not good:
        raise OptionError("no draw of coalitions has finite worths throughout; nothing can be said of any player")
    return [draw for draw, _ in good], np.array([draw.weights @ v for draw, v in good])


def _averaged(estimator: str, draws: list[Draw], worths: dict[bytes, float]) -> Estimate:
    good, by_draw = _finite(draws, worths)
    joined = join(good)
    finite = np.array([worths[row.tobytes()] for row in joined.coalitions])
    values, se = mean_and_error(by_draw, reach=float(np.ptp(finite)))
    return Estimate(estimator, values, se, joined.coalitions, joined.weights / len(good), finite, len(good))


def _fitted(fit: Fit, draws: list[Draw], worths: dict[bytes, float]) -> Estimate | None:
    coalitions = np.unique(np.concatenate([draw.coalitions for draw in draws]), axis=0)
    return fit(coalitions, np.array([worths[row.tobytes()] for row in coalitions]))


def _values(fit: Fit | None, draws: list[Draw], worths: dict[bytes, float]) -> tuple[Floats, Floats]:
    """Values and standard errors after these draws; NaN where they are too few."""
    n = draws[0].coalitions.shape[1]
    if fit is not None:
        fitted = _fitted(fit, draws, worths)
        return (fitted.values, fitted.se) if fitted else (np.full(n, np.nan), np.full(n, np.nan))
    try:
        good, by_draw = _finite(draws, worths)
        finite = [worths[row.tobytes()] for draw in good for row in draw.coalitions]
        return mean_and_error(by_draw, reach=float(np.ptp(finite)))
    except OptionError:
        return np.full(n, np.nan), np.full(n, np.nan)


def _reached(fit: Fit | None, draws: list[Draw], worths: dict[bytes, float], target: float) -> bool:
    """Whether all standard errors are small enough, with what few draws leave uncertain of them."""
    values = _values(fit, draws, worths)[1]
    few = student(len(draws)) / Z if len(draws) > 1 else math.inf
    return bool(np.isfinite(values).all() and values.max() * few <= target)


def _checkpoints(draws: int) -> list[int]:
    """At most two dozen places, evenly spaced on a log scale."""
    return sorted({round(x) for x in np.geomspace(1, draws, 24)} | {draws}) if draws else []


def _gates_bias(n: int, options: Mapping[str, Any]) -> str:
    return "what the worth does between gates of 0 and 1, where coalitions say nothing of it"


def _link_bias(n: int, options: Mapping[str, Any]) -> str:
    return "taking every coalition to be worth what its sum of Aumann–Shapley values is on the diagonal"


def _joint_bias(n: int, options: Mapping[str, Any]) -> str:
    return "a prior that the gates tell nearly what coalitions are worth, which fades with more pairs"


def _regression_bias(n: int, options: Mapping[str, Any]) -> str:
    return "the penalty on the size-dependent terms, which vanishes with more pairs"


ESTIMATORS = Registry(
    "estimator",
    "lora_lab.estimators",
    Estimator,
    {
        "exact": Estimator(None, about="the definition: all 2ⁿ coalitions of n players"),
        "permutation": Estimator(
            permutation, about="marginal contributions along random orders (Castro et al. 2009); unbiased"
        ),
        "antithetic": Estimator(antithetic, about="the same of each order and its reverse; unbiased"),
        "stratified": Estimator(stratified, about="the same of each order and all its rotations; unbiased"),
        "owen": Estimator(
            owen, bias=owen_bias, about="∫₀¹ E[v(R_p ∪ i) − v(R_p)] dp over a grid of p (Okhrati & Lipani 2020)"
        ),
        "regression": Estimator(
            regression,
            fit_pairs,
            _regression_bias,
            about="a fit to the worths of pairs of complements, sizes by leverage (Musco & Witter 2025)",
        ),
        "gates": Estimator(
            gates.nothing,
            bias=_gates_bias,
            control=gates.additive,
            about="Aumann–Shapley: ∫₀¹ ∂f/∂gᵢ dt with all gates at t, from gradients at a few t and no coalition",
        ),
        "link": Estimator(
            gates.nothing,
            bias=_link_bias,
            control=gates.link,
            about="Shapley values of h(S) = ψ(Σ_{i∈S} ASᵢ / Σ AS): AS those of gates, ψ the worth at equal gates",
        ),
        "permutation+link": Estimator(
            permutation, control=gates.link, about="values of link, and permutation of what link leaves; unbiased"
        ),
        "antithetic+link": Estimator(
            antithetic, control=gates.link, about="values of link, and antithetic of what link leaves; unbiased"
        ),
        "taylor": Estimator(
            gates.nothing,
            ranking=rankings.taylor,
            about="∂f/∂gᵢ with all gates at 1 (Molchanov et al. 2017); ranks, no values",
        ),
        "sensitivity": Estimator(
            gates.nothing,
            ranking=rankings.sensitivity,
            about="E |∂f/∂gᵢ| over coalitions with i (after ShapLoRA, arXiv:2601.17921); ranks, no values",
        ),
        "drop": Estimator(
            gates.nothing,
            ranking=rankings.drop,
            about="share of Σ_x ‖ΔW x‖² (LoRA-drop, arXiv:2402.07721); ranks, no values",
        ),
        "joint": Estimator(
            balanced,
            bias=_joint_bias,
            control=joint,
            about="what gradients tell of every coalition, mended by a Gaussian process fitted to worths of pairs",
        ),
    },
)
"""Estimators of Shapley values by name."""
