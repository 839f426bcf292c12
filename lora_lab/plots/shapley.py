"""Figures of Shapley values: heat maps of type × layer, bars with intervals, convergence, interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.results.result import Result, by_adapter

Floats = npt.NDArray[np.float64]

_ORDER = ("q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2")
_UNITS = {"accuracy": "accuracy", "loss": "loss removed (nats)", "log-likelihood": "log-likelihood (nats)"}


def draw(results: Sequence[Result], width: str) -> Figure:
    """A heat map where players differ in type and in layer, else bars."""
    rows = [row for result in results for row in result.rows()]
    types, layers = {row["type"] for row in rows}, {row["layer"] for row in rows}
    if len(types) > 1 and len(layers) > 1 and None not in types:
        return draw_heatmap(results, width)
    return draw_bars(results, width)


def draw_heatmap(results: Sequence[Result], width: str) -> Figure:
    """Type × layer for every encoder, a panel an adapter, one colour bar over all of them."""
    panels = []
    for rows in by_adapter(results):
        label = rows[0]["adapter"]
        for encoder in dict.fromkeys(row["encoder"] for row in rows):
            panels.append((f"{label}, {encoder}" if encoder else label, [r for r in rows if r["encoder"] == encoder]))
    tables = [(title, *_table(rows)) for title, rows in panels]
    if not any(np.isfinite(values).any() for _, _, _, values in tables):
        raise OptionError("a heat map needs players with a type and a layer: --players type-layer")
    top = max(float(np.nanmax(values)) for *_, values in tables)
    low = min(0.0, *(float(np.nanmin(values)) for *_, values in tables))
    figure, axes, columns = _panels(width, len(tables), 0.32 + 0.19 * max(len(t[1]) for t in tables), more=0.5)
    norm = TwoSlopeNorm(0.0, min(low, -1e-9 * max(top, 1e-9)), max(top, 1e-9)) if low < 0 else None
    for ax, (title, types, layers, values) in zip(axes, tables, strict=False):
        options: dict[str, Any] = (
            {"norm": norm, "cmap": "PuOr"} if norm else {"vmin": 0, "vmax": top, "cmap": "cividis"}
        )
        image = ax.imshow(values, aspect="auto", **options)
        ax.set_title(title)
        ax.set_yticks(range(len(types)), types)
        ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        ax.grid(visible=False)
    for ax in axes[max(0, len(tables) - columns) : len(tables)]:
        ax.set_xlabel("layer")
    figure.colorbar(image, ax=list(axes), label=f"Shapley value,\n{_unit(results)}", shrink=0.9)
    return figure


def draw_bars(results: Sequence[Result], width: str) -> Figure:
    """Every player's value with its 95 % interval, adapters side by side; of several seeds, means and their spread."""
    groups = plot_style.grouped(by_adapter(results))
    names = list(dict.fromkeys(row["player"] for rows in groups.values() for lines in rows for row in lines))
    labels = _short(names)
    figure = plot_style.new(width, 2.5 if max(map(len, labels)) < 12 else 3.0)
    ax = figure.subplots()
    for i, (label, adapters) in enumerate(groups.items()):
        x, value, low, high = _bars(adapters, names)
        place = x + (i - (len(groups) - 1) / 2) * 0.8 / len(groups)
        color, hatch = plot_style.look(label, i)["color"], plot_style.hatch(label, i)
        error = np.stack([value - low, high - value]).clip(min=0)
        ax.bar(place, value, 0.8 / len(groups), label=label, color=color, hatch=hatch, edgecolor="white", linewidth=0.3)
        known = np.isfinite(error).all(0)
        if known.any():
            ends: dict[str, Any] = {"fmt": "none", "ecolor": "#333333", "elinewidth": 0.7, "capsize": 1.5}
            ax.errorbar(place[known], value[known], error[:, known], **ends)
    ax.axhline(0, color="#333333", linewidth=0.6)
    many = len(names) > 12 or max(map(len, labels)) > 6
    ax.set_xticks(range(len(names)), labels, rotation=60 if many else 0, ha="right" if many else "center")
    ax.set_ylabel(f"Shapley value,\n{_unit(results)}")
    plot_style.caption(figure, width, _caption(results, groups))
    if len(groups) > 1:
        figure.legend(loc="outside upper center", ncols=4 if width == "double" else 2)
    return figure


