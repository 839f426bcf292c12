"""`lora-lab checkpoints`: scores along training."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..analysis.landscape import Checkpoints
from .options import Computing, Loading, OneTask, Output
from .outputs import answer
from .terminal import console, estimate, table


def command(
    runs: Annotated[list[str], typer.Argument(help="Folders of checkpoints: NAME.checkpoints of train --save-every.")],
    question: Checkpoints,
    task: OneTask,
    loading: Loading,
    computing: Computing,
    output: Output,
) -> None:
    """How runs come to be good, mergeable and prunable along their training.

    At every step at which all runs have a checkpoint: the accuracy of each **alone**; the **midpoint** of the line
    between every two runs of one method, as ΔW or factors are averaged; the **average** of all runs of a method, of
    three or more; and each **pruned**, by default to every other layer. How far a model falls below the mean of its
    members alone stands beside it. The figure shows them over the optimiser steps, a colour a method, with p(t).

    A run is any folder that a Trainer has written checkpoint-STEP folders to. Every model costs one pass over the
    split; they are kept, so that a run that was cut off goes on.

    Example:  lora-lab checkpoints runs/coto-s0.checkpoints runs/coto-s1.checkpoints --examples 200
    """
    from ..analysis.along import common_checkpoints

    paths = [str(path) for path in common_checkpoints(runs)]
    output.print(answer(question, paths, loading, task, computing, output, doing="scoring checkpoints"), show)


def show(result: Any) -> None:
    """A table a step."""
    n, split = result.provenance["examples"], result.parameters["split"]
    for step in result.parameters["steps"]:
        rows = [
            (
                row["model"] + (f", {row['space']}" if row["space"] else ""),
                ", ".join(row["members"]),
                estimate(row["accuracy"], row["accuracy_low"], row["accuracy_high"]),
                estimate(row["drop"], row["drop_low"], row["drop_high"]) if row["model"] != "alone" else "",
                estimate(row["loss"], row["loss_low"], row["loss_high"]),
            )
            for row in result.rows(step=step)
        ]
        headings = ("model", "of", "accuracy", "below its members alone", "loss")
        table(f"After {step} steps ({split} split, {n} examples)", headings, rows, texts=2)
        console.print()
