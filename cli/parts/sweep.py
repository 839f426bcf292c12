"""`lora-lab sweep`: how much of adapters can be pruned away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from lora_lab.analysis.questions import Sweep
from lora_lab.cli.options import Coalitions, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, number, table
from lora_lab.options import option


@dataclass(frozen=True)
class Kinds:
    """What is pruned; everything if nothing is named."""

    structured: bool = option(False, "Patterns of modules.")
    unstructured: bool = option(False, "Single entries, over sparsities.")
    rank: bool = option(False, "Lower ranks.")


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters; several are summed up by training method.")],
    kinds: Kinds,
    question: Sweep,
    task: OneTask,
    loading: Several,
    computing: Coalitions,
    output: Output,
) -> None:
    """How good pruned adapters are: all patterns, sparsities and ranks (or those named), with random controls.

    ΔW = BA is what an adapter adds to a weight matrix. The table shows the task's main metric, or the first of
    `--metric`. A pattern names what is **kept**. Half of the layers by Shapley value are chosen on the validation
    split. Nothing is trained again after pruning.

    Example:  lora-lab sweep lora-s0.safetensors lora-s1.safetensors coto-s0.safetensors coto-s1.safetensors
    """
    named = tuple(name for name, wanted in vars(kinds).items() if wanted)
    question = replace(question, kinds=named or question.kinds)
    output.print(answer(question, adapters, loading, task, computing, output, doing="pruning"), show)


def show(result: Any) -> None:
    """The result as tables: adapters side by side, or methods where there are several seeds."""
    from lora_lab.results.rows import metrics_of

    metric = next(iter(metrics_of(result.parameters)))
    by_method = len({row["method"] for row in result.rows()}) < len(result.parameters["adapters"])
    for kind in result.parameters["kinds"]:
        rows = [row for row in (result.summary["by_method"] if by_method else result.rows()) if row["kind"] == kind]
        if not rows:
            continue
        columns = list(dict.fromkeys(str(row["method" if by_method else "adapter"]) for row in rows))
        shares: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows:
            cells = shares.setdefault((row["criterion"], row["label"]), {})
            cells[str(row["method" if by_method else "adapter"])] = _cell(row, by_method, metric)
        shown = [
            (
                label if label.partition(":")[0] == criterion else f"{criterion} {label}",
                *(cells.get(c, "–") for c in columns),
            )
            for (criterion, label), cells in shares.items()
        ]
        spread = "mean ± s.d. over adapters" if by_method else "95 % intervals"
        title = (
            f"{metric}, {kind} ({result.parameters['split']} split, {result.provenance['examples']} examples; {spread})"
        )
        table(title, ("kept", *columns) if kind == "structured" else (kind, *columns), shown)
        console.print()


def _cell(row: dict[str, Any], by_method: bool, metric: str) -> str:
    if by_method:
        return f"{number(row[metric])} ± {number(row[f'{metric}_spread'])}"
    return estimate(row[metric], row[f"{metric}_low"], row[f"{metric}_high"])
