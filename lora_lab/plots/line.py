"""Figures of lines between adapters: curves, barrier matrices, mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.primitives import Band, Floats, Panels
from lora_lab.results.analysis_kinds import MAIN_BARRIER
from lora_lab.results.result import Result

_LOOKS = {
    "factors": ("factors A, B averaged", 1, "o", "-"),
    "matched": ("factors, ‖ΔW‖ matched", 4, "s", "--"),
    "delta": ("ΔW averaged", 0, "^", "-"),
    "aligned": ("factors aligned first", 2, "D", ":"),
}
"""Space → label, place among the colours of the style (whichever others are drawn), marker and dashes."""


def space_look(space: str, place: int = 0) -> dict[str, Any]:
    """Label, colour, marker and dashes of a space; one that is not known here has those of its place."""
    if space not in _LOOKS:
        return {"label": plot_style.shortened(space), **plot_style.look(space, 5 + place)}
    label, color_place, marker, dashes = _LOOKS[space]
    color = plot_style.look("", color_place)["color"]
    return {"label": label, "color": color, "marker": marker, "linestyle": dashes}


def curves(results: Sequence[Result], metric: str) -> dict[str, dict[str, tuple[Floats, Band]]]:
    """Group → space → (t, value with its band), groups by method over all results.

    One pair: the value with its interval over the examples. Several: mean and one standard deviation over pairs.
    """
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    for result in results:
        for indices in _pairs(result):
            for space in result.parameters["spaces"]:
                rows = result.rows(ratio=None, indices=list(indices), space=space)
                group = found.setdefault(plot_style.method_name(rows[0]["method"]), {})
                group.setdefault(space, []).append(rows)
    return {
        group: {
            space: (np.array([row["t"] for row in lines[0]]), primitives.band(list(zip(*lines, strict=True)), metric))
            for space, lines in spaces.items()
            if lines[0][0][metric] is not None
        }
        for group, spaces in found.items()
    }


def draw_accuracy(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Accuracy along the line, a panel a method, and ‖ΔW‖ along it."""
    return _draw_lines(results, panels, "accuracy", "accuracy")


def draw_loss(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Loss along the line, a panel a method, and ‖ΔW‖ along it."""
    return _draw_lines(results, panels, "loss", "loss (nats)")


def draw_matrix(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Error barriers between all adapters of each result, on the first space that all have; one colour scale."""
    space = _shared_space(results)
    tables = [_matrix(result, space) for result in results]
    top = max(float(table.max()) for _, table in tables) or 1.0
    count = len(tables)
    height = 2.9 * count if panels.single else min(4.5, 0.7 + 5.6 / count)
    axes = panels.grid(count, 1 if panels.single else count, height)
    for ax, result, (labels, table) in zip(axes, results, tables, strict=True):
        image = primitives.heat(ax, table, labels, labels, rotation=45, vmin=0, vmax=top, cmap="cividis_r")
        size = min(7.0, 72 * primitives.extent(ax, "x") / len(labels) / 2.4)  # points: four signs to a cell
        for (i, j), value in np.ndenumerate(table) if size > 3 else ():
            if i != j:
                color = "white" if value > 0.55 * top else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=size, color=color)
        methods = {adapter["method"] for adapter in result.parameters["adapters"]}
        primitives.title(ax, plot_style.method_name(methods.pop()) if len(methods) == 1 else "adapters")
    panels.colour_bar(axes, image, f"error barrier, {space_look(space)['label']}", 0.8)
    return axes