def draw_convergence(results: Sequence[Result], width: str) -> Figure:
    """The largest standard error, and the distance from the last values, over the coalitions asked for."""
    figure = plot_style.new(width, 2.4)
    ax = figure.subplots()
    drawn = 0
    for result in results:
        for summary in result.summary["adapters"]:
            trace = [row for row in summary["trace"] if all(v is not None for v in row["values"])]
            if len(trace) < 2:
                continue
            style = plot_style.look("", drawn)
            x = np.array([row["evaluations"] for row in trace])
            values = np.array([row["values"] for row in trace], dtype=float)
            se = np.array([max((e for e in row["se"] if e is not None), default=np.nan) for row in trace], dtype=float)
            distance = np.abs(values - values[-1]).max(1)
            name = f"{summary['adapter']}, {summary['estimator']}"
            ax.plot(x, se, label=f"{name}: largest standard error of sampling", **style)
            ax.plot(
                x[:-1],
                distance[:-1],
                color=style["color"],
                linewidth=0.8,
                alpha=0.7,
                label="… distance from the last values",
            )
            drawn += 1
    if not drawn:
        raise OptionError("these values were enumerated, so there is no convergence to draw; --estimator antithetic")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
    ax.set_xlabel("coalitions asked for")
    ax.set_ylabel(_unit(results))
    figure.legend(loc="outside upper center", ncols=2 if width == "double" else 1)
    return figure


def draw_interactions(results: Sequence[Result], width: str) -> Figure:
    """Pairwise interactions of every adapter, one colour scale."""
    found = [
        (summary["adapter"], summary["interactions"])
        for result in results
        for summary in result.summary["adapters"]
        if summary.get("interactions")
    ]
    if not found:
        raise OptionError("these results hold no interactions; compute them with `lora-lab shapley --order 2`")
    tables = [np.array(each["values"], dtype=float) for _, each in found]
    top = max(float(np.nanmax(np.abs(table))) for table in tables) or 1.0
    figure, axes, _ = _panels(width, len(found), 2.9)
    for ax, (label, each), table in zip(axes, found, tables, strict=False):
        names = _short(each["players"])
        image = ax.imshow(table, vmin=-top, vmax=top, cmap="PuOr")
        ax.set_title(label)
        size = min(7.0, 150 / len(names))  # points a row, so that names do not overlap
        ax.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        ax.set_yticks(range(len(names)), names, fontsize=size)
        ax.grid(visible=False)
    figure.colorbar(image, ax=list(axes), label=f"interaction, {_unit(results)}", shrink=0.85)
    return figure


def _panels(width: str, count: int, height: float, *, more: float = 0.0) -> tuple[Figure, Any, int]:
    """A figure of panels `height` inches high (and `more` in all), one or two a line; its axes, and how many a line."""
    columns = 1 if width == "single" else min(2, count)
    lines = -(-count // columns)
    figure = plot_style.new(width, lines * height + more)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes, columns


def _bars(
    adapters: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> tuple[Floats, Floats, Floats, Floats]:
    def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
        by_name = {row["player"]: row[key] for row in rows}
        return [np.nan if by_name.get(name) is None else by_name[name] for name in names]

    x = np.arange(len(names), dtype=float)
    if len(adapters) == 1:
        value, low, high = (np.array(column(adapters[0], key)) for key in ("value", "low", "high"))
        return x, value, low, high
    values = np.array([column(rows, "value") for rows in adapters])
    mean, spread = values.mean(0), values.std(0, ddof=1)
    return x, mean, mean - spread, mean + spread


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int], Floats]:
    placed = [row for row in rows if row["type"] is not None and row["layer"] is not None]
    types = sorted({row["type"] for row in placed}, key=_type_order)
    layers = sorted({row["layer"] for row in placed})
    table = np.full((max(1, len(types)), max(1, len(layers))), np.nan)
    for row in placed:
        if row["value"] is not None:
            table[types.index(row["type"]), layers.index(row["layer"])] = row["value"]
    return types, layers, table


def _type_order(name: str) -> tuple[int, str]:
    last = name.rpartition(".")[2]
    place = next((i for i, start in enumerate(_ORDER) if last.startswith(start)), len(_ORDER))
    return place, name


def _short(names: Sequence[str]) -> list[str]:
    """Names without what all of them have in front."""
    parts = [name.split(".") for name in names]
    front = 0
    while all(len(p) > front + 1 for p in parts) and len({p[front] for p in parts}) == 1:
        front += 1
    return [".".join(p[front:]) for p in parts]


def _unit(results: Sequence[Result]) -> str:
    worths = {result.parameters["worth"] for result in results}
    if len(worths) > 1:
        raise OptionError(f"results of different worths cannot share a figure: {', '.join(sorted(worths))}")
    worth: str = worths.pop()
    return _UNITS.get(worth, worth)


def _caption(results: Sequence[Result], groups: Mapping[str, Sequence[Any]]) -> str:
    counts = {name: len(rows) for name, rows in groups.items()}
    kind = plot_style.bands(counts, "95 % interval (coalitions and examples)", "±1 s.d. over seeds")
    first = results[0]
    task = plot_style.task_name(first.parameters["task"])
    players = first.parameters["players"]
    what = players if isinstance(players, str) else "group"
    return f"{what}; {task}, {first.parameters['split']} split, n = {first.provenance.get('examples')}; bars: {kind}"
