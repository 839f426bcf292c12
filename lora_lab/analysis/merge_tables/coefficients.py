"""The coefficient of a merge, chosen on validation splits; and what merges of a set are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_lab.analysis.merge_tables.sets import MergeSet, MergeSpec
from lora_lab.errors import MismatchError, OptionError, TaskError, TunerError
from lora_lab.merging.validation.search import MergedUpdates, Replaced
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.tasks.scores.judging import Judge, all_shares, kept, one_metric, share
from lora_lab.tasks.task import Scores

CANNOT = (MismatchError, TaskError, TunerError, OptionError)
"""What a method raises that cannot merge a set."""

SetScores = list[list[Scores]]
"""For each place where a set is scored, scores: of one merge, or of all adapters alone that share the place."""


@dataclass(frozen=True)
class Alone(Change):
    """An adapter on its own task, as it is."""

    index: int

    def apply(self, models: MergeModels, examples: Examples) -> Scores:
        """Its scores; of one whose ΔW is no plain product, on a model of its own."""
        adapter = models.adapters[self.index]
        if adapter.why_not_additive is None:
            return models.scores(self.index, models.updates(self.index), examples)
        return score(models.tasks[self.index], adapter, examples.split, device=models.device)


@dataclass(frozen=True)
class Ensemble(Change):
    """The weighted mean of several adapters' logits on the task of one, with its head."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    index: int

    def apply(self, models: MergeModels, examples: Examples) -> Scores:
        """Its scores."""
        weights = [weight / sum(self.weights) for weight in self.weights]
        return models.ensemble(self.index, [models.updates(i) for i in self.members], weights, examples)


@dataclass(frozen=True)
class BaseAlone(Change):
    """The base model without any adapter on the task of one, with its head."""

    index: int

    def apply(self, models: MergeModels, examples: Examples) -> Scores:
        """Its scores."""
        return models.scores(self.index, models.nothing, examples)


OTHERS, ALL = "others", "all"
REPLACED = (OTHERS, ALL)
"""Which adapters give their place to nulls: all but the one whose task is scored, or all."""


@dataclass(frozen=True)
class Draw:
    """A null in the place of adapters, and which draw of it."""

    null: str
    replaced: str
    """One of REPLACED."""
    number: int
    seed: int

    def of(self, kept: int) -> Replaced:
        """What is replaced for the score on the task of one member."""
        return Replaced(self.null, (kept,) if self.replaced == OTHERS else (), self.number, self.seed)


@dataclass(frozen=True)
class Trial:
    """What a merge of a set came to."""

    curve: Mapping[str, Any]
    """Means over the tasks at every coefficient, on the validation splits (those of the adapters, if it has theirs)."""
    best: float
    """The coefficient that they choose."""
    tested: Mapping[float, SetScores]
    """The best coefficient, and 1 → scores on the split that is reported."""


@dataclass(frozen=True)
class CoefficientSearch:
    """A merge of a set at every coefficient on the validation splits, then the best one and 1 on the other split.

    With a draw of nulls it is the same in all but the score at 1, or takes the adapters' coefficient. Asks for scores,
    so that a worker can do it beforehand; raises one of CANNOT where the method cannot merge the set.
    """

    merge_set: MergeSet
    spec: MergeSpec
    coefficients: tuple[float, ...]
    draw: Draw | None = None
    metric: tuple[str, ...] = ()
    """By which the tasks are judged (see `Judge`)."""
    quick: bool = False
    """Whether a draw of nulls takes the coefficient that the adapters choose."""

    def evaluations(self, evaluator: Evaluator) -> int:
        """How many scores it asks for at most: all coefficients on validation splits, one or two on the other."""
        count = sum(map(len, self._groups(evaluator)))
        if self._follows:
            return count
        return (len(self.coefficients) + (2 if self.draw is None else 1)) * count

    def changes(self, evaluator: Evaluator) -> Iterator[tuple[str, Change]]:
        """All that it may ask for."""
        yield from (("validation", Alone(i)) for i in self.merge_set.members)
        for split in ("validation", evaluator.split):
            yield from ((split, change) for change in self._all(evaluator))
        if self._follows:
            yield from self._of_adapters.changes(evaluator)

    def __call__(self, evaluator: Evaluator) -> Trial:
        """Choose the coefficient, and score it."""
        if self._follows:
            trial = self._of_adapters(evaluator)
            return replace(trial, tested={trial.best: self._scores(evaluator, trial.best, evaluator.split)})
        evaluator.scores(self._all(evaluator), "validation")
        tried = {c: self._scores(evaluator, c, "validation") for c in self.coefficients}
        own = alone(evaluator, self.merge_set, "validation")
        curve, judged = _curve(tried, own, judges(evaluator, self.merge_set, "validation", self.metric))
        best = _best(curve["coefficient"], judged, curve["loss"])
        tested = dict.fromkeys((best, 1.0) if self.draw is None else (best,))
        return Trial(curve, best, {c: self._scores(evaluator, c, evaluator.split) for c in tested})

    @property
    def _follows(self) -> bool:
        """Whether it has the coefficient of the adapters."""
        return self.quick and self.draw is not None

    @property
    def _of_adapters(self) -> CoefficientSearch:
        return replace(self, draw=None)

    def _groups(self, evaluator: Evaluator) -> list[list[int]]:
        """For each place, the members on whose tasks a merge of their own is scored."""
        where = places(evaluator, self.merge_set)
        if self.draw is None or self.draw.replaced != OTHERS or len(where) == len(self.merge_set.members):
            return [[index] for index in where]
        return [list(self.merge_set.members)]

    def _all(self, evaluator: Evaluator) -> list[MergedUpdates]:
        """At every coefficient, in the order in which one merge after the other serves all of its own."""
        indices = itertools.chain(*self._groups(evaluator))
        return [self._change(index, c) for index in indices for c in self.coefficients]

    def _change(self, index: int, coefficient: float) -> MergedUpdates:
        merge = self.spec.method, self.spec.options, self.merge_set.members, self.merge_set.weights
        replaced = self.draw.of(index) if self.draw else None
        return MergedUpdates(*merge, coefficient, index, self.spec.rank, replaced)

    def _scores(self, evaluator: Evaluator, coefficient: float, split: str) -> SetScores:
        groups = self._groups(evaluator)
        return [evaluator.scores([self._change(index, coefficient) for index in group], split) for group in groups]


