"""Questions about the loss around and between adapters, with every option, as in questions.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.analysis.question import Question
from lora_lab.analysis.questions import example_option, metric_option, player_option, split_option
from lora_lab.options import option
from lora_lab.registry import Later
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.result import Result
    from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Plane(Question):
    """The task's metrics on a grid of the plane through three adapters, or two and the base; see plane.py.

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
    metric: tuple[str, ...] = metric_option()
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.lines import plane

        super().check(adapters)
        plane.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every point of the grid."""
        from lora_lab.analysis.lines import plane

        self.check(adapters)
        return plane.answer(self, adapters, task, on)


@dataclass(frozen=True)
class Layerwise(Question):
    """The task's metrics with ΔW mixed in one layer (or group, see `players`) at a time, and a barrier each.

    All other layers are those of one adapter, then of the other. Intervals are of 95 % over the examples, by a paired
    bootstrap with `seed`.
    """

    kind = "layerwise"
    of_transforms = True

    points: int = option(11, "Points on each line, both ends among them.", least=2)
    players: str | Mapping[str, str] = player_option()
    metric: tuple[str, ...] = metric_option()
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.lines import layerwise

        super().check(adapters)
        layerwise.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every point of every layer's line, from both sides."""
        from lora_lab.analysis.lines import layerwise

        self.check(adapters)
        return layerwise.answer(self, adapters, task, on)


@dataclass(frozen=True)
class Curve(Question):
    """The task's metrics on curves with a trained control point between two adapters, beside the straight line and the
    line at kept norm; see curve.py.

    Control points are trained on the task's training split, from the midpoint on, and chosen on its validation split;
    every number is of `split`, with a 95 % interval over the examples by a paired bootstrap with `seed`.
    """

    kind = "curve"
    of_transforms = True

    shapes: tuple[str, ...] = option(
        ("bezier", "polychain"),
        "The curves that are trained: NAMES, with commas.",
        choices=Later("lora_lab.analysis.lines.curves.control_points", "CURVES"),
        title="curve",
    )
    spaces: tuple[str, ...] = option(
        ("delta", "aligned", "factors"),
        "What is mixed on the curve: NAMES, with commas.",
        choices=Later("lora_lab.analysis.lines.curves.curve", "CURVE_SPACES"),
        title="space",
    )
    points: int = option(21, "Points on each curve, both ends among them.", least=3)
    steps: int | None = option(None, "Optimiser steps of each control point; by default the task's.", least=1)
    learning_rate: float | None = option(None, "Peak learning rate; by default the task's.", flag="lr", above=0)
    batch_size: int | None = option(None, "Examples per batch; by default the task's.", least=1)
    rank: int | None = option(
        None,
        "Of the control point where ΔW is mixed; by default the sum of both adapters', as the midpoint has.",
        least=1,
    )
    checks: int = option(6, "How often the control point is scored on the validation split, and kept.", least=1)
    metric: tuple[str, ...] = metric_option()
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Of the training and the bootstrap.", least=0)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the answer hangs on."""
        return tuple(dict.fromkeys((self.split, "train", "validation")))

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.lines.curves import curve

        super().check(adapters)
        curve.check(self, adapters)

    def run(
        self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution(), *, folder: Path | None = None
    ) -> Result:
        """A row for every point of every curve; control points are saved as adapters in the folder."""
        from lora_lab.analysis.lines.curves import curve

        self.check(adapters)
        return curve.answer(self, adapters, task, on, folder)


@dataclass(frozen=True)
class Checkpoints(Question):
    """Runs along their training: every checkpoint alone and pruned, and what midpoints and averages of runs would be.

    The adapters are checkpoints (folders checkpoint-STEP, of a Trainer's output folder each run); steps that a run
    lacks are left out of all. Runs of one method are mixed with one another. See along.py.
    """

    kind = "checkpoints"
    of_transforms = True
    of_each = False

    spaces: tuple[str, ...] = option(
        ("delta", "factors", "matched"),
        "What is averaged for the midpoint of two runs, as on the line between adapters: NAMES, with commas.",
        choices=Later("lora_lab.merging.paths", "SPACES"),
        title="space",
    )
    keep: str = option(
        "every-other",
        "Modules that are kept of each pruned checkpoint: NAMES (with a number or names, top-norm:3, type:q,k).",
        names=Later("lora_lab.pruning.patterns", "KEEPS"),
    )
    metric: tuple[str, ...] = metric_option()
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.lines import along

        super().check(adapters)
        along.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every checkpoint, alone and pruned, and for every midpoint and average, at each step."""
        from lora_lab.analysis.lines import along

        self.check(adapters)
        return along.answer(self, adapters, task, on)


@dataclass(frozen=True)
class Sharpness(Question):
    """The largest eigenvalue and the trace of the loss' Hessian in every adapter's tensors, and the rates it allows.

    On so many examples of `split`, the training split by default, in evaluation mode; see sharpness.py.
    """

    kind = "sharpness"

    iterations: int = option(30, "Lanczos iterations at most; the residual tells whether they were enough.", least=2)
    probes: int = option(16, "Random vectors for the trace.", least=2)
    metric: tuple[str, ...] = option(
        (),
        "A metric of the task (repeatable) by which rates that were tried are told; by default the loss, of which the "
        "curvature is, and all that the task has.",
    )
    split: str = option("train", "NAMES.", choices=Later("lora_lab.tasks.splits", "SPLITS"))
    examples: int | None = option(200, "On so many examples of the split, drawn with seed 0.", least=1)
    seed: int = option(0, "Draws the vectors.", least=0)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every adapter and every set of tensors that it is measured in."""
        from lora_lab.analysis import sharpness

        self.check(adapters)
        return sharpness.answer(self, adapters, task, on)
