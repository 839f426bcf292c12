"""Figures of Shapley values: heat maps of type × layer, bars with intervals, convergence, interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import labels, name_axis
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Floats
from lora_lab.results.result import Result, by_adapter

_THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.7}

_NATS = {"loss": "loss removed (nats)", "log-likelihood": "log-likelihood (nats)"}
"""Worths that are no metric of their task, as axes name them."""

_ORDER = ("q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2")


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
    top = max(0.0, *(float(np.nanmax(values)) for *_, values in tables))
    low = min(0.0, *(float(np.nanmin(values)) for *_, values in tables))
    end = max(top, -low) or 1.0
    # both signs on one scale: as dark is as far from 0
    colours: dict[str, Any] = {"vmin": -end if low < 0 else 0, "vmax": end, "cmap": "PuOr" if low < 0 else "cividis"}
    most, lines = 1 if panels.single else 2, max(len(types) for _, types, _, _ in tables)
    columns = panels.columns(len(tables), most, 0.32 + 0.19 * lines)
    height = 0.32 + (0.19 if columns <= most else 0.15) * lines
    axes = panels.grid(len(tables), columns, -(-len(tables) // columns) * height + 0.5)
    for i, (ax, (name, types, layers, values)) in enumerate(zip(axes, tables, strict=True)):
        image = primitives.heat(ax, values, types, [str(layer) for layer in layers], aspect="auto", **colours)
        panels.title(ax, name)
        if i % columns and types == tables[i - 1][1]:
            ax.tick_params(labelleft=False)
    for ax in axes[-columns:]:
        ax.set_xlabel("layer")
    bar = panels.colour_bar(axes, image, f"Shapley value, {_unit(results)}")
    (bar.ax.set_xlim if bar.orientation == "horizontal" else bar.ax.set_ylim)(low, max(top, -1e-3 * low))
    return axes


def draw_bars(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Every player's value with its 95 % interval, adapters side by side; of several seeds, means and their spread."""
    groups = plot_style.grouped(by_adapter(results))
    names = list(dict.fromkeys(row["player"] for adapters in groups.values() for rows in adapters for row in rows))
    shown = labels(names)
    (ax,) = panels.grid(1, 1, 2.5 if max(map(len, shown)) < 12 else 3.0)
    values = {
        label: primitives.band(
            primitives.points(adapters, names, lambda row: row["player"]), "value", ends=("low", "high")
        )
        for label, adapters in groups.items()
    }
    if primitives.too_thin(ax, values):
        for label, place in plot_style.places(groups).items():
            primitives.curve(ax, np.arange(len(names)), values[label], label=label, **plot_style.look(place))
    else:
        primitives.bars(ax, values, capsize=1.5)
    ax.axhline(0, color="#333333", linewidth=0.6)
    name_axis(ax.xaxis, shown)
    ax.set_xlabel(plot_style.players(results))
    ax.set_ylabel(f"Shapley value,\n{_unit(results)}")
    counts = {name: len(adapters) for name, adapters in groups.items()}
    kind = plot_style.bands(counts, "95 % interval (coalitions and examples)", "±1 s.d. over seeds")
    panels.caption(ax, f"{plot_style.measured_on(results)}; bars: {kind}")
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
                traces.append((summary["adapter"], summary["estimator"], trace))
    if not traces:
        raise OptionError(
            "these values were enumerated or come of gradients alone: only an estimator that draws coalitions converges"
        )
    estimators = {estimator for _, estimator, _ in traces}
    which = f", {traces[0][1]}" if len(estimators) == 1 else ""
    (ax,) = panels.grid(1, 1, 2.4)
    names = plot_style.in_legend([name for name, *_ in traces])
    for i, (name, (_, estimator, trace)) in enumerate(zip(names, traces, strict=True)):
        look = plot_style.look(i)
        x = np.array([row["evaluations"] for row in trace])
        values = np.array([row["values"] for row in trace], dtype=float)
        se = np.array([max((e for e in row["se"] if e is not None), default=np.nan) for row in trace], dtype=float)
        distance = np.abs(values - values[-1]).max(1)
        ax.plot(x, se, label=f"{name}, {estimator}" if len(estimators) > 1 else name, **look)
        ax.plot(x[:-1], distance[:-1], color=look["color"], **_THIN)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        primitives.plain_numbers(axis)
    ax.set_xlabel("coalitions asked for")
    ax.set_ylabel(_unit(results))
    panels.legend(
        ax,
        more={
            f"largest standard error{which}": Line2D([], [], color="#333333"),
            "distance from the last values": Line2D([], [], color="#333333", **_THIN),
        },
    )
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
    columns = panels.columns(len(pairs), 1 if panels.single else 2, 2.4)
    side = min(3.5, (panels.page - (0.0 if panels.single else 1.0)) / columns - 0.4)
    axes = panels.grid(len(pairs), columns, -(-len(pairs) // columns) * (side + 0.4) + 0.6)
    for ax, (label, players, table) in zip(axes, pairs, strict=True):
        names = labels(players)
        image = primitives.heat(ax, table, names, names, vmin=-top, vmax=top, cmap="PuOr")
        panels.title(ax, label)
    panels.colour_bar(axes, image, f"interaction, {_unit(results)}")
    return axes


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
    """The worth as an axis is named; of less that is better, what is removed."""
    worth: str = results[0].parameters["worth"]
    said = results[0].parameters.get("metrics", {}).get(worth)
    if said is None:
        return _NATS.get(worth, worth)
    unit = f" ({said['unit']})" if said["unit"] not in ("", "share") else ""
    return f"{worth.replace('_', ' ')}{'' if said['higher'] else ' removed'}{unit}"
