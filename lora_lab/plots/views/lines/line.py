"""Figures of lines between adapters: curves, barrier matrices, mixtures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, inches, name_axis, shortened, type_size
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Band, Floats, Row
from lora_lab.plots.views import metrics
from lora_lab.results.kinds.analysis import MAIN_BARRIER
from lora_lab.results.result import Result, grouped


def space_looks(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Space → label, colour, marker and dashes: as its entry had it, or those of the first free place."""
    said: dict[str, dict[str, Any]] = {}
    for result in results:
        said |= result.parameters.get("looks", {})
    spaces = dict.fromkeys(space for result in results for space in result.parameters["spaces"])
    places = plot_style.places(spaces, {space: look["place"] for space, look in said.items()})
    labels = shortened([said[space]["label"] if space in said else space for space in spaces], 2 * MOST)
    return {
        space: {"label": label, **plot_style.look(places[space])} for space, label in zip(spaces, labels, strict=True)
    }


def group_names(results: Sequence[Result]) -> dict[str, str]:
    """Method of a pair or of more adapters → what they are drawn as: their methods, or of very many all together."""
    methods = list(dict.fromkeys(row["method"] for result in results for row in result.rows()))
    if len(methods) > plot_style.FEW:  # pairs of adapters of unknown methods
        return dict.fromkeys(methods, "all pairs")
    return {method: plot_style.method_name(method) for method in methods}


def curves(results: Sequence[Result], metric: str) -> dict[str, dict[str, tuple[Floats, Band]]]:
    """Group → space → (t, value with its band), groups by method over all results.

    One pair: the value with its interval over the examples. Several: mean and one standard deviation over pairs.
    """
    names = group_names(results)
    found: dict[str, dict[str, list[list[Row]]]] = {}
    for _, head, rows in _lines(results):
        found.setdefault(names[head["method"]], {}).setdefault(head["space"], []).append(rows)
    return {
        group: {
            space: (np.array([row["t"] for row in lines[0]]), primitives.band(list(zip(*lines, strict=True)), metric))
            for space, lines in spaces.items()
            if lines[0][0][metric] is not None
        }
        for group, spaces in found.items()
    }


def _lines(results: Sequence[Result]) -> Iterator[tuple[Result, dict[str, Any], list[Row]]]:
    """Every result's lines: their pair, method and space, and their rows."""
    for result in results:
        rows = [{**row, "indices": tuple(row["indices"])} for row in result.rows(ratio=None)]
        for head, members in grouped(rows, "method", "indices", "space"):
            yield result, head, members


