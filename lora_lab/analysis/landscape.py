"""Questions about the loss around and between adapters, with every option, as in questions.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_lab.analysis.question import Question
from lora_lab.analysis.questions import example_option, split_option
from lora_lab.options import option
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.result import Result
    from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Plane(Question):
    """Loss and accuracy on a grid of the plane through three adapters, or two and the base; see plane.py.

    Distances are those of ΔW over all modules (Frobenius). Every number carries a 95 % interval over the examples, by a
    bootstrap with `seed`, paired between all points.
    """

    kind = "plane"
    of_transforms = True

    base: bool = option(False, "The base model (ΔW = 0) as third point, besides two adapters.")
    points: int = option(15, "Points on each side of the grid.", least=2)
    margin: float = option(
        0.25, "How far the grid goes beyond the three points, as a share of their extent.", least=0, most=10
    )
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis import plane

        super().check(adapters)
        plane.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every point of the grid."""
        from lora_lab.analysis import plane

        self.check(adapters)
        return plane.answer(self, adapters, task, on)
