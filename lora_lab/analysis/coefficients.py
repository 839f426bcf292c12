"""The coefficient of a merge, chosen on validation splits; and what merges of a set are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_lab.analysis.merge_sets import MergeSet, MergeSpec
from lora_lab.errors import MismatchError, OptionError, TaskError, TunerError
from lora_lab.merging.search import MergedUpdates, Replaced
from lora_lab.merging.task_models import MergeModels
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
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
    """Means over the tasks at every coefficient, on the validation splits."""
    best: float
    """The coefficient that they choose."""
    tested: Mapping[float, SetScores]
    """The best coefficient, and 1 → scores on the split that is reported."""


@dataclass(frozen=True)
class CoefficientSearch:
    """A merge of a set at every coefficient on the validation splits, then the best one and 1 on the other split.

    With a draw of nulls it is the same in all but the score at 1. Asks for scores, so that a worker can do it
    beforehand; raises one of CANNOT where the method cannot merge the set.
    """

    merge_set: MergeSet
    spec: MergeSpec
    coefficients: tuple[float, ...]
    draw: Draw | None = None

    def evaluations(self, evaluator: Evaluator) -> int:
        """How many scores it asks for at most: all coefficients on validation splits, one or two on the other."""
        count = sum(map(len, self._groups(evaluator)))
        return (len(self.coefficients) + (2 if self.draw is None else 1)) * count

    def changes(self, evaluator: Evaluator) -> Iterator[tuple[str, Change]]:
        """All that it may ask for."""
        yield from (("validation", Alone(i)) for i in self.merge_set.members)
        for split in ("validation", evaluator.split):
            yield from ((split, change) for change in self._all(evaluator))

    def __call__(self, evaluator: Evaluator) -> Trial:
        """Choose the coefficient, and score it."""
        evaluator.scores(self._all(evaluator), "validation")
        tried = {c: self._scores(evaluator, c, "validation") for c in self.coefficients}
        curve = _curve(tried, alone(evaluator, self.merge_set, "validation"))
        best = _best(curve)
        tested = dict.fromkeys((best, 1.0) if self.draw is None else (best,))
        return Trial(curve, best, {c: self._scores(evaluator, c, evaluator.split) for c in tested})

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


def kept_share(scores: SetScores, own: SetScores) -> float:
    """The mean over the tasks of accuracy as a share of the adapters' own; of accuracy, where that is 0."""
    accuracy = np.array([correct(group).mean() for group in scores])
    shares = share(accuracy, np.array([correct(group).mean() for group in own]))
    return float((shares if np.isfinite(shares).all() else accuracy).mean())


def _curve(tried: Mapping[float, SetScores], alone: SetScores) -> dict[str, Any]:
    """Means over the tasks at every coefficient, on the validation splits."""
    coefficients = sorted(tried)
    groups = [tried[c] for c in coefficients]
    accuracies = np.array([[correct(scores).mean() for scores in group] for group in groups])
    own = np.array([correct(scores).mean() for scores in alone])
    return {
        "coefficient": coefficients,
        "accuracy": accuracies.mean(1).tolist(),
        "normalised": share(accuracies, own).mean(1).tolist(),
        "loss": [float(np.mean([loss(scores) for scores in group])) for group in groups],
    }


def _best(curve: Mapping[str, Any]) -> float:
    """The coefficient of the highest mean normalised accuracy (of accuracy, where that is none), then of least loss."""
    judged = curve["normalised"] if np.isfinite(curve["normalised"]).all() else curve["accuracy"]

    def rank(i: int) -> tuple[float, float]:
        loss = curve["loss"][i]
        return round(judged[i], 12), -loss if math.isfinite(loss) else -math.inf

    best: float = curve["coefficient"][max(range(len(curve["coefficient"])), key=rank)]
    return best


def share(accuracy: Floats, own: Floats) -> Floats:
    """Accuracy as a share of the adapter's own; NaN where that is 0."""
    shares: Floats = np.divide(accuracy, own, out=np.full(np.broadcast(accuracy, own).shape, np.nan), where=own > 0)
    return shares


def correct(scores: Sequence[Scores]) -> Floats:
    """Correctness of each example, a mean over several adapters."""
    values: Floats = np.mean([s.correct for s in scores], axis=0, dtype=np.float64)
    return values


def loss(scores: Sequence[Scores]) -> float:
    """Mean loss over examples, and over several adapters."""
    return float(np.mean([s.mean_loss for s in scores]))
