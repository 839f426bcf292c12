"""`lora-lab checkpoints`: scores along training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_lab.analysis.lines.landscape import Checkpoints
from lora_lab.cli import parsing
from lora_lab.cli.options import Computing, Loading, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimates, in_words, table
from lora_lab.options import option

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter


@dataclass(frozen=True)
class Runs(Several):
    """How checkpoints are read, and what their runs are called."""

    label: list[str] | None = option(
        None, "A name for tables and figures, once for each run; by default its folder's, with what tells it apart."
    )

    def load(self, paths: Sequence[str]) -> list[Adapter]:
        """The checkpoints, those of a run by its name and method."""
        from lora_lab.analysis.lines.along import named_runs

        return named_runs(Loading.load(self, paths), self.label or [], parsing.methods(self.group or []))


def command(
    runs: Annotated[list[str], typer.Argument(help="Folders of checkpoints: NAME.checkpoints of train --save-every.")],
    question: Checkpoints,
    task: OneTask,
    loading: Runs,
    computing: Computing,
    output: Output,
) -> None:
    """How runs come to be good, mergeable and prunable along their training.

    At every step at which all runs have a checkpoint, the task's metrics: of each **alone**; of the **midpoint** of the
    line between every two runs of one method, where the factors A and B or the updates ΔW = BA are averaged; of the
    **average** of all runs of a method, of three or more; and of each **pruned**, by default to every other layer. How
    much worse a model is than the mean of its members alone stands beside its main metric. The figure shows that over
    the optimiser steps, a colour a method, with p(t), CoTo's chance that an adapter is on at step t.

    A run is any folder that a Trainer has written checkpoint-STEP folders to. Every model costs one pass over the
    split; they are kept, so that a run that was cut off goes on.

    Example:  lora-lab checkpoints runs/coto-s0.checkpoints runs/coto-s1.checkpoints --examples 200
    """
    from lora_lab.analysis.lines.along import common_checkpoints

    paths = [str(path) for path in common_checkpoints(runs)]
    output.print(answer(question, paths, loading, task, computing, output, doing="scoring checkpoints"), show)


def show(result: Any) -> None:
    """A table a step."""
    n, split = result.provenance["examples"], result.parameters["split"]
    main, *others = result.parameters["metrics"]
    for step in result.parameters["steps"]:
        rows = [
            (
                row["model"] + (f", {row['space']}" if row["space"] else ""),
                ", ".join(row["members"]),
                *estimates(row, [main]),
                *(estimates(row, [f"{main}_worse"]) if row["model"] != "alone" else [""]),
                *estimates(row, others),
            )
            for row in result.rows(step=step)
        ]
        headings = ("model", "of", in_words(main), "worse than its members alone", *map(in_words, others))
        table(f"After {step} steps ({split} split, {n} examples)", headings, rows, texts=2)
        console.print()
