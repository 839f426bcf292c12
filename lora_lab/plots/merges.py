"""Figures of merges: grouped bars, and accuracy over the coefficient or the ratio in small multiples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.results.result import Result, grouped
from lora_lab.results.stats import mean_and_spread

Row = Mapping[str, Any]

_ALONE = "alone"
_CURVES = ("task-arithmetic", "factor-average", "ties", "tsv")
"""What the main figure shows of the coefficients, where these were compared."""


def draw(results: Sequence[Result], width: str) -> Figure:
    """Bars of all merges at their chosen coefficients, and the coefficient curves of some; for seeds, their ratios."""
    if _one_task(results):
        return draw_ratios(results, width)
    compared = list(dict.fromkeys(name for result in results for name in result.parameters["merges"]))
    curves = ([name for name in _CURVES if name in compared] or compared)[: 4 if width == "double" else 2]
    figure = plot_style.new(width, 4.6 if width == "double" else 3.4 + 0.24 * (len(compared) + 1))
    horizontal = width == "single"
    grid = figure.add_gridspec(2, len(curves), height_ratios=[0.12 * (len(compared) + 1) if horizontal else 1.3, 1])
    top = figure.add_subplot(grid[0, :])
    _bars(top, results, horizontal=horizontal)
    axes: list[Axes] = []
    for i, name in enumerate(curves):
        axes.append(figure.add_subplot(grid[1, i], sharey=axes[0] if axes else None))
        _coefficient_curve(axes[-1], results, name)
        if i:
            axes[-1].tick_params(labelleft=False)
            axes[-1].set_ylabel("")
    _legend(figure, top, width)
    plot_style.caption(figure, width, _caption(results, "coefficients chosen on validation data"))
    return figure


def draw_bars(results: Sequence[Result], width: str) -> Figure:
    """Normalised accuracy of every merge at its chosen coefficient, grouped by training method."""
    if _one_task(results):
        raise OptionError("seeds of one task are drawn over their ratios: --kind compare-merges:ratios")
    merges = len({row["merge"] for result in results for row in result.summary["by_method"]})
    figure = plot_style.new(width, 3.0 if width == "double" else 1.2 + 0.24 * merges)
    ax = figure.subplots()
    _bars(ax, results, horizontal=width == "single")
    _legend(figure, ax, width)
    plot_style.caption(figure, width, _caption(results, "coefficients chosen on validation data"))
    return figure


def draw_coefficients(results: Sequence[Result], width: str) -> Figure:
    """Mean validation accuracy over the coefficient, a panel for each merge."""
    return _panels(results, width, lambda ax, name: _coefficient_curve(ax, results, name), _caption(results))


def draw_ratios(results: Sequence[Result], width: str) -> Figure:
    """Accuracy over the ratios in which seeds were merged, a panel for each merge."""
    if not _one_task(results):
        raise OptionError("these adapters are of several tasks; ratios are for seeds of one")
    return _panels(results, width, lambda ax, name: _ratio_curve(ax, results, name), _caption(results, "as merged"))


def _panels(results: Sequence[Result], width: str, each: Callable[[Axes, str], None], caption: str) -> Figure:
    names = list(dict.fromkeys(name for result in results for name in _merged(result)))
    per_row = 4 if width == "double" else 2
    count = -(-len(names) // per_row)
    figure = plot_style.new(width, 0.7 + 1.55 * count)
    axes = figure.subplots(count, min(per_row, len(names)), sharey=True, squeeze=False).ravel()
    for ax, name in zip(axes, names, strict=False):
        each(ax, name)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for i, ax in enumerate(axes[: len(names)]):
        if i % min(per_row, len(names)):
            ax.set_ylabel("")
        if i + per_row < len(names):
            ax.set_xlabel("")
    _legend(figure, axes[0], width)
    plot_style.caption(figure, width, caption)
    return figure


def _bars(ax: Axes, results: Sequence[Result], *, horizontal: bool) -> None:
    table = [row for result in results for row in result.summary["by_method"]]
    names = [name for name in dict.fromkeys(row["merge"] for row in table) if name != _ALONE]
    methods = list(dict.fromkeys(row["method"] for row in table))
    sets = [row for result in results for row in result.summary["sets"] if row["chosen"]]
    place = np.arange(len(names))
    for i, method in enumerate(methods):
        mean, low, high = np.full((3, len(names)), np.nan)
        for j, name in enumerate(names):
            own = [row for row in sets if row["method"] == method and row["merge"] == name]
            if own:
                mean[j], low[j], high[j] = _band(own, "normalised")
        label = plot_style.method_name(method)
        at = place + (i - (len(methods) - 1) / 2) * 0.8 / len(methods)
        look: dict[str, Any] = {
            "color": plot_style.look(label, i)["color"],
            "hatch": plot_style.hatch(label, i),
            "edgecolor": "white",
            "linewidth": 0.3,
        }
        error = np.stack([mean - low, high - mean]).clip(min=0)
        bars: dict[str, Any] = {"fmt": "none", "ecolor": "#333333", "elinewidth": 0.7, "capsize": 1.2}
        if horizontal:
            ax.barh(at, mean, 0.8 / len(methods), label=label, **look)
            ax.errorbar(mean, at, xerr=error, **bars)
        else:
            ax.bar(at, mean, 0.8 / len(methods), label=label, **look)
            ax.errorbar(at, mean, yerr=error, **bars)
    shown = [name.replace("ensemble of logits", "ensemble (logits)") for name in names]
    if horizontal:
        ax.set_yticks(place, shown)
        ax.invert_yaxis()
        ax.set_xlabel("accuracy / accuracy alone")
        ax.axvline(1, color="#333333", linewidth=0.7, linestyle=":")
    else:
        ax.set_xticks(place, shown, rotation=40, ha="right", rotation_mode="anchor")
        ax.set_ylabel("accuracy / accuracy alone")
        ax.axhline(1, color="#333333", linewidth=0.7, linestyle=":")


def _coefficient_curve(ax: Axes, results: Sequence[Result], name: str) -> None:
    curves = [curve for result in results for curve in result.summary["curves"] if curve["merge"] == name]
    for i, (head, own) in enumerate(grouped(curves, "method")):
        label = plot_style.method_name(head["method"])
        points: dict[float, list[float]] = {}
        for curve in own:
            for coefficient, accuracy in zip(curve["coefficient"], curve["accuracy"], strict=True):
                points.setdefault(coefficient, []).append(accuracy)
        coefficients = sorted(points)
        _curve(ax, np.array(coefficients), [_spread(points[c]) for c in coefficients], label, i)
    ax.set_xscale("log")
    ticks = [
        tick for tick in (0.1, 0.3, 1, 3, 10) if tick <= 1.05 * max((c["coefficient"][-1] for c in curves), default=10)
    ]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title(name)
    ax.set_xlabel("coefficient")
    ax.set_ylabel("validation accuracy")


def _ratio_curve(ax: Axes, results: Sequence[Result], name: str) -> None:
    sets = [row for result in results for row in result.summary["sets"] if row["merge"] in (name, _ALONE)]
    sets = [row for row in sets if row["coefficient"] in (None, 1.0)]
    ratios = list(dict.fromkeys(row["ratio"] for row in sets))
    for i, (head, own) in enumerate(grouped(sets, "method")):
        label = plot_style.method_name(head["method"])
        shown = [r for r in ratios if any(row["ratio"] == r for row in own)]
        values = []
        for ratio in shown:
            merged = [row for row in own if row["ratio"] == ratio and row["merge"] == name]
            values.append(_band([row for row in merged or own if row["ratio"] == ratio], "accuracy"))
        _curve(ax, np.array([ratios.index(r) for r in shown], dtype=float), values, label, i)
    ax.set_xticks(range(len(ratios)), [str(ratio) for ratio in ratios])
    ax.set_title(name)
    ax.set_xlabel("ratio of the seeds")
    ax.set_ylabel("accuracy")


def _curve(ax: Axes, x: Any, values: Sequence[tuple[float, float, float]], label: str, place: int) -> None:
    """Value, low and high at every x."""
    value, low, high = np.array(values, dtype=np.float64).T
    style = plot_style.look(label, place)
    ax.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0)
    ax.plot(x, value, label=label, **style)


def _band(rows: Sequence[Row], key: str) -> tuple[float, float, float]:
    """Mean and spread over sets, or the interval of one; NaN where there is no number."""
    if len(rows) == 1:
        value, low, high = np.array([rows[0][name] for name in (key, f"{key}_low", f"{key}_high")], dtype=np.float64)
        return float(value), float(low), float(high)
    return _spread([row[key] for row in rows])


def _spread(values: Sequence[float | None]) -> tuple[float, float, float]:
    """Mean, and one standard deviation to both sides (none of a single value)."""
    mean, spread = mean_and_spread(np.array(values, dtype=np.float64))
    return mean, mean - spread, mean + spread


def _merged(result: Result) -> list[str]:
    left_out = {row["merge"] for row in result.summary["sets"]}
    return [name for name in result.parameters["merges"] if name in left_out]


def _one_task(results: Sequence[Result]) -> bool:
    kinds = {result.parameters["one_task"] for result in results}
    if len(kinds) > 1:
        raise OptionError("merges of several tasks and of seeds of one cannot share a figure")
    return bool(kinds.pop())


def _legend(figure: Figure, ax: Axes, width: str) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4 if width == "double" else 2)


def _caption(results: Sequence[Result], how: str | None = None) -> str:
    """`how`: what the test split was used for; None where only validation data is shown."""
    first = results[0]
    several = any(row["sets"] > 1 for result in results for row in result.summary["by_method"])
    over = "combinations of seeds" if _one_task(results) else "seeds"
    one = "95 % interval" if how else "one set of adapters"  # validation curves carry no interval
    band = f"±1 s.d. over {over}" if several else one
    names, n = first.parameters["task_names"], first.provenance.get("examples")
    where = names[0] if len(names) == 1 else f"{len(names)} tasks ({', '.join(names)})"
    split = f"{first.parameters['split']} split, n = {n}, {how}" if how else "validation split"
    return "; ".join([where, split, band, *_beginnings(results)])


def _beginnings(results: Sequence[Result]) -> list[str]:
    """Whether the adapters of a set began from one A; nothing where that is not known."""
    found = {row["shared"] for result in results for row in result.summary.get("shared_initial_A", [])}
    if found in ({True}, {False}):
        return ["adapters of a set share their initial A" if True in found else "adapters of separate initial A"]
    return ["some adapters share their initial A"] if True in found else []
