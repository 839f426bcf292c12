"""Figures of where adapters lie: as points in a plane, in the weights of their base, and beside what merges lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import labels, name_axis
from lora_lab.plots.panels import Panels
from lora_lab.plots.views.metrics import in_words
from lora_lab.results.result import Result, grouped

_WAYS = (("x", "y", "principal components"), ("tsne_x", "tsne_y", "t-SNE"))


def draw_map(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Every adapter as a point that a line joins to the base, where it began: by distances of ΔW, or by t-SNE.

    Few adapters are named; of many, those of one method look alike, or else those that share their initial A.
    """
    shown = [
        (_with_methods(result), x, y, title)
        for result in results
        for x, y, title in _WAYS
        if all(row[x] is not None for row in result.summary["map"])
    ]
    columns = 1 if panels.single else min(2, len(shown))
    axes = panels.grid(len(shown), columns, 2.9 * -(-len(shown) // columns))
    more: dict[str, Any] = {}
    for ax, (rows, x, y, title) in zip(axes, shown, strict=True):
        (base,) = (row for row in rows if row["adapter"] is None)
        for name, members in _looking_alike(rows):
            places = np.array([(row[x], row[y]) for row in members], dtype=float)
            for u, v in places:
                ax.plot([base[x], u], [base[y], v], color="#999999", linewidth=0.4, zorder=1)
            look = plot_style.look(len(more) if name not in more else list(more).index(name))
            more[name] = ax.plot(places[:, 0], places[:, 1], **{**look, "linestyle": ""}, markersize=4)[0]
        ax.plot(base[x], base[y], marker="+", color="black", linestyle="", zorder=3)
        ax.set_aspect("equal", adjustable="datalim")
        panels.title(ax, title)
    panels.legend(*axes, more=more)
    held = ", ".join(f"{result.summary['map_held']:.0%}" for result in results)
    said = [f"+: the base, ΔW = 0; principal components show {held} of the squared distances"]
    near = [each for result in results if (each := result.summary.get("map_perplexity"))]
    said += [f"t-SNE of perplexity {' and '.join(f'{each:.3g}' for each in near)}: who is near whom"] if near else []
    panels.caption(axes[0], "; ".join(said))
    return axes


def _with_methods(result: Result) -> list[dict[str, Any]]:
    """The points, each with the method of its adapter; None of the base, and of adapters that record none."""
    known = {each["adapter"]: each.get("method") for each in result.summary["adapters"]}
    methods = {name: None if method == name else method for name, method in known.items()}
    return [{**row, "method": methods.get(row["adapter"])} for row in result.summary["map"]]


def _looking_alike(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Name in the legend → adapters: each of few; of many, those of one method or initial A, if there are colours."""
    adapters = [row for row in rows if row["adapter"] is not None]
    if len(adapters) <= plot_style.FEW:
        names = plot_style.in_legend([row["adapter"] for row in adapters])
        return [(name, [row]) for name, row in zip(names, adapters, strict=True)]
    by_method = grouped(adapters, "method")
    if 1 < len(by_method) <= plot_style.FEW and all(head["method"] for head, _ in by_method):
        return [(plot_style.method_name(head["method"]), members) for head, members in by_method]
    groups = {head["start"]: members for head, members in grouped(adapters, "start")}
    if len(groups) > plot_style.FEW:
        return [("adapters", adapters)]
    return [("an initial A of its own" if start is None else f"initial A {start}", groups[start]) for start in groups]


def draw_inside(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """By layer: the share of leading directions of W + ΔW that are intruders, and ΔW's share in W's leading ones."""
    rows = [row for result in results for row in result.summary.get("inside", ()) if row["level"] == "layer"]
    if not rows:
        raise OptionError("these adapters were not looked for in a base by layer")
    layers = list(dict.fromkeys(row["group"] for row in rows))
    adapters = [(head["adapter"], {row["group"]: row for row in members}) for head, members in grouped(rows, "adapter")]
    axes = panels.grid(2, 1 if panels.single else 2, 3.6 if panels.single else 2.4)
    many = len(adapters) > plot_style.FEW
    names = plot_style.in_legend([name for name, _ in adapters])
    for i, (name, (_, own)) in enumerate(zip(names, adapters, strict=True)):
        look = plot_style.one_of_many() if many else {**plot_style.look(i), "label": name}
        for ax, values in zip(axes, _inside_lines([own.get(layer) for layer in layers]), strict=True):
            primitives.curve(ax, np.arange(len(layers)), (values, values, values), **look)
    said = (("intruders", "share"), ("ΔW in W's leading directions", "overlap / chance"))
    for ax, (title, label) in zip(axes, said, strict=True):
        name_axis(ax.xaxis, labels(layers))
        panels.title(ax, title)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    for ax in axes[1:] if panels.single else axes:
        ax.set_xlabel("layer")
    if not many:
        panels.legend(axes[0], columns=1 if panels.single else 2)
    if many:
        panels.caption(axes[0], f"{len(adapters)} adapters, a line each")
    return axes


def _inside_lines(rows: Sequence[Mapping[str, Any] | None]) -> tuple[primitives.Floats, primitives.Floats]:
    shares = [row["intruders"] / row["looked_at"] if row and row["looked_at"] else None for row in rows]
    return np.array(shares, dtype=float), np.array([row and row["left_over_chance"] for row in rows], dtype=float)


def draw_forecast(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Rank correlation of every predictor with what merges lose of the main metric, with its interval."""
    rows = [row for result in results for row in result.summary.get("forecast", ())]
    rows = [row for row in rows if row["outcome"] == rows[0]["outcome"]]
    if not rows:
        raise OptionError("these adapters were not put beside results of their merges")
    predictors = list(dict.fromkeys(row["predictor"] for row in rows))
    merges = [(head["merge"], members) for head, members in grouped(rows, "merge")]
    groups = {}
    for name, (_, members) in zip(plot_style.in_legend([name for name, _ in merges]), merges, strict=True):
        by_name = {row["predictor"]: [row] for row in members}
        groups[name] = primitives.band([by_name.get(predictor, []) for predictor in predictors], "correlation")
    (ax,) = panels.grid(1, 1, 0.9 + max(0.25, 0.06 * len(groups)) * len(predictors))
    names = [predictor.replace("_", " ") for predictor in predictors]
    outcome = in_words(rows[0]["outcome"])
    what = "nats of loss more" if outcome == "loss" else f"{outcome} lost"
    primitives.named_bars(ax, groups, names, f"rank correlation with {what}", horizontal=True)
    ax.axvline(0, color="#555555", linewidth=0.8, zorder=1)
    ax.set_xlim(-1.05, 1.05)
    panels.legend(ax)
    return [ax]
