"""Figures of Shapley values: heat maps of type × layer, bars with intervals, convergence, interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.primitives import Floats, Panels
from lora_lab.results.result import Result, by_adapter

_FEW = 4
"""So many curves may have two lines of a legend each."""

_ORDER = ("q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2")
_UNITS = {"accuracy": "accuracy", "loss": "loss removed (nats)", "log-likelihood": "log-likelihood (nats)"}


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """A heat map where players differ in type and in layer, else bars."""
    rows = [row for result in results for row in result.rows()]
    types, layers = {row["type"] for row in rows}, {row["layer"] for row in rows}
    if len(types) > 1 and len(layers) > 1 and None not in types:
        return draw_heatmap(results, panels)
    return draw_bars(results, panels)


def draw_heatmap(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Type × layer for every encoder, a panel an adapter, one colour bar over all of them."""
    tables = []
    for rows in by_adapter(results):
        for encoder in dict.fromkeys(row["encoder"] for row in rows):
            name = rows[0]["adapter"] + (f", {encoder}" if encoder else "")
            tables.append((name, *_table([row for row in rows if row["encoder"] == encoder])))
    if not any(np.isfinite(values).any() for *_, values in tables):
        raise OptionError("a heat map needs players with a type and a layer: type-layer")
    top = max(float(np.nanmax(values)) for *_, values in tables)
    low = min(0.0, *(float(np.nanmin(values)) for *_, values in tables))
    colours: dict[str, Any] = {"vmin": 0, "vmax": top, "cmap": "cividis"}
    if low < 0:
        norm = TwoSlopeNorm(0.0, min(low, -1e-9 * max(top, 1e-9)), max(top, 1e-9))
        colours = {"norm": norm, "cmap": "PuOr"}
    axes, columns = _grid(panels, len(tables), 0.32 + 0.19 * max(len(types) for _, types, _, _ in tables), more=0.5)
    for ax, (name, types, layers, values) in zip(axes, tables, strict=True):
        image = primitives.heat(ax, values, types, [str(layer) for layer in layers], aspect="auto", **colours)
        primitives.title(ax, name)
    for ax in axes[-columns:]:
        ax.set_xlabel("layer")
    panels.colour_bar(axes, image, f"Shapley value,\n{_unit(results)}", 0.9, len(axes) // columns)
    return axes


def draw_bars(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Every player's value with its 95 % interval, adapters side by side; of several seeds, means and their spread."""
    groups = plot_style.grouped(by_adapter(results))
    names = list(dict.fromkeys(row["player"] for adapters in groups.values() for rows in adapters for row in rows))
    labels = plot_style.labels(names)
    longest = max(map(len, labels))
    (ax,) = panels.grid(1, 1, 2.5 if longest < 12 else 3.0)
    values = {
        label: primitives.band(
            primitives.points(adapters, names, lambda row: row["player"]), "value", ends=("low", "high")
        )
        for label, adapters in groups.items()
    }
    if len(names) * len(groups) > (80 if panels.single else 160):  # bars would be thinner than their edges
        for i, (label, value) in enumerate(values.items()):
            primitives.curve(ax, np.arange(len(names)), value, label=label, **plot_style.look(label, i))
    else:
        primitives.bars(ax, values, capsize=1.5)
    ax.axhline(0, color="#333333", linewidth=0.6)
    many = longest > 6 or (len(names) > 12 and longest > 3)
    primitives.name_axis(ax.xaxis, labels, rotation=60 if many else 0, ha="right" if many else "center")
    ax.set_ylabel(f"Shapley value,\n{_unit(results)}")
    counts = {name: len(adapters) for name, adapters in groups.items()}
    kind = plot_style.bands(counts, "95 % interval (coalitions and examples)", "±1 s.d. over seeds")
    panels.caption(ax, f"{plot_style.players(results)}; {plot_style.measured_on(results)}; bars: {kind}")
    if len(groups) > 1:
        panels.legend(ax)
    return [ax]


def draw_convergence(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The largest standard error, and the distance from the last values, over the coalitions asked for."""
    traces = []
    for result in results:
        for summary in result.summary["adapters"]:
            trace = [row for row in summary["trace"] if all(v is not None for v in row["values"])]
            if len(trace) > 1:
                traces.append((f"{plot_style.shortened(summary['adapter'])}, {summary['estimator']}", trace))
    if not traces:
        raise OptionError("these values were enumerated, so there is no convergence to draw: an estimator has one")
    (ax,) = panels.grid(1, 1, 2.4)
    for i, (name, trace) in enumerate(traces):
        look = plot_style.look("", i)
        x = np.array([row["evaluations"] for row in trace])
        values = np.array([row["values"] for row in trace], dtype=float)
        se = np.array([max((e for e in row["se"] if e is not None), default=np.nan) for row in trace], dtype=float)
        distance = np.abs(values - values[-1]).max(1)
        ax.plot(x, se, label=f"{name}: largest standard error of sampling", **look)
        thin = {"color": look["color"], "linewidth": 0.8, "alpha": 0.7}
        words = "… distance from the last values" if i == 0 or len(traces) <= _FEW else None
        ax.plot(x[:-1], distance[:-1], label=words, **thin)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
    ax.set_xlabel("coalitions asked for")
    ax.set_ylabel(_unit(results))
    panels.legend(ax, 1 if panels.single else 2)
    return [ax]


def draw_interactions(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Pairwise interactions of every adapter, one colour scale."""
    pairs = [
        (summary["adapter"], summary["interactions"]["players"], np.array(summary["interactions"]["values"], float))
        for result in results
        for summary in result.summary["adapters"]
        if summary.get("interactions")
    ]
    if not pairs:
        raise OptionError("these results hold no interactions: Shapley values of order 2 have them")
    top = max(float(np.nanmax(np.abs(table))) for *_, table in pairs) or 1.0
    axes, columns = _grid(panels, len(pairs), 2.9)
    for ax, (label, players, table) in zip(axes, pairs, strict=True):
        names = plot_style.labels(players)
        turned = 90 if max(map(len, names)) > 2 else 0
        size = min(7.0, 150 / len(names))  # points a row, so that names do not overlap
        scale = {"vmin": -top, "vmax": top, "cmap": "PuOr"}
        image = primitives.heat(ax, table, names, names, rotation=turned, size=size, **scale)
        primitives.title(ax, label)
    panels.colour_bar(axes, image, f"interaction, {_unit(results)}", 0.85, len(axes) // columns)
    return axes


def _grid(panels: Panels, count: int, height: float, *, more: float = 0.0) -> tuple[list[Axes], int]:
    """Panels `height` inches high (and `more` in all), one or two a line; and how many a line."""
    columns = 1 if panels.single else min(2, count)
    return panels.grid(count, columns, -(-count // columns) * height + more), columns


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[int], Floats]:
    """Types, layers, and the values as a matrix of them."""
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
    return next((i for i, start in enumerate(_ORDER) if last.startswith(start)), len(_ORDER)), name


def _unit(results: Sequence[Result]) -> str:
    worth: str = results[0].parameters["worth"]
    return _UNITS.get(worth, worth)
