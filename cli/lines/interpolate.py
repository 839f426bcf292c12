"""`lora-lab interpolate`: the line between adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from lora_lab.analysis.lines.landscape import Layerwise
from lora_lab.analysis.questions import Interpolate, player_option
from lora_lab.cli.options import Computing, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, estimates, in_words, say_not_defined, table
from lora_lab.errors import OptionError
from lora_lab.options import check_options, option
from lora_lab.registry import Later

_SPACES = Later("lora_lab.merging.paths", "SPACES")
_SETS: dict[str, Callable[[], tuple[str, ...]]] = {"both": lambda: Interpolate.spaces, "all": lambda: tuple(_SPACES())}


@dataclass(frozen=True)
class Where:
    """On which lines."""

    space: str = option(
        "both",
        "both (factors and delta), all, or one alone: NAMES; see above.",
        choices=lambda: (*_SETS, *_SPACES()),
        names=_SPACES,
    )

    layerwise: bool = option(
        False, "One layer at a time, all others from one adapter and then the other: writes layerwise.json instead."
    )
    players: str | Mapping[str, str] = player_option()

    def __post_init__(self) -> None:
        check_options(self)

    def spaces(self) -> tuple[str, ...]:
        """Their names."""
        return _SETS[self.space]() if self.space in _SETS else (self.space,)


def command(
    adapters: Annotated[list[str], typer.Argument(help="Two adapters or more; every pair is walked.")],
    where: Where,
    question: Interpolate,
    task: OneTask,
    loading: Several,
    computing: Computing,
    output: Output,
) -> None:
    """The task's metrics along the straight line between adapters, and the barriers on it.

    An adapter adds ΔW = BA to the weight matrix of each module that it changes; ‖ΔW‖ is the size (Frobenius norm) of
    that. **factors** averages A and B, as papers on merging LoRA seeds do. Halfway between two independent adapters
    that also halves ‖ΔW‖, so a dip may be a barrier or mere shrinkage. **matched** therefore walks the same line with
    every module's ‖ΔW‖ kept at the average of its ends: a dip that stays is a barrier, a dip that goes was shrinkage
    (the last lines). **delta** averages ΔW itself, exactly (**matched-delta**: at kept norms). **aligned** first
    rotates the second adapter's factors onto the first's.

    **--layerwise** mixes ΔW in one layer (or group, by --players) at a time instead, and tells the barrier of each.

    Example:  lora-lab interpolate a.safetensors b.safetensors --ratios 1:2,1:1
    """
    if where.layerwise:
        if question.ratios or question.behaviour or where.space != Where.space:
            raise OptionError("`layerwise` mixes ΔW of two adapters; leave `space`, `ratios` and `behaviour` out")
        each = Layerwise(
            points=question.points,
            players=where.players,
            metric=question.metric,
            split=question.split,
            examples=question.examples,
            seed=question.seed,
        )
        output.print(answer(each, adapters, loading, task, computing, output, doing="mixing layers"), show_layers)
        return
    if where.players != Where.players:
        raise OptionError("`players` are mixed one at a time with `layerwise`")
    question = replace(question, spaces=where.spaces())
    output.print(answer(question, adapters, loading, task, computing, output, doing="interpolating"), show)


def show_layers(result: Any) -> None:
    """A barrier for every layer, from both sides."""
    n, split = result.provenance["examples"], result.parameters["split"]
    rows = [
        (
            f"{row['group']}, others of {row['others']}",
            in_words(row["metric"]),
            estimate(row["value"], row["low"], row["high"]),
            estimate(row["exchange"], row["exchange_low"], row["exchange_high"]),
        )
        for row in result.summary["barriers"]
    ]
    headings = ("mixed", "metric", "worse than the chord", "worse when exchanged")
    table(f"One at a time ({split} split, {n} examples)", headings, rows, texts=2)


def show(result: Any) -> None:
    """The result as tables."""
    n = result.provenance["examples"]
    pairs = {tuple(row["indices"]): row for row in result.rows(ratio=None)}
    for indices, first in pairs.items():
        _show_line(result, list(indices), " and ".join(first["members"]), n)
    _show_ratios(result)
    _show_barriers(result)
    _show_shrinkage(result)
    say_not_defined(result)


def _show_line(result: Any, indices: list[int], title: str, n: int) -> None:
    spaces = result.parameters["spaces"]
    lines = [result.rows(ratio=None, indices=indices, space=space) for space in spaces]
    metrics = {**{in_words(name): name for name in result.parameters["metrics"]}, "‖ΔW‖": "norm"}
    if lines[0][0]["norm"] is None:
        del metrics["‖ΔW‖"]
    headings = ["\nt", *(f"{metric}\n{space}" for metric in metrics for space in spaces)]
    rows = [
        [f"{cells[0]['t']:.2f}", *(cell[name] for name in metrics.values() for cell in cells)]
        for cells in zip(*lines, strict=True)
    ]
    table(f"From {title} ({result.parameters['split']} split, {n} examples)", headings, rows)
    console.print()


def _show_ratios(result: Any) -> None:
    rows = [row for row in result.rows() if row["ratio"]]
    if rows:
        names = list(result.parameters["metrics"])
        cells = [(f"{r['ratio']} of {', '.join(r['members'])}", r["space"], *estimates(r, names)) for r in rows]
        table("Weighted mixtures", ("ratio", "space", *map(in_words, names)), cells)
        console.print()


_HEADINGS = {
    "entezari": "than the chord",
    "frankle": "than mean end",
    "max_end": "than worse end",
    "midpoint": "value at ½",
}
"""Barrier → what a table calls it; others have their names."""


def _show_barriers(result: Any) -> None:
    from lora_lab.results.kinds.analysis import MAIN_BARRIER

    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in result.summary["barriers"]:
        key = (" – ".join(row["members"]), row["metric"], row["space"])
        found.setdefault(key, {})[row["barrier"]] = row
    rows = []
    for (pair, metric, space), cells in found.items():
        main = cells.pop(MAIN_BARRIER)
        height = estimate(main["value"], main["low"], main["high"])
        rows.append((f"{pair}, {space}", in_words(metric), height, *(other["value"] for other in cells.values())))
    names = dict.fromkeys(row["barrier"] for row in result.summary["barriers"] if row["barrier"] != MAIN_BARRIER)
    headings = ("line", "metric", _HEADINGS[MAIN_BARRIER], *(_HEADINGS.get(name, name) for name in names))
    title = "Barriers: how much worse it gets (95 % intervals of all are in the JSON)"
    table(title, headings, rows)
    console.print()


def _show_shrinkage(result: Any) -> None:
    main = next(iter(result.parameters["metrics"]))
    for row in result.summary.get("shrinkage", []):
        if row["metric"] != main:
            continue
        look = result.parameters.get("looks", {}).get(row.get("space"), {})  # what earlier versions wrote has none
        pair, space = " – ".join(row["members"]), look.get("label", "line")
        names = ("barrier", "removed", "stays")
        height, removed, stays = (estimate(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in names)
        share = f" ({row['share']:.0%})" if row["share"] is not None and row["barrier_low"] > 0 else ""
        console.print(
            f"{pair}, {space}: {in_words(main)} barrier {height}; matching ‖ΔW‖ removes {removed}{share}, {stays} "
            "stays."
        )
