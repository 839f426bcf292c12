"""Points between adapters: what is scored on lines, planes and curves, once each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lora_lab.merging.paths import Paths
from lora_lab.scoring.changes import Change
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores


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
        models.tasks[0].require_finite(scores, f" with weights {at} in {self.space}")
        return scores


class LineModels(TaskModels):
    """A model that wears any mix of its adapters."""

    @cached_property
    def paths(self) -> Paths:
        """What mixes them."""
        return Paths(self.adapters)

    @cached_property
    def base(self) -> nn.Module:
        """The first task's base alone, a model of its own, in evaluation mode."""
        return self.tasks[0].model_on(self.device).eval()
