"""Figures along training: checkpoints alone, pruned and averaged over the optimiser steps, beside p(t)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import Numbers, inches, type_size
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Row
from lora_lab.plots.views import metrics
from lora_lab.results.result import Result, grouped


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric over the steps, a panel a kind of model, and p(t) where there is a schedule."""
    metric = metrics.main(results)
    rows = [row for result in results for row in result.rows()]
    steps, looks = np.array(results[0].parameters["steps"]), _looks(rows)
    order = list(_titles(results[0].parameters, None))
    shown = sorted(grouped(rows, "model", "space"), key=lambda each: order.index(each[0]["model"]))
    alone = shown[0][1]
    timed = [row for row in alone if row["p"] is not None]
    count = len(shown) + bool(timed)
    columns = panels.columns(count, 2 if panels.single else 4, 1.75)
    lines = -(-count // columns)
    axes = panels.grid(count, columns, 0.6 + 1.75 * lines)
    scored = axes[bool(timed) :]
    if timed:
        _lines(axes[0], timed, steps, "p", looks)
        axes[0].set_ylim(0, 1.08)
        panels.title(axes[0], "p(t)")
    for ax, (head, members) in zip(scored, shown, strict=True):
        if ax is not scored[0]:
            ax.sharey(scored[0])
        _lines(ax, members, steps, metric, looks)
        panels.title(ax, *_titles(results[0].parameters, head["space"])[head["model"]], joint=", ")
    words = "optimiser step"
    fits = inches(words, type_size("axes.labelsize")) < 0.7 * panels.page / columns
    for i, ax in enumerate(axes):
        ax.xaxis.set_major_locator(Numbers(whole=True))
        if i + columns >= count:
            ax.set_xlabel(words if fits else "step")
        if ax is scored[0] or (i % columns == 0 and ax in scored):
            ax.set_ylabel(metrics.label(results, metric))
    panels.legend(*scored)
    counts = [len(same) // len(steps) for _, members in shown for _, same in grouped(members, "method")]
    kinds = ["95 % interval over examples"] * (min(counts) == 1) + ["±1 s.d. over runs or pairs"] * (max(counts) > 1)
    band = " of one, ".join(kinds) + " of several" * (len(kinds) > 1)
    panels.caption(axes[0], f"{plot_style.measured_on(results)}; bands: {band}")
    return axes


def _titles(said: Mapping[str, Any], space: str | None) -> dict[str, tuple[str, ...]]:
    """Kind of model → the parts of its title, in the order of the panels."""
    return {
        "alone": ("each run alone",),
        "midpoint": ("midpoint", str(space)),
        "average": ("average of all",),
        "pruned": ("pruned", said["keep"]),
    }


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Method of a row → label, colour, marker and dashes."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    names = plot_style.in_legend([plot_style.method_name(method) for method in methods])
    places = plot_style.places(names)
    return {
        method: {"label": name, **plot_style.look(places[name])} for method, name in zip(methods, names, strict=True)
    }


def _lines(ax: Axes, rows: Sequence[Row], steps: Any, key: str, looks: dict[str, dict[str, Any]]) -> None:
    for head, members in grouped(rows, "method"):
        places = [[row for row in members if row["step"] == step] for step in steps]
        primitives.curve(ax, steps, primitives.band(places, key), **looks[head["method"]])
