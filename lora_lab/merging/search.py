"""Options and coefficients of a merge, chosen on validation data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.merging.task_models import MergeModels, mean_loss

COEFFICIENT = "coefficient"


@dataclass(frozen=True)
class Grid:
    """Values to be tried, one after the other; OptionError unless numbers among them are finite."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if any(isinstance(value, float) and not math.isfinite(value) for value in self.values):
            raise OptionError("finite numbers are needed")


@dataclass(frozen=True)
class Interval:
    """A range in which scipy looks for the lowest loss; OptionError unless it is one."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise OptionError("the ends of an interval must be finite, the lower one below the other")


@dataclass(frozen=True)
class Found:
    """What did best, and all that was tried."""

    options: Mapping[str, Any]
    coefficient: float
    trials: Sequence[Mapping[str, Any]]
    """Options, coefficient, and mean over the tasks of accuracy and loss on their validation splits."""


def search(
    sources: Sources,
    method: str,
    spaces: Mapping[str, Grid | Interval],
    *,
    options: Mapping[str, Any] | None = None,
    coefficient: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The options and the coefficient with the best mean validation accuracy over the tasks (then the lowest loss).

    Grids are tried in all combinations. An interval of coefficients is searched by scipy's bounded scalar minimiser
    for the lowest mean loss, at most 25 values for each combination.
    """
    models = MergeModels(sources)
    names = [name for name in spaces if name != COEFFICIENT]
    grids = [space.values for name in names if isinstance(space := spaces[name], Grid)]
    where = spaces.get(COEFFICIENT, Grid((coefficient,)))
    trials: list[dict[str, Any]] = []
    combinations = list(itertools.product(*grids))
    total = len(combinations) * (len(where.values) if isinstance(where, Grid) else _EVALUATIONS)
    for combination in combinations:
        chosen = {**(options or {}), **dict(zip(names, combination, strict=True))}
        made = merge(sources, method, options=chosen, heads="keep-own").adapter.updates

        def judged(value: float, chosen: dict[str, Any] = chosen, made: Mapping[str, LowRank] = made) -> float:
            scaled = {name: float(value) * update for name, update in made.items()}
            scores = [models.scores(index, scaled, "validation") for index in models.indices]
            accuracy = sum(s.accuracy for s in scores) / len(scores)
            trials.append({**chosen, COEFFICIENT: float(value), "accuracy": accuracy, "loss": mean_loss(scores)})
            if progress:
                progress(len(trials), max(total, len(trials)))
            loss: float = trials[-1]["loss"]
            return loss if math.isfinite(loss) else math.inf

        if isinstance(where, Grid):
            for value in where.values:
                judged(value)
        else:
            from scipy.optimize import minimize_scalar

            minimize_scalar(
                judged,
                bounds=(where.low, where.high),
                method="bounded",
                options={"maxiter": _EVALUATIONS, "xatol": 0.005 * (where.high - where.low)},
            )
    best = max(trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))
    kept = {name: value for name, value in best.items() if name not in (COEFFICIENT, "accuracy", "loss")}
    return Found(kept, best[COEFFICIENT], trials)


_EVALUATIONS = 25
