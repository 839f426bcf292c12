"""`lora-lab sharpness`: the curvature of the loss around adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_lab.analysis.lines.landscape import Sharpness
from lora_lab.cli.options import Computing, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, in_words, table


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters.")],
    question: Sharpness,
    task: OneTask,
    loading: Several,
    computing: Computing,
    output: Output,
) -> None:
    """How sharp the loss is around adapters, and the largest learning rates at which training is stable there.

    λ is the largest eigenvalue of the Hessian, the second derivatives of the loss by the factors A and B of the
    adapter: as **trained**, which is what a learning rate sees; **balanced** (A and B made equally large, which leaves
    the model as it is), to compare adapters; and at the **initial** adapter, where lora-lab trained it. Gradient
    descent is stable up to 2/λ, with momentum up to 3.8/λ, and Adam up to 38/λ of the Hessian that its second moment
    scales. The rates that `train --lr` tried stand beside them (figure sharpness:rates).

    Example:  lora-lab sharpness lora.safetensors coto.safetensors --examples 200
    """
    output.print(answer(question, adapters, loading, task, computing, output, doing="measuring curvature"), show)


def show(result: Any) -> None:
    """Curvature and rates of every adapter, and the rates tried."""
    n, split = result.provenance["examples"], result.parameters["split"]
    rows = [
        (
            row["adapter"],
            row["at"],
            estimate(row["sharpness"], row["sharpness_low"], row["sharpness_high"]),
            f"{row['residual']:.1e}",
            estimate(row["trace"], row["trace_low"], row["trace_high"]),
            *(_short(row[f"rate_{name}"]) for name in ("gd", "momentum", "adam")),
        )
        for row in result.rows()
    ]
    headings = ("adapter", "tensors", "λ [95 %]", "residual", "trace", "GD ≤", "momentum ≤", "Adam ≤")
    table(f"Curvature and largest stable rates ({split} split, {n} examples)", headings, rows, texts=2)
    console.print()
    names = list(result.parameters["metrics"])
    tried = [
        (
            row["adapter"],
            _short(row["rate"]),
            *(row[name] for name in names),
            "✓" if row["chosen"] else "",
        )
        for row in result.summary["rates"]
    ]
    if tried:
        columns = ("adapter", "rate", *(f"validation {in_words(name)}" for name in names), "")
        table("Rates tried, by the records", columns, tried)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
