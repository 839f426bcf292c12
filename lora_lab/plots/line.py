"""Figures of lines between adapters: curves, barrier matrices, mixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.errors import OptionError, some
from lora_lab.plots import style as plot_style
from lora_lab.results.result import Result

Floats = npt.NDArray[np.float64]

SPACES: dict[str, dict[str, Any]] = {
    "factors": {"label": "factors A, B averaged", "color": "#D55E00", "marker": "o", "linestyle": "-"},
    "matched": {"label": "factors, ‖ΔW‖ matched", "color": "#E69F00", "marker": "s", "linestyle": "--"},
    "delta": {"label": "ΔW averaged", "color": "#0072B2", "marker": "^", "linestyle": "-"},
    "aligned": {"label": "factors aligned first", "color": "#009E73", "marker": "D", "linestyle": ":"},
}


def _style_of(space: str) -> dict[str, Any]:
    """How a space is drawn; one that is not known has the last of all styles and its own name."""
    return SPACES.get(space, {**plot_style.CYCLE[-1], "label": space})


def curves(results: Sequence[Result], metric: str) -> dict[str, dict[str, tuple[Floats, Floats, Floats, Floats]]]:
    """Group → space → (t, value, low, high), groups by method over all results.

    One pair: the value with its interval over the examples. Several: mean and one standard deviation over pairs.
    """
    _comparable(results)
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    for result in results:
        for indices in _pairs(result):
            for space in result.parameters["spaces"]:
                rows = result.rows(ratio=None, indices=list(indices), space=space)
                group = found.setdefault(plot_style.method_name(rows[0]["method"]), {})
                group.setdefault(space, []).append(rows)
    return {
        group: {space: _band(lines, metric) for space, lines in spaces.items() if lines[0][0][metric] is not None}
        for group, spaces in found.items()
    }


def draw_accuracy(results: Sequence[Result], width: str) -> Figure:
    """Accuracy along the line, a panel a method, and ‖ΔW‖ along it."""
    return _draw_lines(results, width, "accuracy", "accuracy")


def draw_loss(results: Sequence[Result], width: str) -> Figure:
    """Loss along the line, a panel a method, and ‖ΔW‖ along it."""
    return _draw_lines(results, width, "loss", "loss (nats)")


def draw_matrix(results: Sequence[Result], width: str) -> Figure:
    """Error barriers between all adapters of each result, one colour scale for all."""
    tables = [_matrix(result) for result in results]
    top = max(float(table.max()) for _, table in tables) or 1.0
    figure = plot_style.new(width, {"single": 2.9 * len(tables), "double": min(4.5, 0.7 + 5.6 / len(tables))}[width])
    shape = (len(tables), 1) if width == "single" else (1, len(tables))
    axes = figure.subplots(*shape, squeeze=False).ravel()
    for ax, result, (labels, table) in zip(axes, results, tables, strict=True):
        image = ax.imshow(table, vmin=0, vmax=top, cmap="cividis_r")
        _annotate(ax, labels, table, top)
        ax.set_title(_title(result))
    figure.colorbar(image, ax=list(axes), label="error barrier of the factor line", shrink=0.8)
    return figure


def draw_ratios(results: Sequence[Result], width: str) -> Figure:
    """Accuracy of weighted mixtures: a point each, and the mean of every method and space."""
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for result in results:
        for row in (row for row in result.rows() if row["ratio"]):
            key = (plot_style.method_name(row["method"]), row["space"])
            groups.setdefault(key, {}).setdefault(row["ratio"], []).append(row["accuracy"])
    if not groups:
        raise OptionError("these results hold no mixtures; compute them with `lora-lab interpolate --ratios 1:2,1:1`")
    names = list(dict.fromkeys(ratio for cells in groups.values() for ratio in cells))
    figure = plot_style.new(width, 2.4)
    ax = figure.subplots()
    methods = list(dict.fromkeys(method for method, _ in groups))
    for i, ((method, space), cells) in enumerate(groups.items()):
        marker = plot_style.CYCLE[methods.index(method) % len(plot_style.CYCLE)]["marker"]
        color = _style_of(space)["color"]
        shift = (i - (len(groups) - 1) / 2) * 0.7 / len(groups)
        for x, ratio in enumerate(names):
            values = np.array(cells.get(ratio, []))
            ax.plot(np.full(len(values), x + shift), values, "_", color=color, markersize=7)
        means = [np.mean(cells.get(ratio, [np.nan])) for ratio in names]
        label = f"{method}, {_style_of(space)['label']}"
        ax.plot(np.arange(len(names)) + shift, means, marker, color=color, markersize=5, label=label)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xlabel("weights (symbol: mean, dash: one combination)")
    ax.set_ylabel("accuracy")
    figure.legend(loc="outside upper center", ncols=2 if width == "double" else 1)
    return figure


def _draw_lines(results: Sequence[Result], width: str, metric: str, label: str) -> Figure:
    groups, norms = curves(results, metric), curves(results, "norm")
    norms = {group: spaces for group, spaces in norms.items() if spaces}
    panels = len(groups) + bool(norms)
    shape = (1, panels) if width == "double" else (panels, 1)
    figure = plot_style.new(width, 2.45 if width == "double" else 0.55 + 1.75 * panels)
    axes = figure.subplots(*shape, squeeze=False).ravel()
    for ax, (group, spaces) in zip(axes, groups.items(), strict=False):
        ax.sharey(axes[0])
        for space, band in spaces.items():
            _line(ax, band, **_style_of(space))
        ax.set_title(group)
        if ax is axes[0] or width == "single":
            ax.set_ylabel(label)
    if norms:
        _draw_norms(axes[-1], norms)
    for ax in axes:
        if ax is axes[-1] or width == "double":
            ax.set_xlabel("t, from one adapter to the other")
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) if width == "double" else 2)
    plot_style.caption(figure, width, _caption(results))
    return figure


def _draw_norms(ax: Axes, norms: Mapping[str, Mapping[str, tuple[Floats, Floats, Floats, Floats]]]) -> None:
    """‖ΔW(t)‖ as a share of the mean of its ends; methods by dashes, spaces by colour and marker as elsewhere."""
    for i, (group, spaces) in enumerate(norms.items()):
        for space, (t, value, low, high) in spaces.items():
            if space != "matched":
                ends = np.maximum((1 - t) * value[0] + t * value[-1], np.finfo(float).tiny)
                style = {**_style_of(space), "linestyle": plot_style.CYCLE[i]["linestyle"], "label": f"{group} {space}"}
                _line(ax, (t, value / ends, low / ends, high / ends), **style)
    ax.axhline(1, color=SPACES["matched"]["color"], linestyle="--", linewidth=1)
    ax.set_ylim(0, max(1.08, 1.05 * ax.dataLim.ymax))
    ax.set_ylabel("‖ΔW(t)‖, ends = 1")
    ax.set_title("norm" + (f" ({', '.join(_dashes(norms))})" if len(norms) > 1 else ""))


def _dashes(groups: Mapping[str, Any]) -> list[str]:
    names = {"-": "solid", "--": "dashed", "-.": "dash-dot", ":": "dotted"}
    return [f"{group} {names[plot_style.CYCLE[i]['linestyle']]}" for i, group in enumerate(groups)]


def _line(ax: Axes, band: tuple[Floats, Floats, Floats, Floats], **style: Any) -> None:
    t, value, low, high = band
    ax.fill_between(t, low, high, color=style["color"], alpha=0.16, linewidth=0)
    ax.plot(t, value, **style)


def _band(lines: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> tuple[Floats, Floats, Floats, Floats]:
    t = np.array([row["t"] for row in lines[0]])
    values = np.array([[row[metric] for row in line] for line in lines], dtype=float)
    mean = values.mean(0)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        return t, mean, mean - spread, mean + spread
    row = lines[0]
    low, high = (np.array([cell.get(f"{metric}_{end}", cell[metric]) for cell in row]) for end in ("low", "high"))
    return t, mean, low, high


def _comparable(results: Sequence[Result]) -> None:
    """Only lines of one task, split and grid share axes."""
    for name in ("task", "split", "points"):
        values = [result.parameters.get(name) for result in results]
        if any(value != values[0] for value in values):
            raise OptionError(
                f"these results cannot share a figure: {name} is {some(map(str, dict.fromkeys(map(str, values))))}"
            )


def _pairs(result: Result) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(row["indices"]) for row in result.rows(ratio=None)))


def _caption(results: Sequence[Result]) -> str:
    parameters, n = results[0].parameters, results[0].provenance.get("examples")
    pairs: dict[str, int] = {}
    for result in results:
        for indices in _pairs(result):
            name = plot_style.method_name(result.rows(ratio=None, indices=list(indices))[0]["method"])
            pairs[name] = pairs.get(name, 0) + 1
    band = plot_style.bands(pairs, "95 % interval over examples", "±1 s.d. over pairs")
    task = plot_style.task_name(parameters["task"])
    return f"{task}, {parameters['split']} split, n = {n}; bands: {band}"


def _matrix(result: Result) -> tuple[list[str], Floats]:
    labels = [adapter["label"] for adapter in result.parameters["adapters"]]
    table = np.zeros((len(labels), len(labels)))
    space = "factors" if "factors" in result.parameters["spaces"] else result.parameters["spaces"][0]
    for row in result.summary["barriers"]:
        if (row["space"], row["metric"], row["barrier"]) == (space, "error", "entezari"):
            i, j = row["indices"]
            table[i, j] = table[j, i] = row["value"]
    return labels, table


def _annotate(ax: Axes, labels: Sequence[str], table: Floats, top: float) -> None:
    for (i, j), value in np.ndenumerate(table):
        if i != j:
            color = "white" if value > 0.55 * top else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    ax.grid(visible=False)


def _title(result: Result) -> str:
    methods = {adapter["method"] for adapter in result.parameters["adapters"]}
    return plot_style.method_name(methods.pop()) if len(methods) == 1 else "adapters"