def draw_matrix(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Barriers in the main metric between all adapters of each result, on the first space of all; one colour scale.

    Adapters whose names do not fit below the columns are numbered.
    """
    space = _shared_space(results)
    metric = metrics.main(results)
    tables = [_matrix(result, space, metric, panels) for result in results]
    top = max(float(np.nanmax(table)) for *_, table in tables) or 1.0
    axes, side = panels.matrices([rows for rows, *_ in tables])
    for ax, result, (rows, below, table) in zip(axes, results, tables, strict=True):
        image = primitives.heat(ax, table, rows, below, vmin=0, vmax=top, cmap="cividis_r")
        _values(ax, table, top, side)
        methods = {adapter["method"] for adapter in result.parameters["adapters"]}
        panels.title(ax, plot_style.method_name(methods.pop()) if len(methods) == 1 else "adapters")
    panels.colour_bar(
        axes, image, f"{metrics.label(results, metric, ' barrier')}, {space_looks(results)[space]['label']}"
    )
    return axes


def _values(ax: Axes, table: Floats, top: float, side: float) -> None:
    """Numbers in the cells of a matrix so many inches wide: two significant digits, or one, or none, as they fit."""
    pairs = [(i, j) for i, j in np.ndindex(*table.shape) if i != j and np.isfinite(table[i, j])]
    for digits in (2, 1):
        texts = [f"{table[i, j]:#.{digits}g}".rstrip(".") for i, j in pairs]
        widest = max((inches(text, 1) for text in texts), default=1.0)
        size = min(7.0, 0.85 * side / len(table) / widest)
        if size >= 5:
            for (i, j), text in zip(pairs, texts, strict=True):
                color = "white" if table[i, j] > 0.55 * top else "black"
                ax.text(j, i, text, ha="center", va="center", fontsize=size, color=color)
            return


def draw_ratios(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric of weighted mixtures: a point each, and the mean of every method and space."""
    metric = metrics.main(results)
    labels, looks = group_names(results), space_looks(results)
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for result in results:
        for row in (row for row in result.rows() if row["ratio"]):
            cells = groups.setdefault((labels[row["method"]], row["space"]), {})
            cells.setdefault(row["ratio"], []).append(row[metric])
    if not groups:
        raise OptionError("these results hold no mixtures: a line with ratios has them")
    names = list(dict.fromkeys(ratio for cells in groups.values() for ratio in cells))
    methods = list(dict.fromkeys(method for method, _ in groups))
    short = dict(zip(methods, _short_pairs(methods), strict=True))
    (ax,) = panels.grid(1, 1, 2.4)
    for i, ((method, space), cells) in enumerate(groups.items()):
        look = looks[space]
        shift = (i - (len(groups) - 1) / 2) * 0.7 / len(groups)
        for x, ratio in enumerate(names):
            values = np.array(cells.get(ratio, []), dtype=float)
            ax.plot(np.full(len(values), x + shift), values, "_", color=look["color"], markersize=7)
        means = [np.array(cells.get(ratio, [np.nan]), dtype=float).mean() for ratio in names]
        style = {"color": look["color"], "markersize": 5, "label": f"{short[method]}, {look['label']}"}
        marker = plot_style.look(methods.index(method))["marker"]
        ax.plot(np.arange(len(names)) + shift, means, marker, **style)
    name_axis(ax.xaxis, names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xlabel("weights (symbol: mean, dash: one combination)")
    ax.set_ylabel(metrics.label(results, metric))
    panels.legend(ax, columns=1 if panels.single else 2)
    return [ax]


def _short_pairs(names: Sequence[str]) -> list[str]:
    """Names of adapters that stand together, each of them shortened."""
    pairs = [name.split(" – ") for name in names]
    short = iter(shortened([name for pair in pairs for name in pair], MOST // 2))
    return [" – ".join(next(short) for _ in pair) for pair in pairs]


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric along the line, a panel a method, and ‖ΔW‖ along it."""
    metric = metrics.main(results)
    groups, norms, looks = curves(results, metric), curves(results, "norm"), space_looks(results)
    norms = {group: spaces for group, spaces in norms.items() if spaces}
    count = len(groups) + bool(norms)
    columns = panels.columns(count, 1 if panels.single else 4, 1.75)
    lines = -(-count // columns)
    axes = panels.grid(count, columns, 0.55 + 1.75 * lines if panels.single else 2.45 * lines)
    for i, (ax, (group, spaces)) in enumerate(zip(axes, groups.items(), strict=False)):
        if i:
            ax.sharey(axes[0])
        for space, (t, values) in spaces.items():
            primitives.curve(ax, t, values, **looks[space])
        panels.title(ax, *group.split(" – ", 1))
        if i % columns == 0:
            ax.set_ylabel(metrics.label(results, metric))
    dashes = dict(zip(norms, cycle(plot_style.DASHES), strict=False))
    if norms:
        _draw_norms(axes[-1], norms, looks, dashes)
    words = "t, from one adapter to the other"
    room = 0.7 * panels.page / columns
    for i, ax in enumerate(axes):
        if i + columns >= count:
            ax.set_xlabel(words if inches(words, type_size("axes.labelsize")) < room else "t")
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    several = dict(zip(_short_pairs(list(norms)), dashes.values(), strict=True)) if len(norms) > 1 else {}
    more = {f"norm of {group}": Line2D([], [], color="#333333", linestyle=look) for group, look in several.items()}
    panels.legend(*axes[: len(groups)], more=more)
    panels.caption(axes[0], _caption(results))
    return axes


def _draw_norms(
    ax: Axes,
    norms: Mapping[str, Mapping[str, tuple[Floats, Band]]],
    looks: Mapping[str, Mapping[str, Any]],
    dashes: Mapping[str, Any],
) -> None:
    """‖ΔW(t)‖ as a share of the mean of its ends; methods by dashes, spaces by colour and marker as elsewhere."""
    for group, spaces in norms.items():
        for space, (t, values) in spaces.items():
            norm = values[0]
            ends = np.maximum((1 - t) * norm[0] + t * norm[-1], np.finfo(float).tiny)
            look = {**looks[space], "linestyle": dashes[group], "label": f"{group} {space}"}
            value, low, high = (line / ends for line in values)
            primitives.curve(ax, t, (value, low, high), **look)
    ax.axhline(1, color="#555555", linestyle=":", linewidth=0.8, zorder=1)
    ax.set_ylim(0, max(1.08, 1.05 * ax.dataLim.ymax))
    ax.set_ylabel("‖ΔW(t)‖, ends = 1")
    ax.set_title("norm")


def _caption(results: Sequence[Result]) -> str:
    names = group_names(results)
    pairs: dict[str, set[tuple[int, Any]]] = {}
    for i, result in enumerate(results):
        for _, head, _ in _lines([result]):
            pairs.setdefault(names[head["method"]], set()).add((i, head["indices"]))
    counts = {name: len(members) for name, members in pairs.items()}
    band = plot_style.bands(counts, "95 % interval over examples", "±1 s.d. over pairs")
    return f"{plot_style.measured_on(results)}; bands: {band}"


def _shared_space(results: Sequence[Result]) -> str:
    """The first space that all results have; OptionError without one, as barriers share a scale."""
    first, *others = (result.parameters["spaces"] for result in results)
    shared = [space for space in first if all(space in spaces for spaces in others)]
    if not shared:
        raise OptionError("these results cannot share a figure: no space is in all of them")
    return str(shared[0])


def _matrix(result: Result, space: str, metric: str, panels: Panels) -> tuple[list[str], list[str], Floats]:
    """Names beside the rows and below the columns, and the barriers."""
    rows, below = panels.both_ways([adapter["label"] for adapter in result.parameters["adapters"]])
    table = np.zeros((len(rows), len(rows)))
    for row in result.summary["barriers"]:
        if (row["space"], row["metric"], row["barrier"]) == (space, metric, MAIN_BARRIER):
            i, j = row["indices"]
            table[i, j] = table[j, i] = np.nan if row["value"] is None else row["value"]
    return rows, below, table
