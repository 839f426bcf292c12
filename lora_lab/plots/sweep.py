"""Figures of pruning: grouped bars for patterns, curves over sparsities and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.results.result import Result, by_adapter

Floats = npt.NDArray[np.float64]

_AXIS = {"unstructured": "sparsity (share of entries set to 0)", "rank": "rank kept"}


def draw(results: Sequence[Result], width: str) -> Figure:
    """All kinds of pruning that the results hold: patterns above, curves below."""
    kinds = _kinds(results)
    curves = [kind for kind in kinds if kind != "structured"]
    if "structured" not in kinds or not curves:
        return _draw_structured(results, width) if "structured" in kinds else _draw_curves(results, width, curves)
    figure = plot_style.new(width, 5.3 if width == "double" else 2.6 + 2.5 * len(curves))
    if width == "double":
        grid = figure.add_gridspec(2, len(curves), height_ratios=[1.1, 1])
        top, below = figure.add_subplot(grid[0, :]), [figure.add_subplot(grid[1, i]) for i in range(len(curves))]
    else:
        grid = figure.add_gridspec(1 + len(curves), 1)
        top, below = figure.add_subplot(grid[0]), [figure.add_subplot(grid[i + 1]) for i in range(len(curves))]
    _bars(top, results)
    for ax, kind in zip(below, curves, strict=True):
        _curve(ax, results, kind)
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4 if width == "double" else 2)
    for ax in below:
        _legend(ax)
    plot_style.caption(figure, width, _caption(results))
    return figure


def draw_structured(results: Sequence[Result], width: str) -> Figure:
    """Grouped bars, a pattern each; a label names what is kept."""
    return _draw_structured(results, width)


def draw_unstructured(results: Sequence[Result], width: str) -> Figure:
    """Accuracy over sparsity."""
    return _draw_curves(results, width, ["unstructured"])


def draw_rank(results: Sequence[Result], width: str) -> Figure:
    """Accuracy over the rank kept."""
    return _draw_curves(results, width, ["rank"])


def _draw_structured(results: Sequence[Result], width: str) -> Figure:
    _need(results, "structured")
    figure = plot_style.new(width, 2.7)
    ax = figure.subplots()
    _bars(ax, results)
    figure.legend(loc="outside upper center", ncols=4 if width == "double" else 2)
    plot_style.caption(figure, width, _caption(results))
    return figure


def _draw_curves(results: Sequence[Result], width: str, kinds: Sequence[str]) -> Figure:
    for kind in kinds:
        _need(results, kind)
    shape = (1, len(kinds)) if width == "double" else (len(kinds), 1)
    figure = plot_style.new(width, 3.0 if width == "double" else 0.6 + 2.5 * len(kinds))
    axes = figure.subplots(*shape, squeeze=False).ravel()
    for ax, kind in zip(axes, kinds, strict=True):
        _curve(ax, results, kind)
        _legend(ax)
    plot_style.caption(figure, width, _caption(results))
    return figure


def _bars(ax: Axes, results: Sequence[Result]) -> None:
    groups = plot_style.grouped(by_adapter(results, kind="structured"))
    names = list(dict.fromkeys(row["label"] for adapters in groups.values() for rows in adapters for row in rows))
    for i, (label, adapters) in enumerate(groups.items()):
        mean, low, high = _values(adapters, [(None, name) for name in names])
        place = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * 0.8 / len(groups)
        color, hatch = plot_style.look(label, i)["color"], plot_style.hatch(label, i)
        ax.bar(place, mean, 0.8 / len(groups), label=label, color=color, hatch=hatch, edgecolor="white", linewidth=0.3)
        error = np.stack([mean - low, high - mean]).clip(min=0)
        ax.errorbar(place, mean, error, fmt="none", ecolor="#333333", elinewidth=0.7, capsize=1.2)
    shown = [name.removeprefix("type:").removesuffix("_proj") for name in names]
    ax.set_xticks(range(len(names)), shown, rotation=45, ha="right")
    ax.set_ylabel("accuracy")
    ax.set_xlabel("kept")


def _curve(ax: Axes, results: Sequence[Result], kind: str) -> None:
    groups = plot_style.grouped(by_adapter(results, kind=kind))
    criteria = list(dict.fromkeys(row["criterion"] for adapters in groups.values() for r in adapters for row in r))
    lines = ["-", "--", ":", "-."]
    for i, (label, adapters) in enumerate(groups.items()):
        for j, criterion in enumerate(criteria):
            places = [row["label"] for row in adapters[0] if row["criterion"] == criterion]
            mean, low, high = _values(adapters, [(criterion, place) for place in places])
            style = {**plot_style.look(label, i), "linestyle": lines[j % len(lines)]}
            if criterion == "random":
                style["markerfacecolor"] = "white"
            x = np.array([float(place) for place in places])
            ax.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0)
            ax.plot(x, mean, label=f"{label}, {criterion}", **style)
    if kind == "rank":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(_AXIS[kind])
    ax.set_ylabel("accuracy")


def _legend(ax: Axes) -> None:
    """Below the axes: curves leave no corner free."""
    ax.legend(fontsize=6, handlelength=3, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28))


def _values(
    adapters: Sequence[Sequence[dict[str, Any]]], wanted: Sequence[tuple[str | None, str]]
) -> tuple[Floats, Floats, Floats]:
    """Mean and band of each (criterion or any, label): one adapter's interval, or the spread of several."""

    def cell(rows: Sequence[dict[str, Any]], criterion: str | None, label: str, key: str) -> float:
        found = [row[key] for row in rows if row["label"] == label and criterion in (None, row["criterion"])]
        return float(found[0]) if found else np.nan

    def line(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
        return [cell(rows, *each, key) for each in wanted]

    values = np.array([line(rows, "accuracy") for rows in adapters])
    mean = values.mean(0)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        return mean, mean - spread, mean + spread
    return mean, np.array(line(adapters[0], "accuracy_low")), np.array(line(adapters[0], "accuracy_high"))


def _kinds(results: Sequence[Result]) -> list[str]:
    return [kind for kind in ("structured", "unstructured", "rank") if any(r.rows(kind=kind) for r in results)]


def _need(results: Sequence[Result], kind: str) -> None:
    if kind not in _kinds(results):
        raise OptionError(f"these results hold no {kind} pruning; compute it with `lora-lab sweep --{kind}`")


def _caption(results: Sequence[Result]) -> str:
    first = results[0]
    counts = {
        name: len(rows)
        for kind in _kinds(results)
        for name, rows in plot_style.grouped(by_adapter(results, kind=kind)).items()
    }
    band = plot_style.bands(counts, "95 % interval (examples and draws)", "±1 s.d. over seeds")
    task, n = plot_style.task_name(first.parameters["task"]), first.provenance.get("examples")
    return f"{task}, {first.parameters['split']} split, n = {n}; bands and bars: {band}"
