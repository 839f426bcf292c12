"""`lora-lab compare-merges`: every merge on every adapter's own task."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..analysis.questions import CompareMerges
from .options import Computing, Output, Several, TaskEach
from .outputs import answer
from .terminal import console, estimate, number, table


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters of several tasks, or seeds of one.")],
    question: CompareMerges,
    task: TaskEach,
    loading: Several,
    computing: Computing,
    output: Output,
) -> None:
    """What every merge keeps of every adapter, on the adapter's own task and with its own head.

    Adapters of several tasks are merged in sets: those of one training method and seed, one a task. Adapters of one
    task are seeds, merged in ratios. The coefficient of each merge is chosen on the validation splits, the same for all
    tasks; the table shows the test split at that coefficient, and at 1. **normalised** is the share of the adapter's
    own accuracy. The ensemble averages the adapters' logits: no merge at all, at the cost of all of them.
    `lora-lab merge --methods` lists the merges.

    Example:  lora-lab compare-merges a.safetensors b.safetensors c.safetensors --methods ties,tsv,average
    """

    def fitting(loaded: Any, tasks: Any) -> dict[str, Any]:
        from ..merging.sources import base_of

        question.check_sets(loaded, tasks)
        return {"base": base_of(loaded, question.base_name, trust_record=task.trust_record)}

    doing = "merging and scoring"
    output.print(answer(question, adapters, loading, task, computing, output, doing=doing, more=fitting), show)


def show(result: Any) -> None:
    """The result as a table, a line for each merge and columns for each training method."""
    from ..results.result import grouped

    means = result.summary["by_method"]
    methods = list(dict.fromkeys(row["method"] for row in means))
    several = max(row["sets"] for row in means) > 1
    headings = ["merge"]
    for method in methods:
        name = method or "adapters"
        headings += [f"{name}\naccuracy", "\nnormalised", "\nat coef.", "\naccuracy at 1"]
    rows = []
    for head, members in grouped(means, "merge", "ratio"):
        cells = [head["merge"] + (f" {head['ratio']}" if head["ratio"] else "")]
        for method in methods:
            row = next((r for r in members if r["method"] == method), None)
            cells += _cells(result, row) if row else ["–"] * 4
        rows.append(cells)
    n = result.provenance["examples"]
    spread = "mean ± s.d. over sets, or [95 % interval] of one" if several else "95 % intervals"
    where = ", ".join(result.parameters["task_names"])
    table(f"Merges on {where} ({result.parameters['split']} split, {n} examples; {spread})", headings, rows)
    edges = [row for row in means if row["at_edge"]]
    if edges:
        console.print("* in some sets the best coefficient lies at the edge of those that were tried")
    for name, others in result.parameters.get("stands_for", {}).items():
        console.print(f"{name} stands for {' and '.join(others)}, too: the same sum at another coefficient")
    shared = {row["shared"] for row in result.summary.get("shared_initial_A", [])}
    if True in shared:
        console.print(
            f"adapters of {'every set' if shared == {True} else 'some sets'} share their initial A, "
            "as those trained with one --init-seed do"
        )
    for why in dict.fromkeys((row["merge"], row["why"]) for row in result.summary["skipped"]):
        console.print(f"left out: {why[0]}: {why[1]}")


def _cells(result: Any, row: dict[str, Any]) -> list[str]:
    if row["sets"] > 1:
        shown = [f"{number(row[key])} ± {number(row[f'{key}_spread'])}" for key in ("accuracy", "normalised")]
    else:
        found = next(
            r
            for r in result.summary["sets"]
            if r["chosen"] and all(r[key] == row[key] for key in ("merge", "method", "ratio"))
        )
        shown = [estimate(found[k], found[f"{k}_low"], found[f"{k}_high"]) for k in ("accuracy", "normalised")]
    if row["coefficient"] is None:
        return [*shown, "–", "–"]
    return [*shown, f"{row['coefficient']:.2g}" + ("*" if row["at_edge"] else ""), number(row["plain_accuracy"])]
