"""Figures of pruning: grouped bars for patterns, curves over sparsities and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, Locator, MaxNLocator

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.primitives import Panels
from lora_lab.results.result import Result, by_adapter

_AXIS: dict[str, tuple[str, Callable[[], Locator]]] = {
    "unstructured": ("sparsity (share of entries set to 0)", AutoLocator),
    "rank": ("rank kept", partial(MaxNLocator, integer=True)),
}
"""Kind of pruning that is a curve → what it is over, and what sets its ticks."""
_KINDS = ("structured", *_AXIS)

_DASHES = ("-", "--", ":", "-.")

_FEW = 8
"""Up to so many curves, each has its own words in the legend; of more, adapters and criteria have them."""


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """All kinds of pruning that the results hold: patterns above, curves below."""
    kinds = [kind for kind in _KINDS if any(result.rows(kind=kind) for result in results)]
    curves = [kind for kind in kinds if kind != "structured"]
    if "structured" not in kinds or not curves:
        return _draw_bars(results, panels) if "structured" in kinds else _draw_curves(results, panels, curves)
    below, height, ratios = (1, len(curves)), 5.3, [1.1, 1.0]
    if panels.single:
        below, height, ratios = (len(curves), 1), 2.6 + 2.5 * len(curves), [1.0] * (1 + len(curves))
    more = primitives.more_for(_patterns(results))
    axes = panels.stack(below, height + more, ratios, sharey=False)
    _bars(axes[0], results)
    for ax, kind in zip(axes[1:], curves, strict=True):
        _curve(ax, results, kind)
    panels.legend(axes[0])
    panels.caption(axes[0], _caption(results, kinds))
    return axes


def draw_structured(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Grouped bars, a pattern each; a label names what is kept."""
    return _draw_bars(results, panels)


def draw_unstructured(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Accuracy over sparsity."""
    return _draw_curves(results, panels, ["unstructured"])


def draw_rank(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Accuracy over the rank kept."""
    return _draw_curves(results, panels, ["rank"])


def _draw_bars(results: Sequence[Result], panels: Panels) -> list[Axes]:
    caption = _caption(results, ["structured"])
    (ax,) = panels.grid(1, 1, 2.7 + primitives.more_for(_patterns(results)))
    _bars(ax, results)
    panels.legend(ax)
    panels.caption(ax, caption)
    return [ax]


def _draw_curves(results: Sequence[Result], panels: Panels, kinds: Sequence[str]) -> list[Axes]:
    caption = _caption(results, kinds)
    height = 0.6 + 2.5 * len(kinds) if panels.single else 3.0
    axes = panels.grid(len(kinds), 1 if panels.single else len(kinds), height)
    for ax, kind in zip(axes, kinds, strict=True):
        if not _curve(ax, results, kind) and ax is axes[0]:
            panels.legend(ax)
    panels.caption(axes[0], caption)
    return axes


def _bars(ax: Axes, results: Sequence[Result]) -> None:
    groups = plot_style.grouped(by_adapter(results, kind="structured"))
    names = _patterns(results)
    values = {
        label: primitives.band(primitives.points(adapters, names, lambda row: row["label"]), "accuracy")
        for label, adapters in groups.items()
    }
    primitives.bars(ax, values)
    shown = plot_style.labels([name.removeprefix("type:").removesuffix("_proj") for name in names])
    primitives.name_axis(ax.xaxis, shown, rotation=45, ha="right")
    ax.set_ylabel("accuracy")
    ax.set_xlabel("kept")


def _curve(ax: Axes, results: Sequence[Result], kind: str) -> bool:
    """Accuracy of every adapter and criterion; whether the legend below names the adapters, too."""
    groups = plot_style.grouped(by_adapter(results, kind=kind))
    criteria = list(dict.fromkeys(row["criterion"] for adapters in groups.values() for r in adapters for row in r))
    few = len(groups) * len(criteria) <= _FEW
    for i, (label, adapters) in enumerate(groups.items()):
        for j, criterion in enumerate(criteria):
            names = [(criterion, row["label"]) for row in adapters[0] if row["criterion"] == criterion]
            places = primitives.points(adapters, names, lambda row: (row["criterion"], row["label"]))
            look = {**plot_style.look(label, i), "linestyle": _DASHES[j % 4]}
            if any(row["draws"] > 1 for row in adapters[0] if row["criterion"] == criterion):
                look["markerfacecolor"] = "white"  # means over random draws
            x = np.array([float(name) for _, name in names])
            values = primitives.band(places, "accuracy")
            words = f"{label}, {criterion}" if few else label if j == 0 else None
            primitives.curve(ax, x, values, alpha=0.14, label=words, **look)
    label, ticks = _AXIS[kind]
    ax.xaxis.set_major_locator(ticks())
    ax.set_xlabel(label)
    ax.set_ylabel("accuracy")
    handles, entries = ax.get_legend_handles_labels()
    if not few:  # colours are told above the figure
        handles = [Line2D([], [], color="#333333", linestyle=_DASHES[j % 4]) for j in range(len(criteria))]
        entries = criteria
    # below the axes: curves leave no corner free
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.28)}
    ax.legend(handles, entries, fontsize=6, handlelength=3, ncols=2, **below)
    return few


def _patterns(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(row["label"] for result in results for row in result.rows(kind="structured")))


def _caption(results: Sequence[Result], kinds: Sequence[str]) -> str:
    """What was measured; OptionError where the results hold no pruning of a kind."""
    counts: dict[str, int] = {}
    for kind in kinds:
        adapters = by_adapter(results, kind=kind)
        if not adapters:
            raise OptionError(f"these results hold no {kind} pruning: a sweep with {kind} among its kinds has it")
        counts |= {name: len(rows) for name, rows in plot_style.grouped(adapters).items()}
    bands = plot_style.bands(counts, "95 % interval (examples and draws)", "±1 s.d. over seeds")
    return f"{plot_style.measured_on(results)}; bands and bars: {bands}"
