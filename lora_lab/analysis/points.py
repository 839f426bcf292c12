"""Points between adapters: what is scored on lines, planes and curves, once each, and what is said of each point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lora_lab.errors import DivergedError
from lora_lab.merging.paths import Paths
from lora_lab.results.stats import Floats, Sampled, proportion
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores

METRICS = ("loss", "error")


@dataclass(frozen=True)
class MixPoint(Change):
    """One place to be evaluated: weights over all adapters, and the space in which they act."""

    weights: tuple[float, ...]
    space: str

    @property
    def key(self) -> str:
        """Equal for points that are one model: an adapter alone is itself in every space, and no weight the base."""
        used = [(i, w) for i, w in enumerate(self.weights) if w]
        if not used:
            return "base"
        if len(used) == 1 and used[0][1] == 1:
            return f"own:{used[0][0]}"
        return self.space + ":" + ",".join(f"{i}={w:.12g}" for i, w in used) + f" {digests.of_transforms()}"

    def apply(self, models: LineModels, examples: Examples) -> Scores:
        """Scores of the mix; DivergedError where they are not finite."""
        if not any(self.weights):
            return models.score_base(examples)
        with models.wearing(models.paths.mix(self.weights, self.space)) as model:
            scores = models.score(model, examples)
        at = ", ".join(f"{weight:g}" for weight in self.weights)
        return finite_scores(scores, models, f"with weights {at} in {self.space}")


class LineModels(TaskModels):
    """A model that wears any mix of its adapters."""

    @cached_property
    def paths(self) -> Paths:
        """What mixes them."""
        return Paths(self.adapters)


def finite_scores(scores: Scores, models: LineModels, where: str) -> Scores:
    """These scores; DivergedError, which says where, if a loss is not finite."""
    odd = int((~np.isfinite(scores.loss)).sum())
    if odd:
        raise DivergedError(f"task {models.tasks[0].name}: the model's loss is not finite on {odd} examples {where}")
    return scores


def score_points(evaluator: Evaluator, points: Sequence[Change]) -> dict[str, Scores]:
    """Scores by the key of each change, every different point once; the evaluator is to build `LineModels`."""
    different = {point.key: point for point in points}
    evaluator.total = len(different)
    return dict(zip(different, evaluator.scores(list(different.values())), strict=True))


class ScoredPoints:
    """Scores of points, by key, and both metrics of all of them under one bootstrap resampling of the examples."""

    def __init__(self, scores: Mapping[str, Scores], seed: int) -> None:
        self._scores = scores
        self._index = {key: i for i, key in enumerate(scores)}
        values: dict[str, Any] = {
            "loss": [each.loss for each in scores.values()],
            "error": [each.wrong for each in scores.values()],
        }
        self._values = {metric: np.stack(values[metric]) for metric in METRICS}
        self._sampled = {metric: Sampled.of(self._values[metric], seed=seed) for metric in METRICS}

    def __len__(self) -> int:
        return len(self._scores)

    def line(self, points: Sequence[Change], metric: str) -> Sampled:
        """One metric of these points, in order; lines of one metric are paired."""
        return self._sampled[metric][[self._index[point.key] for point in points]]

    def values(self, points: Sequence[Change], metric: str) -> Floats:
        """One metric of these points on each example, [points, examples]."""
        return self._values[metric][[self._index[point.key] for point in points]].astype(np.float64)

    def cells(self, point: Change) -> dict[str, float]:
        """Loss and accuracy of a point with their intervals, as rows of results have them."""
        loss = self.line([point], "loss").estimate(lambda L: L[0])
        accuracy = proportion(self._scores[point.key].correct)
        return {
            **dict(zip(("loss", "loss_low", "loss_high"), loss, strict=True)),
            **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy, strict=True)),
        }