def draw_ratios(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Accuracy of weighted mixtures: a point each, and the mean of every method and space."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for result in results:
        for row in (row for row in result.rows() if row["ratio"]):
            key = (plot_style.method_name(row["method"]), row["space"])
            groups.setdefault(key, {}).setdefault(row["ratio"], []).append(row["accuracy"])
    if not groups:
        raise OptionError("these results hold no mixtures: a line with ratios has them")
    names = list(dict.fromkeys(ratio for cells in groups.values() for ratio in cells))
    methods = list(dict.fromkeys(method for method, _ in groups))
    if len(methods) > 7:  # pairs of adapters without methods: more than there are symbols
        methods, pairs = ["all pairs"], groups
        groups = {}
        for (_, space), cells in pairs.items():
            for ratio, accuracies in cells.items():
                groups.setdefault((methods[0], space), {}).setdefault(ratio, []).extend(accuracies)
    (ax,) = panels.grid(1, 1, 2.4)
    for i, ((method, space), cells) in enumerate(groups.items()):
        look = space_look(space)
        shift = (i - (len(groups) - 1) / 2) * 0.7 / len(groups)
        for x, ratio in enumerate(names):
            values = np.array(cells.get(ratio, []))
            ax.plot(np.full(len(values), x + shift), values, "_", color=look["color"], markersize=7)
        means = [np.mean(cells.get(ratio, [np.nan])) for ratio in names]
        short = " – ".join(plot_style.shortened(part, 18) for part in method.split(" – "))
        style = {"color": look["color"], "markersize": 5, "label": f"{short}, {look['label']}"}
        marker = plot_style.look("", methods.index(method))["marker"]
        ax.plot(np.arange(len(names)) + shift, means, marker, **style)
    primitives.name_axis(ax.xaxis, names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xlabel("weights (symbol: mean, dash: one combination)")
    ax.set_ylabel("accuracy")
    panels.legend(ax, 1 if panels.single else 2)
    return [ax]


def _draw_lines(results: Sequence[Result], panels: Panels, metric: str, label: str) -> list[Axes]:
    groups, norms = curves(results, metric), curves(results, "norm")
    norms = {group: spaces for group, spaces in norms.items() if spaces}
    count = len(groups) + bool(norms)
    columns = 1 if panels.single else min(4, count)
    lines = -(-count // columns)
    axes = panels.grid(count, columns, 0.55 + 1.75 * lines if panels.single else 2.45 * lines)
    for i, (ax, (group, spaces)) in enumerate(zip(axes, groups.items(), strict=False)):
        if i:
            ax.sharey(axes[0])
        for place, (space, (t, values)) in enumerate(spaces.items()):
            primitives.curve(ax, t, values, **space_look(space, place))
        primitives.title(ax, group)
        if i % columns == 0:
            ax.set_ylabel(label)
    if norms:
        _draw_norms(axes[-1], norms)
    for i, ax in enumerate(axes):
        if i + columns >= count:
            ax.set_xlabel("t, from one adapter to the other" if columns < 4 else "t")
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    spaces_drawn = len(axes[0].get_legend_handles_labels()[1])
    panels.legend(axes[0], 2 if panels.single else spaces_drawn)
    panels.caption(axes[0], _caption(results))
    return axes


def _draw_norms(ax: Axes, norms: Mapping[str, Mapping[str, tuple[Floats, Band]]]) -> None:
    """‖ΔW(t)‖ as a share of the mean of its ends; methods by dashes, spaces by colour and marker as elsewhere."""
    for i, (group, spaces) in enumerate(norms.items()):
        for place, (space, (t, values)) in enumerate(spaces.items()):
            norm = values[0]
            ends = np.maximum((1 - t) * norm[0] + t * norm[-1], np.finfo(float).tiny)
            look = {**space_look(space, place), "linestyle": plot_style.dashes(i), "label": f"{group} {space}"}
            value, low, high = (line / ends for line in values)
            primitives.curve(ax, t, (value, low, high), **look)
    ax.axhline(1, color="#555555", linestyle=":", linewidth=0.8, zorder=1)
    ax.set_ylim(0, max(1.08, 1.05 * ax.dataLim.ymax))
    ax.set_ylabel("‖ΔW(t)‖, ends = 1")
    words = {"-": "solid", "--": "dashed", "-.": "dash-dot", ":": "dotted"}
    dashes = ", ".join(f"{group} {words[plot_style.dashes(i)]}" for i, group in enumerate(norms))
    fits = primitives.inches(dashes, 8) < 1.2 * primitives.extent(ax, "x")
    ax.set_title(f"norm ({dashes})" if len(norms) > 1 and fits else "norm")


def _pairs(result: Result) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(row["indices"]) for row in result.rows(ratio=None)))


def _caption(results: Sequence[Result]) -> str:
    pairs: dict[str, int] = {}
    for result in results:
        for indices in _pairs(result):
            name = plot_style.method_name(result.rows(ratio=None, indices=list(indices))[0]["method"])
            pairs[name] = pairs.get(name, 0) + 1
    band = plot_style.bands(pairs, "95 % interval over examples", "±1 s.d. over pairs")
    return f"{plot_style.measured_on(results)}; bands: {band}"


def _shared_space(results: Sequence[Result]) -> str:
    """The first space that all results have; OptionError without one, as barriers share a scale."""
    first, *others = (result.parameters["spaces"] for result in results)
    shared = [space for space in first if all(space in spaces for spaces in others)]
    if not shared:
        raise OptionError("these results cannot share a figure: no space is in all of them")
    return str(shared[0])


def _matrix(result: Result, space: str) -> tuple[list[str], Floats]:
    labels = plot_style.distinct([adapter["label"] for adapter in result.parameters["adapters"]])
    table = np.zeros((len(labels), len(labels)))
    for row in result.summary["barriers"]:
        if (row["space"], row["metric"], row["barrier"]) == (space, "error", MAIN_BARRIER):
            i, j = row["indices"]
            table[i, j] = table[j, i] = row["value"]
    return labels, table
