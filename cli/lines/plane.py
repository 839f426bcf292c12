"""`lora-lab plane`: the plane through three adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_lab.analysis.lines.landscape import Plane
from lora_lab.cli.options import Computing, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, estimates, in_words, table


def command(
    adapters: Annotated[list[str], typer.Argument(help="Three adapters, or two with --base.")],
    question: Plane,
    task: OneTask,
    loading: Several,
    computing: Computing,
    output: Output,
) -> None:
    """The task's metrics on the plane through three adapters: one basin, or valleys with a ridge between them.

    Every point is an exact mix of the three ΔW (what each adapter adds to the weights) with weights that sum to 1;
    distances are those of ΔW. The dashed curve of the figure goes through all points whose size ‖ΔW‖ is the weighted
    mean of the adapters' own: inside of it ΔW has shrunk, so that a rise of the loss there need not be a barrier. With
    **--base** the third point is the base model itself.

    Every point costs one pass over the split: 15 × 15 of them by default. They are kept, so that a run that was cut
    off goes on.

    Example:  lora-lab plane a.safetensors b.safetensors c.safetensors --points 11
    """
    output.print(answer(question, adapters, loading, task, computing, output, doing="scoring a plane"), show)


def show(result: Any) -> None:
    """The corners, and how much better the plane becomes elsewhere."""
    n, split = result.provenance["examples"], result.parameters["split"]
    names = list(result.parameters["metrics"])
    rows = [
        (
            corner["adapter"],
            corner["x"],
            corner["y"],
            corner["norm"],
            *estimates(corner, names),
        )
        for corner in result.summary["corners"]
    ]
    headings = ("point", "x", "y", "‖ΔW‖", *map(in_words, names))
    table(f"The three points ({split} split, {n} examples)", headings, rows)
    console.print()
    for gain in result.summary["gains"]:
        ends, word = (gain["value"], gain["low"], gain["high"]), "better"
        if gain["value"] < 0:
            ends, word = (-gain["value"], -gain["high"], -gain["low"]), "worse"
        console.print(
            f"The best point by {in_words(gain['metric'])}, at ({gain['x']:.2f}, {gain['y']:.2f}), is {word} than the "
            f"best of the three by {estimate(*ends)} (chosen on half of the examples, compared on the others)."
        )
