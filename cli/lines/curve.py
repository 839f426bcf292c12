"""`lora-lab curve`: curves with a trained control point between two adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_lab.analysis.lines.landscape import Curve
from lora_lab.cli.options import Computing, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, in_words, table


def command(
    adapters: Annotated[list[str], typer.Argument(help="Two adapters.")],
    question: Curve,
    task: OneTask,
    loading: Several,
    computing: Computing,
    output: Output,
) -> None:
    """Is there a curved valley between two adapters, and is it more than kept norm?

    A **bezier** (quadratic) or a **polychain** (one bend) is trained between the two: its control point starts halfway,
    learns from the task's own training data at a random place of the curve each step, and is chosen on the validation
    split. All is scored on the test split beside the straight line and the **matched line**, which is the straight one
    with the size ‖ΔW‖ of every module's update kept (ΔW = BA is what an adapter adds to a weight matrix): only what a
    curve gains over that is a valley. **delta** mixes ΔW itself, **factors** A and B, and **aligned** A and B once the
    second adapter's are turned onto the first's.

    The control points are saved beside the result as adapters, curve-SHAPE-SPACE.safetensors. A run that was cut off
    goes on from its last check.

    Example:  lora-lab curve a.safetensors b.safetensors --shapes bezier --steps 200
    """
    told: dict[str, Any] = {"doing": "training and scoring curves", "more": lambda *_: {"folder": output.output}}
    output.print(answer(question, adapters, loading, task, computing, output, **told), show)


def show(result: Any) -> None:
    """Barriers, what curves gain over lines, and how the control points came about."""
    n, split = result.provenance["examples"], result.parameters["split"]
    _show_barriers(result, f"Barriers (worse than the chord), and means over t ({split} split, {n} examples)")
    rows = [
        (f"{gain['space']}, {gain['path']}", gain["over"], in_words(gain["metric"]), _interval(gain))
        for gain in result.summary["gains"]
    ]
    table("How much lower the barrier of a curve is", ("curve", "than of", "metric", "difference"), rows, texts=3)
    console.print()
    for control in result.summary["controls"]:
        first, best = control["trace"][0], min(control["trace"], key=lambda row: row["validation_loss"])
        longer = control["length"] / control["line_length"] if control["line_length"] else None
        console.print(
            f"{control['space']}, {control['path']}: validation loss over the curve {first['validation_loss']:.3f} at "
            f"the midpoint, {best['validation_loss']:.3f} after {control['step']} steps"
            + (f"; {longer:.2f} times as long as the line." if longer else ".")
        )


def _show_barriers(result: Any, title: str) -> None:
    from lora_lab.results.kinds.analysis import MAIN_BARRIER

    means = {(row["space"], row["path"], row["metric"], row["by"]): row for row in result.summary["means"]}
    rows = []
    for row in result.summary["barriers"]:
        if row["barrier"] == MAIN_BARRIER and row["by"] == "t":
            mean = means[row["space"], row["path"], row["metric"], "t"]
            by_arc = means[row["space"], row["path"], row["metric"], "arc"]
            where = f"{row['space']}, {row['path']}"
            rows.append((where, in_words(row["metric"]), _interval(row), _interval(mean), _interval(by_arc)))
    headings = ("path", "metric", "barrier", "mean over t", "mean over arc length")
    table(title, headings, rows, texts=2)
    console.print()


def _interval(row: dict[str, Any]) -> str:
    return estimate(row["value"], row["low"], row["high"])
