"""Options and coefficients of a merge, chosen on validation data; a merge as what is scored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError
from lora_lab.geometry.nulls import null_adapter
from lora_lab.merging.budgets import EXACT, Rank
from lora_lab.merging.merged import MergeOptions, merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources, Weights
from lora_lab.merging.validation.task_models import MergeModels, mean_loss
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Build, Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.tasks import digests
from lora_lab.tasks.scores.judging import Judge
from lora_lab.tasks.task import Scores

COEFFICIENT = "coefficient"
_EVALUATIONS = 25
"""Coefficients of an interval at the most."""


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
    """Options, coefficient, and means over the tasks of their metric and loss on the validation splits.

    Of tasks that are judged by several metrics, each is a mean over those that have it. `place` is 1 of the best.
    """


@dataclass(frozen=True)
class Replaced:
    """Which adapters of a merge give their place to a null, and which draw of it."""

    null: str
    """A name of NULLS."""
    kept: tuple[int, ...]
    """Of the adapters that stay."""
    draw: int
    seed: int

    def apply(self, sources: Sources, members: Sequence[int]) -> Sources:
        """The sources, which are these members, with nulls in their places."""
        places = {place: i for place, i in enumerate(members) if i not in self.kept}
        nulls = {p: null_adapter(sources.adapters[p], self.null, self.seed, self.draw, i) for p, i in places.items()}
        return sources.replaced(nulls)


@dataclass(frozen=True)
class MergedUpdates(Change):
    """A merge of several adapters, times a coefficient, on the task of one, with its head.

    Its scores tell the rank, the bytes and the error of the merge.
    """

    method: str
    options: Mapping[str, Any]
    members: tuple[int, ...]
    weights: Weights | tuple[float, ...]
    coefficient: float
    index: int
    rank: Rank | None = EXACT
    """At which it comes back: of `MergeOptions`, or EXACT."""
    replaced: Replaced | None = None

    @property
    def key(self) -> str:
        """Its fields, and the code that merges."""
        return f"{self!r} {digests.of_transforms()}"

    def apply(self, models: MergeModels, examples: Examples) -> Scores:
        """Its scores; the merge is made once for all coefficients that come one after the other."""
        updates, told = models.latest(replace(self, coefficient=1.0, index=0).key, lambda: self._merged(models))
        scaled = {name: self.coefficient * update for name, update in updates.items()}
        return replace(models.scores(self.index, scaled, examples), told=told)

    def _merged(self, models: MergeModels) -> tuple[Mapping[str, LowRank], Mapping[str, float]]:
        sources = models.sources.part(self.members, self.weights)
        if self.replaced is not None:
            sources = self.replaced.apply(sources, self.members)
        # in float32: nothing is rounded before it is scored
        how: dict[str, Any] = {"exact": True} if self.rank == EXACT else {"rank": self.rank}
        made = merge(sources, self.method, options=self.options, heads="keep-own", dtype="float32", **how)
        updates, width = made.adapter.updates, MergeOptions().dtype_of(sources.adapters).itemsize
        size = width * sum(update.A.numel() + update.B.numel() for update in updates.values())
        rank = max(update.rank for update in updates.values())
        return updates, {"rank": rank, "bytes": size, "error": made.error}


Tried = tuple[dict[str, Any], list[float], set[str]]
"""What a trial came to, the score on each task, of which more is better, and by which metrics these are."""


@dataclass(frozen=True)
class _Combination:
    """A merge with certain options at coefficients of a grid, or of an interval in which scipy looks for the best.

    Asks for scores, so that a worker can do it beforehand.
    """

    merged: MergedUpdates
    coefficients: Grid | Interval
    indices: tuple[int, ...]
    """Of the sources that stand for every different task and head."""
    metric: tuple[str, ...] = ()
    """By which the tasks are judged (see `Judge`)."""

    def __call__(self, evaluator: Evaluator) -> list[Tried]:
        """What was tried, in this order."""
        trials: list[Tried] = []

        def judged(coefficient: float) -> float:
            coefficient = float(coefficient)
            scores = evaluator.scores([replace(self.merged, coefficient=coefficient, index=i) for i in self.indices])
            drawn = evaluator.drawn("validation")
            tasks = [evaluator.tasks[i] for i in self.indices]
            judges = [Judge(task, drawn.of_task(task), self.metric, s) for task, s in zip(tasks, scores, strict=True)]
            values = [judge.value([s]) for judge, s in zip(judges, scores, strict=True)]
            means = {
                name: float(np.mean([v for judge, v in zip(judges, values, strict=True) if judge.name == name]))
                for name in dict.fromkeys(judge.name for judge in judges)
            }
            if all("loss" in s.columns for s in scores):
                means["loss"] = mean_loss(scores)
            better = [value if judge.metric.higher else -value for judge, value in zip(judges, values, strict=True)]
            trials.append(
                ({**self.merged.options, COEFFICIENT: coefficient, **means}, better, {judge.name for judge in judges})
            )
            lowest = means.get("loss", -sum(better))
            return lowest if math.isfinite(lowest) else math.inf

        if isinstance(self.coefficients, Grid):
            for coefficient in self.coefficients.values:
                judged(coefficient)
        else:
            from scipy.optimize import minimize_scalar

            low, high = self.coefficients.low, self.coefficients.high
            options = {"maxiter": _EVALUATIONS, "xatol": 0.005 * (high - low)}
            minimize_scalar(judged, bounds=(low, high), method="bounded", options=options)
        return trials

    def parts(self, count: int) -> list[_Combination]:
        """About so many with some of the coefficients each; an interval is one, as each trial hangs on the last."""
        if isinstance(self.coefficients, Interval):
            return [self]
        values = self.coefficients.values
        size = -(-len(values) // count)
        return [replace(self, coefficients=Grid(values[i : i + size])) for i in range(0, len(values), size)]


def search(
    sources: Sources,
    method: str,
    spaces: Mapping[str, Grid | Interval],
    *,
    options: Mapping[str, Any] | None = None,
    coefficient: float = 1.0,
    rank: Rank | None = EXACT,
    metric: Sequence[str] = (),
    on: Execution = Execution(),
) -> Found:
    """The options and the coefficient with the best mean score over the tasks (then the lowest loss).

    Scores are of the validation splits, by the main metric of each task or the first `metric` that it has; of tasks
    that are judged by different ones, trials are ranked on each, and the best mean rank counts. Grids are tried in all
    combinations. An interval of coefficients is searched by scipy's bounded scalar minimiser for the lowest mean loss
    (of tasks without one, for the best score), at most 25 values for each combination. All are scored at the `rank` (of
    `MergeOptions`, or EXACT) at which the merge will come back.

    Without workers, this process tries them on the device of the sources. Workers try combinations side by side, and
    where these are fewer than the workers, the coefficients of a grid; an interval is searched by one worker. Nothing
    is kept in a journal: a merge can hang on more than what it is scored on.
    """
    models = MergeModels(sources)
    names = [name for name in spaces if name != COEFFICIENT]
    grids = [space.values for name in names if isinstance(space := spaces[name], Grid)]
    tried = spaces.get(COEFFICIENT, Grid((coefficient,)))
    members, indices = tuple(range(len(sources.adapters))), tuple(models.indices)
    combinations = []
    for values in itertools.product(*grids):
        settings = {**(options or {}), **dict(zip(names, values, strict=True))}
        merged = MergedUpdates(method, settings, members, sources.weights, 1.0, 0, rank)
        combinations.append(_Combination(merged, tried, indices, tuple(metric)))
    evaluator = _evaluator(models, on, reads_data=MERGES[method].reads_data)
    evaluator.total = len(combinations) * len(indices)
    evaluator.total *= len(tried.values) if isinstance(tried, Grid) else _EVALUATIONS
    if evaluator.on.confirm:
        evaluator.on.confirm(_cost(evaluator, combinations))
    if evaluator.on.workers:
        count = -(-evaluator.on.workers.size // len(combinations))
        evaluator.prepare([(part, ()) for combination in combinations for part in combination.parts(count)])
    trials = [trial for combination in combinations for trial in combination(evaluator)]
    order = _order(trials)
    for place, i in enumerate(order, start=1):
        trials[i][0]["place"] = place
    best = trials[order[0]][0]
    kept = {name: best[name] for name in {**(options or {}), **dict.fromkeys(names)}}
    return Found(kept, best[COEFFICIENT], [trial for trial, *_ in trials])


def _order(trials: Sequence[Tried]) -> list[int]:
    """Places of the trials, the best first."""
    scores = np.array([better for _, better, _ in trials])
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    if len(trials[0][2]) > 1:
        from scipy.stats import rankdata

        scores = rankdata(scores, axis=0)
    means, losses = scores.mean(1), [trial.get("loss", 0.0) for trial, *_ in trials]
    return sorted(range(len(trials)), key=lambda i: (-means[i], losses[i] if math.isfinite(losses[i]) else math.inf))


def _evaluator(models: MergeModels, on: Execution, *, reads_data: bool) -> Evaluator:
    """Scores on the validation splits, here on these models; workers have the training data, too, where it is read."""
    sources = models.sources
    assert sources.tasks is not None
    build: Build = partial(MergeModels.of, sources.base) if on.workers else lambda *_: models
    more = ["train"] * reads_data
    return Evaluator(
        sources.adapters, sources.tasks, replace(on, cache=None), split="validation", more_splits=more, build=build
    )


def _cost(evaluator: Evaluator, combinations: Sequence[_Combination]) -> Cost:
    """All scores, and what the method reads of the tasks for every combination."""
    assert evaluator.total is not None
    passes: float = evaluator.total
    for combination in combinations:
        merged = combination.merged
        passes += MERGES[merged.method].examples_read(merged.options, evaluator.tasks) / evaluator.examples
    return Cost(evaluator.total, 0, 0, evaluator.seconds(passes))
