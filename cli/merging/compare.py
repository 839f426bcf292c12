"""`lora-lab compare`: adapters side by side by their weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.analysis.comparing import Compare
from lora_lab.cli.options import Device, Output, Several, told
from lora_lab.cli.outputs import Outputs, save_tables
from lora_lab.cli.terminal import console, number, progress, say_written, table
from lora_lab.options import option
from lora_lab.scoring.execution import Execution

_SHOWN = 60  # pairs; all are in the JSON
_SAME_NORM = 1e-3  # of a ratio of norms that is not worth telling


@dataclass(frozen=True)
class Beside:
    """What the adapters are put beside, and whether it is drawn."""

    base: Path | None = option(
        None,
        "Checkpoint of the base: also count the intruders (leading directions of W + ΔW that are like none of W's) and "
        "the share of ΔW among W's leading directions. Every weight is decomposed, one at a time, and kept beside the "
        "result.",
    )
    results: list[Path] | None = option(
        None,
        "compare-merges.json of these adapters: also tell how well cosine, overlap … predict what merges lose "
        "(repeatable).",
    )
    figure: bool = option(False, "Also draw it, as `lora-lab figure VERB.json` does at any time.")


def command(
    adapters: Annotated[list[str], typer.Argument(help="Two adapters or more; one will do with --base.")],
    question: Compare,
    beside: Beside,
    loading: Several,
    device: Device,
    output: Output,
) -> None:
    """How alike adapters are, by their weights alone: no model, no data, and nothing hangs on how ΔW is factored.

    Of every pair: norms, cosine and distance of ΔW = BA, which an adapter adds to the weights; the angles between its
    column spaces (left) and row spaces (right), and how many times more they overlap than random ones would (overlap /
    chance); and whether both began from one initial A (the mean cosine of their A, and z, how many standard deviations
    of chance that is). In total, by layer and by type. Duplicates are named, and many adapters are ordered by likeness.
    With --base, also what ΔW adds to the directions of the base's weights; with --results, whether any of this tells
    what merges lose.

    Example:  lora-lab compare a.safetensors b.safetensors c.safetensors
    """
    from lora_lab.results.result import Result

    outputs = Outputs(output.output, question.kind, drawn=beside.figure)
    tables = outputs.beside(output)
    loaded = loading.load(adapters)
    merges = [Result.load(path) for path in beside.results or ()]
    question.check(loaded, beside.base, merges)
    result = outputs.earlier(question.run_id(loaded, beside.base, merges), force=output.force)
    if result is None:
        with progress("comparing") as report:
            where = device.resolved() if beside.base else None
            on = Execution(device=where, cache=outputs.cache, progress=report, confirm=told)
            result = question.run(loaded, on, base=beside.base, merges=merges)
        say_written(outputs.save(result))
    save_tables(result, tables)
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
    pairs = result.rows(level="total") if len(result.summary["adapters"]) > 1 else []
    if pairs:
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
        console.print(f"{twins['first']} and {twins['second']} are {_how_alike(twins)}")
    if "inside" in result.summary:
        _in_base(result)
    if "forecast" in result.summary:
        _forecast(result.summary["forecast"])
    if len(pairs) > 1:
        order = [result.summary["adapters"][i]["adapter"] for i in result.summary["order"]]
        console.print(f"by likeness: {', '.join(order)}")


def _how_alike(twins: Mapping[str, Any]) -> str:
    if twins["equal"]:
        return "the same ΔW up to rounding"
    scaled = f", ‖ΔW‖ as {twins['norm_ratio']:.4g} : 1" if abs(twins["norm_ratio"] - 1) > _SAME_NORM else ""
    return f"near-duplicates (cosine {twins['cosine']:.6f}, {twins['difference']:.1e} of ΔW apart{scaled})"


def _in_base(result: Any) -> None:
    """Intruders and shares of each adapter, and of a single one by layer and type."""
    headings = (
        "",
        "modules",
        "intruders",
        "of",
        "least\nsimilar",
        "share\nleft",
        "/ chance",
        "share\nright",
        "/ chance",
        "‖ΔW‖ / ‖W‖",
    )
    keys = ["modules", "intruders", "looked_at", "least_similar", "left_share", "left_over_chance", "right_share"]
    keys += ["right_over_chance", "norm_ratio"]
    alone = len(result.summary["adapters"]) == 1
    for level in ("total", *(result.parameters["levels"] if alone else ())):
        rows = [row for row in result.summary["inside"] if row["level"] == level]
        cells = [(row["group"] or row["adapter"], *(row[key] for key in keys)) for row in rows]
        table(f"In {result.parameters['base']}" + f", by {level}" * (level != "total"), headings, cells)


def _forecast(rows: Sequence[Mapping[str, Any]]) -> None:
    """How well each number of pairs tells what each merge loses."""
    cells = [
        (
            *(row[key] for key in ("merge", "outcome", "predictor", "sets", "correlation")),
            "–" if row["correlation"] is None else f"{row['correlation_low']:.2f} to {row['correlation_high']:.2f}",
        )
        for row in rows[:_SHOWN]
    ]
    headings = ("merge", "what is lost", "predictor", "sets", "rank correlation", "95 % interval")
    table("What merges lose, by predictor", headings, cells, texts=3)
    more = f"and {len(rows) - _SHOWN} more, which --json lists; " if len(rows) > _SHOWN else ""
    console.print(f"{more}of {len(rows)} intervals, one in twenty misses the truth by chance")


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
    keys = ["norm_ratio", "sigma_ratio", "cosine", "distance"]
    keys += ["left_overlap", "left_over_chance", "right_overlap", "right_over_chance"]
    more = ("mean angle\nleft", "\nright", "cosine of A", "z")
    cells = [
        (*name, *(row[key] for key in (*keys, "left_mean", "right_mean", "A_cosine")), number(row["A_z"], 1))
        for name, row in rows
    ]
    table(title, (*names, *headings, *more), cells, texts=len(names))
