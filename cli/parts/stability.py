"""`lora-lab stability`: what happens when parts of an adapter are dropped."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_lab.analysis.questions import Stability
from lora_lab.cli.options import Coalitions, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, in_words, table


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters.")],
    question: Stability,
    task: OneTask,
    loading: Several,
    computing: Coalitions,
    output: Output,
) -> None:
    """The task's metrics with only some layers' adapters on: by number, by probability, one left out, fixed patterns.

    A keep-set is the set of layers whose adapters stay on. An adapter is ε-stable over a family of keep-sets if the
    loss (or another metric) gets worse by at most ε whichever of them is kept; ε and the worst keep-set are reported
    for several families (a working definition after Kuditipudi et al. 2019). From the same keep-sets come both sides of
    CoTo's progressive-optimisation inequality, for masks with at least one layer on, as CoTo draws them, and for
    independent coins.

    Example:  lora-lab stability lora.safetensors coto.safetensors --samples 30
    """
    output.print(answer(question, adapters, loading, task, computing, output, doing="dropping layers"), show)


def show(result: Any) -> None:
    """The result as tables."""
    from lora_lab.results.rows import metrics_of

    metrics = list(metrics_of(result.parameters))
    for summary in result.summary["adapters"]:
        where = {"adapter": summary["adapter"], "rescaled": summary["rescaled"], "seed": summary["seed"]}
        scaled = ", updates × G/k" if summary["rescaled"] else ""
        n, split = result.provenance["examples"], result.parameters["split"]
        title = f"{summary['adapter']}{scaled} ({split} split, {n} examples)"
        rows = [
            (
                f"{row['family']} {row['label']}",
                row["sets"],
                *(cell for metric in metrics for cell in _cells(row, metric)),
            )
            for row in result.rows(**where)
        ]
        table(title, ("kept", "sets", *(name for metric in metrics for name in (in_words(metric), "worst"))), rows)
        console.print()
        _show_epsilon(summary)
        _show_inequality(summary)


def _cells(row: dict[str, Any], metric: str) -> tuple[str, float]:
    """Mean over the keep-sets with its interval, and the worst one."""
    return estimate(row[metric], row[f"{metric}_low"], row[f"{metric}_high"]), row[f"{metric}_worst"]


def _show_epsilon(summary: dict[str, Any]) -> None:
    rows = [
        (
            row["family"],
            in_words(row["metric"]),
            ("≥ " if row["lower_bound"] else "") + estimate(row["value"], row["low"], row["high"]),
            row["sets"],
            row["worst_set"],
        )
        for row in summary["epsilon"]
    ]
    title = f"ε of {summary['adapter']}: how much worse the worst of a family is (≥: of the sampled keep-sets only)"
    table(title, ("family", "metric", "ε [95 %]", "sets", "worst keep-set"), rows)
    console.print()


def _show_inequality(summary: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        return [estimate(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in ("left", "right", "gap")]

    rows = [(row["law"], f"{row['p']:g}", *cells(row)) for row in summary["inequality"]]
    title = "E[loss] ≥ Σ P(j) loss of the mean output of j players on; CoTo's masks have at least one on"
    table(title, ("masks", "p", "left [95 %]", "right [95 %]", "gap [95 %]"), rows)
    console.print()