def places(evaluator: Evaluator, merge_set: MergeSet) -> tuple[int, ...]:
    """Members on whose tasks a set is scored: one for all of them where they share the task and the head."""
    different = {evaluator.models.index(i) for i in merge_set.members}
    return merge_set.members[:1] if len(different) == 1 else merge_set.members


def alone(evaluator: Evaluator, merge_set: MergeSet, split: str) -> SetScores:
    """Each member on its own task, as it is."""
    scores = evaluator.scores([Alone(i) for i in merge_set.members], split)
    one_place = len(places(evaluator, merge_set)) < len(merge_set.members)
    return [scores] if one_place else [[of_one] for of_one in scores]


def ensembles(evaluator: Evaluator, merge_set: MergeSet) -> list[Ensemble]:
    """The ensembles of all members on each one's task."""
    where = places(evaluator, merge_set)
    return [Ensemble(merge_set.members, merge_set.weights, index) for index in where]


def bases(evaluator: Evaluator, merge_set: MergeSet) -> list[BaseAlone]:
    """The base model on each one's task."""
    return [BaseAlone(index) for index in places(evaluator, merge_set)]


def judges(evaluator: Evaluator, merge_set: MergeSet, split: str, asked: Sequence[str]) -> list[Judge]:
    """By what each place is judged."""
    own = alone(evaluator, merge_set, split)
    where = zip(places(evaluator, merge_set), own, strict=True)
    drawn = evaluator.drawn(split)
    tasks = [(evaluator.tasks[index], scores[0]) for index, scores in where]
    return [Judge(task, drawn.of_task(task), asked, scores) for task, scores in tasks]


def kept_of(scores: SetScores, own: SetScores, by: Sequence[Judge]) -> float:
    """What a merge keeps of the adapters alone (see `kept`)."""
    return float(kept(by, _values(scores, by), _values(own, by)))


def _values(scores: SetScores, by: Sequence[Judge]) -> Floats:
    return np.array([judge.value(group) for judge, group in zip(by, scores, strict=True)])


def _curve(
    tried: Mapping[float, SetScores], alone: SetScores, by: Sequence[Judge]
) -> tuple[dict[str, Any], Sequence[float]]:
    """Means over the tasks at every coefficient, on the validation splits, and what is kept, by which one is chosen."""
    coefficients = sorted(tried)
    values, own = np.array([_values(tried[c], by) for c in coefficients]), _values(alone, by)
    means = {by[0].name: values.mean(1).tolist()} if one_metric(by) else {}
    curve = {
        "coefficient": coefficients,
        "normalised": share(values, own).mean(1).tolist() if all_shares(by) else [math.nan] * len(coefficients),
        "loss": [float(np.mean([loss(scores) for scores in tried[c]])) for c in coefficients],
        **means,
    }
    return curve, kept(by, values, own).tolist()


def _best(coefficients: Sequence[float], judged: Sequence[float], losses: Sequence[float]) -> float:
    """The coefficient at which most is kept, then that of least loss."""

    def rank(i: int) -> tuple[float, float]:
        kept, loss = judged[i], losses[i]
        return (-math.inf if math.isnan(kept) else round(kept, 12), -loss if math.isfinite(loss) else -math.inf)

    return coefficients[max(range(len(coefficients)), key=rank)]


def loss(scores: Sequence[Scores]) -> float:
    """Mean loss over examples, and over several adapters; NaN of a task without one."""
    return float(np.mean([s.mean_loss if "loss" in s.columns else math.nan for s in scores]))
