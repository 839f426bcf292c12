"""`lora-lab compare`: adapters side by side by their weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ..geometry.comparing import Compare
from .options import Output, Several
from .outputs import Outputs, save_tables
from .terminal import console, number, progress, say_written, table

_SHOWN = 60  # pairs; all are in the JSON


def command(
    adapters: Annotated[list[str], typer.Argument(help="Two adapters or more.")],
    question: Compare,
    loading: Several,
    output: Output,
) -> None:
    """How alike adapters are, by their weights alone: no model, no data, and nothing hangs on how ΔW is factored.

    Of every pair: norms, cosine and distance of ΔW; the angles between its column spaces (left) and row spaces (right),
    and how many times more they overlap than random ones would (overlap / chance); and whether both began from one A.
    In total, by layer and by type. Duplicates are named, and many adapters are ordered by likeness.

    Example:  lora-lab compare a.safetensors b.safetensors c.safetensors
    """
    outputs = Outputs(output.output, question.kind)
    beside = outputs.beside(output)
    loaded = loading.load(adapters)
    question.check(loaded)
    result = outputs.earlier(question.run_id(loaded), force=output.force)
    if result is None:
        with progress("comparing") as report:
            result = question.run(loaded, report)
        say_written(outputs.save(result))
    save_tables(result, beside)
    output.print(result, show)


def show(result: Any) -> None:
    """Each adapter, each pair, the parts of a single pair, duplicates and the order."""
    totals = {row["adapter"]: row for row in result.summary["parts"] if row["level"] == "total"}
    about = ("norm", "sigma", "effective_rank", "stable_rank")
    rows = [
        (one["adapter"], one["hash"], one["modules"], one["rank"], *(totals[one["adapter"]][key] for key in about))
        for one in result.summary["adapters"]
    ]
    table(
        "Adapters", ("", "hash of ΔW", "modules", "rank", "‖ΔW‖", "σ₁", "effective rank", "stable rank"), rows, texts=2
    )
    pairs = result.rows(level="total")
    _pairs("Pairs", ("", ""), [((row["first"], row["second"]), row) for row in pairs[:_SHOWN]])
    if len(pairs) > _SHOWN:
        console.print(f"and {len(pairs) - _SHOWN} more; --json lists them")
    if len(pairs) == 1:
        for level in result.parameters["levels"]:
            _pairs(f"By {level}", ("",), [((row["group"],), row) for row in result.rows(level=level)])
    for row in pairs[:_SHOWN]:
        if row["A_shared"]:
            console.print(
                f"{row['first']} and {row['second']} share their initial A, as those trained with one seed do"
            )
    for row in pairs[:_SHOWN] if result.parameters["signs"] else ():
        shares = f"{number(row['sign_agreement'])} of their entries ({number(row['sign_expected'])} were they normal)"
        console.print(f"{row['first']} and {row['second']} agree in the sign of {shares}")
    for twins in result.summary["twins"]:
        what = "the same ΔW up to rounding" if twins["equal"] else f"near-duplicates (cosine {twins['cosine']:.6f})"
        console.print(f"{twins['first']} and {twins['second']} are {what}")
    if len(pairs) > 1:
        order = [result.summary["adapters"][i]["adapter"] for i in result.summary["order"]]
        console.print(f"by likeness: {', '.join(order)}")


def _pairs(title: str, names: Sequence[str], rows: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> None:
    """A line for each pair or part, named by the first cells."""
    headings = (
        "‖ΔW‖ ratio",
        "σ₁ ratio",
        "cosine",
        "distance",
        "overlap\nleft",
        "/ chance",
        "overlap\nright",
        "/ chance",
    )
    keys = ("norm_ratio", "sigma_ratio", "cosine", "distance")
    keys += ("left_overlap", "left_over_chance", "right_overlap", "right_over_chance")
    more = ("mean angle\nleft", "\nright", "cosine of A", "z")
    cells = [
        (*name, *(row[key] for key in (*keys, "left_mean", "right_mean", "A_cosine")), number(row["A_z"], 1))
        for name, row in rows
    ]
    table(title, (*names, *headings, *more), cells, texts=len(names))
