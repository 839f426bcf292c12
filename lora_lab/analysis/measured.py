"""Metrics of scored models under one bootstrap resampling of the examples, so that differences between them are paired.

A metric is g(means of its sufficient columns). These are stacked over all models, their means are resampled, and g is
applied to each resample: so means, F1, correlations and perplexities of points are `Sampled` alike. What becomes of a
model is told as how much worse it is, in units of the metric: of a metric of which more is better, what is lost of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_lab.errors import TaskError, unknown
from lora_lab.results.stats import Floats, Sampled, proportion
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.tasks.scores.metrics import Column, Metric
from lora_lab.tasks.task import Scores, Split, Task

_ALWAYS = "loss"
"""Told besides the main metric, of tasks that have it."""
_OF_EVERY_SCORING = ("loss", "correct", "margin", "confidence", "brier")
"""Columns that scores have without what the model said."""


def require(task: Task, asked: Sequence[str]) -> None:
    """OptionError for a metric that the task lacks, naming those it has.

    A task of the user's own may know them only after a scoring, and nothing is raised before.
    """
    for name in asked:
        if task.metrics and name not in task.metrics:
            raise unknown(f"metric of task {task.name}:", name, list(task.metrics))


def chosen(task: Task, asked: Sequence[str]) -> list[str]:
    """Names of the metrics asked for; without, the task's main one and the loss where it is one of them."""
    require(task, asked)
    return list(dict.fromkeys(asked or [*task.metrics[:1], *(name for name in task.metrics if name == _ALWAYS)]))


def of_logits(task: Task, asked: Sequence[str]) -> bool:
    """Whether what the model said must be kept in scores for these metrics."""
    needed = {column for name in chosen(task, asked) for column in task.metric(name).needs}
    return task.needs_logits and not needed <= set(_OF_EVERY_SCORING)


def known(evaluator: Evaluator, first: Sequence[Change], asked: Sequence[str]) -> dict[str, Metric]:
    """The metrics asked for by name; the first change is scored where the task knows its columns only then.

    OptionError for a metric that the task lacks, TaskError for too few examples of one.
    """
    task = evaluator.task
    require(task, asked)
    if first and not task.metrics:
        (scores,) = evaluator.scores(first)
        task.columns(scores, evaluator.data)
    found = {name: task.metric(name) for name in chosen(task, asked)}
    for metric in found.values():
        metric.require(evaluator.examples)
    return found


def scored(evaluator: Evaluator, changes: Sequence[Change], asked: Sequence[str]) -> dict[str, Scores]:
    """Scores by the key of each change, every different one once, with all that the metrics asked for need.

    OptionError for a metric that the task lacks, TaskError for too few examples of one: before anything is scored, or
    after the first scoring where the task knows its columns only then.
    """
    different = {change.key: change for change in changes}
    evaluator.total = len(different)
    known(evaluator, list(different.values())[:1], asked)
    logits = of_logits(evaluator.task, asked)
    return dict(zip(different, evaluator.scores(list(different.values()), logits=logits), strict=True))


