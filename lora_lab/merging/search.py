"""Options and coefficients of a merge, chosen on validation data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError, unknown
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.merging.task_models import MergeModels, mean_loss

COEFFICIENT = "coefficient"


@dataclass(frozen=True)
class Grid:
    """Values to be tried, one after the other."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Interval:
    """A range in which scipy looks for the lowest loss."""

    low: float
    high: float


@dataclass(frozen=True)
class Found:
    """What did best, and all that was tried."""

    options: Mapping[str, Any]
    coefficient: float
    trials: Sequence[Mapping[str, Any]]
    """Options, coefficient, and mean over the tasks of accuracy and loss on their validation splits."""


def parse(given: Sequence[str], method: str, options: Mapping[str, Any] | None = None) -> dict[str, Grid | Interval]:
    """['density=0.1,0.2', 'coefficient=0.1..2'] → what is to be tried for each; `options` are those that are set."""
    known: dict[str, Any] = {COEFFICIENT: 1.0, **MERGES[method].defaults(options)}
    found: dict[str, Grid | Interval] = {}
    for text in given:
        name, equals, values = text.partition("=")
        if name not in known:
            raise unknown(f"option of {method}", name, list(known))
        if name in (options or {}):
            raise OptionError(f"{name} is both set and searched")
        if name in found:
            raise OptionError(f"{name} is searched twice; all its values go into one list")
        try:
            if ".." in values:
                low, high = map(float, values.split(".."))
                if name != COEFFICIENT:
                    raise OptionError(f"search {text!r}: an interval can be searched for coefficient only")
                if not -math.inf < low < high < math.inf:
                    raise OptionError(f"search {text!r}: LOW..HIGH must be finite, LOW below HIGH")
                found[name] = Interval(low, high)
            else:
                whole = all(value.strip().lstrip("+-").isdigit() for value in values.split(","))
                kind: Callable[[str], Any] = (int if whole else float) if known[name] is None else type(known[name])
                if kind is bool:
                    kind = {"true": True, "false": False}.__getitem__
                tried = tuple(kind(value) for value in values.split(","))
                found[name] = Grid(tried)
                if any(isinstance(value, float) and not math.isfinite(value) for value in tried):
                    raise OptionError(f"search {text!r}: finite numbers are needed")
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"search {text!r}: NAME=VALUE,VALUE or coefficient=LOW..HIGH is needed") from error
        if not equals:
            raise OptionError(f"search {text!r}: NAME=VALUE,VALUE or coefficient=LOW..HIGH is needed")
    return found


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
