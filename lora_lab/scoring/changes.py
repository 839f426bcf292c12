"""Changes of adapted models, which an evaluator scores: states of layers, other adapters in the first one's place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.layout import Variant
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores


class Change(ABC):
    """A frozen dataclass that says how models are changed: small, and picklable for workers."""

    @property
    def key(self) -> str:
        """What its scores are known by, in journals, too: equal for equal changes of the same adapters and tasks."""
        return repr(self)

    @abstractmethod
    def apply(self, models: Any, examples: Examples) -> Scores:
        """Change the models (a `TaskModels`, or what the evaluator was told to build) and score them."""


@dataclass(frozen=True)
class LayerMask(Change):
    """A state for every adapted module, in the order of the evaluator's `names`; neighbours share prefixes."""

    states: Variant

    @cached_property
    def key(self) -> str:
        """A sign a module or rank (0, 1; x, <1> …: factors), and what the factors are."""
        states = [part for state in self.states for part in (state if isinstance(state, tuple) else (state,))]
        factors = sorted(set(states) - {0.0, 1.0})
        signs = {0.0: "0", 1.0: "1"} | {factor: f"<{i}>" if i else "x" for i, factor in enumerate(factors)}
        shown = (
            f"({''.join(signs[s] for s in state)})" if isinstance(state, tuple) else signs[state]
            for state in self.states
        )
        return "".join(shown) + "".join(f"*{factor!r}" for factor in factors)

    def apply(self, models: TaskModels, examples: Examples) -> Scores:
        """Scores of this one; the evaluator takes many at once."""
        return next(scores for _, scores in models.score_variants([self.states], examples))


@dataclass(frozen=True)
class Replacement(Change):
    """Another adapter in the first one's place: of the same tuner, in no other modules; ranks may differ.

    It is made where it is scored.
    """

    name: str
    """Tells it from all others that are made of this adapter."""
    make: Callable[[Adapter], Adapter | None] = field(compare=False)
    """Makes it of the first adapter; None for the base alone. Must be picklable for workers."""

    @property
    def key(self) -> str:
        """Its name, and the code that makes it."""
        return f"other:{self.name} {digests.of_transforms()}"

    def apply(self, models: TaskModels, examples: Examples) -> Scores:
        """Scores of the other adapter."""
        adapter = self.make(models.adapters[0])
        if adapter is None:
            return models.score_base(examples)
        with models.wearing(adapter) as model:
            return models.score(model, examples)