def told(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Metrics as the parameters of results have them: what each is, its unit, and whether more is better."""
    return {name: {"about": each.about, "unit": each.unit, "higher": each.higher} for name, each in metrics.items()}


def cells(name: str, value: tuple[float, float, float]) -> dict[str, float]:
    """A value and the ends of its interval, as rows have them."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))


class Measured:
    """Metrics of scored models, of the columns of each by the key of its change; TaskError as of `Metric.parts`."""

    def __init__(
        self, metrics: Mapping[str, Metric], found_columns: Mapping[str, Mapping[str, Column]], seed: int
    ) -> None:
        self.metrics = dict(metrics)
        """By name, the main one (or the first that was asked for) first."""
        self._index, self._seed = {key: i for i, key in enumerate(found_columns)}, seed
        found = list(found_columns.values())
        shared = [name for name in found[0] if all(name in each for each in found)]
        columns = {name: np.stack([each[name] for each in found]) for name in shared}
        self._parts = {name: metric.parts(columns) for name, metric in self.metrics.items()}
        self._sampled: dict[tuple[str, bool], Sampled] = {}

    @classmethod
    def of_scores(
        cls, task: Task, scores: Mapping[str, Scores], examples: Split, asked: Sequence[str], seed: int
    ) -> Measured:
        """Of the metrics asked for, or the task's main one and loss; TaskError for scores of other examples."""
        found = {key: task.columns(each, examples) for key, each in scores.items()}
        sizes = sorted({len(each) for each in scores.values()})
        if len(sizes) > 1:
            raise TaskError(f"task {task.name}: scores of {sizes[0]} and of {sizes[-1]} examples; as many are needed")
        return cls({name: task.metric(name) for name in chosen(task, asked)}, found, seed)

    @classmethod
    def of(cls, evaluator: Evaluator, changes: Sequence[Change], asked: Sequence[str], seed: int) -> Measured:
        """Of changes, which are scored first (see `scored`)."""
        return cls.of_scores(evaluator.task, scored(evaluator, changes, asked), evaluator.data, asked, seed)

    def __len__(self) -> int:
        return len(self._index)

    def beside(self, other: Measured) -> Measured:
        """The same models by the other's metrics, too, which may be of other examples."""
        if list(other._index) != list(self._index):
            raise ValueError("measures of other models cannot be put beside these")
        both = copy.copy(self)
        both.metrics, both._parts, both._sampled = self.metrics | other.metrics, self._parts | other._parts, {}
        return both

    @property
    def size(self) -> int:
        """On how many examples."""
        return int(next(iter(self._parts.values()))[0].shape[1])

    @property
    def told(self) -> dict[str, dict[str, Any]]:
        """The metrics as the parameters of results have them."""
        return told(self.metrics)

    def values(self, changes: Sequence[Change], name: str) -> Sampled:
        """A metric of these models, in order."""
        return self._of(name, worse=False)[self._places(changes)]

    def worse(self, changes: Sequence[Change], name: str) -> Sampled:
        """How bad these models are by a metric: it itself, or where more is better, its negative (a share's rest)."""
        return self._of(name, worse=True)[self._places(changes)]

    def examples(self, changes: Sequence[Change], name: str) -> Floats | None:
        """How bad these models are on each example, [models, examples]; None of a metric that is no mean of them."""
        metric, part = self.metrics[name], self._parts[name][0]
        if not metric.is_mean:
            return None
        return _turned(metric, part)[self._places(changes)].astype(np.float64)

    def influence(self, changes: Sequence[Change], name: str) -> Floats:
        """Numbers of the examples whose mean is the metric of each model, [models, examples] (`Metric.influence`)."""
        metric, parts = self.metrics[name], self._parts[name]
        return np.stack([metric.influence_of([part[i] for part in parts]) for i in self._places(changes)])

    def bad(self, changes: Sequence[Change], name: str) -> Floats:
        """How bad these models are, [models], without resamples."""
        metric, parts = self.metrics[name], self._parts[name]
        if metric.is_mean:
            found = _turned(metric, parts[0]).astype(np.float64).mean(1)
        else:
            with np.errstate(all="ignore"):
                found = metric.of(*(part.astype(np.float64).mean(1) for part in parts)) * (-1 if metric.higher else 1)
        return np.asarray(found)[self._places(changes)]

    def every_other(self, first: int) -> Measured:
        """The same of every other example, from the first or the second one on."""
        half = copy.copy(self)
        half._parts = {name: [part[:, first::2] for part in parts] for name, parts in self._parts.items()}
        half._sampled = {}
        return half

    def cells(self, change: Change) -> dict[str, float]:
        """Every metric of a model with its interval, as rows of results have them."""
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            part = self._parts[name][0]
            if metric.of_outcomes(part):
                value = proportion(part[self._index[change.key]])
            else:
                value = self.values([change], name).estimate(lambda means: means[0])
            found |= cells(name, value)
        return found

    def _places(self, changes: Sequence[Change]) -> list[int]:
        return [self._index[change.key] for change in changes]

    def _of(self, name: str, *, worse: bool) -> Sampled:
        """A metric of all models, or how bad they are by it, with its resamples."""
        worse = worse and self.metrics[name].higher
        if (name, worse) not in self._sampled:
            self._sampled[name, worse] = sampled(self.metrics[name], self._parts[name], self._seed, worse=worse)
        return self._sampled[name, worse]


def _turned(metric: Metric, part: Column) -> Column:
    """A column of which less is better: itself, or its opposite, of outcomes from 0 to 1 what is left to 1."""
    if not metric.higher:
        return part
    if part.dtype == np.bool_:
        return np.logical_not(part)
    return 1.0 - part.astype(np.float64) if metric.share else -part.astype(np.float64)


def sampled(metric: Metric, parts: Sequence[Column], seed: int, *, worse: bool) -> Sampled:
    """The metric of every model, [models], and of the same resamples of the examples for all.

    From its sufficient columns, each [models, examples]; with `worse` how bad they are by it, as `Measured.worse`.
    """
    worse = worse and metric.higher
    if metric.is_mean:
        return Sampled.of(_turned(metric, parts[0]) if worse else parts[0], seed=seed)
    models = len(parts[0])
    means = Sampled.of(np.concatenate(parts).astype(np.float64), seed=seed)

    def of(stacked: Floats) -> Floats:
        with np.errstate(all="ignore"):
            found = metric.of(*(part.reshape(-1) for part in stacked.reshape(len(parts), models, -1)))
        return (-found if worse else found).reshape(models, -1)

    return Sampled(of(means.means), of(means.samples))
