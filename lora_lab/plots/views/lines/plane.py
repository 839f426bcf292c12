"""Figures of planes: metrics as filled contours, with the three points and the norm-matched curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, shortened
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Floats
from lora_lab.plots.views import metrics
from lora_lab.results.result import Result

_SHOWN = 2
"""How many metrics are shown at most, the main one and the next."""
_LEVELS = 13
_TICKS = 4  # levels from one tick of a colour bar to the next, the first and the last of 13 among them
_CURVE = {"colors": "white", "linestyles": "dashed", "linewidths": 1.2}


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric on the plane and the next one, of each result; all results share each metric's scale.

    What is the better the less it is, as a loss, is on a logarithmic one: valleys are flat beside their walls.
    """
    shown = metrics.names(results)[:_SHOWN]
    columns = 1 if panels.single else len(shown)
    count = len(shown) * len(results)
    axes = panels.grid(count, columns, (3.4 if panels.single else 2.9) * count / columns)
    tables = {metric: [_table(result, metric) for result in results] for metric in shown}
    scales = {metric: _scale(tables[metric], higher=metrics.higher(results, metric)) for metric in shown}
    for k, ax in enumerate(axes):
        metric, i = shown[k % len(shown)], k // len(shown)
        _draw_one(ax, results[i], tables[metric][i], {**scales[metric], "norm": scales[metric]["norm"]()})
        levels = scales[metric]["levels"][::_TICKS]
        bar = panels.colour_bar([ax], ax.collections[0], metrics.label(results, metric))
        bar.set_ticks(levels, labels=[f"{level:.3g}" for level in levels])
        bar.minorticks_off()
        if k + columns >= count:
            ax.set_xlabel("distance in ‖ΔW‖")
        if k % columns == 0:
            ax.set_ylabel("distance in ‖ΔW‖")
    curve = Line2D([], [], color="#777777", linestyle="dashed", linewidth=1.2)
    panels.legend(axes[0], more={"‖ΔW‖ as the adapters have it": curve})
    panels.caption(axes[0], plot_style.measured_on(results))
    return axes


def _scale(tables: Sequence[Floats], *, higher: bool) -> dict[str, Any]:
    """Levels from the smallest to the largest value of all tables, and their colours; the better, the lighter."""
    known = np.concatenate([table[np.isfinite(table)] for table in tables])
    if not len(known):
        raise OptionError("the metric has no value anywhere on the plane")
    low = float(known.min())
    logarithmic = not higher and low >= 0
    low = max(low, np.finfo(float).tiny) if logarithmic else low
    high = max(float(known.max()), low + 1e-6 * abs(low) + 1e-9)
    between, norm = (np.geomspace, LogNorm) if logarithmic else (np.linspace, Normalize)
    return {
        "levels": between(low, high, _LEVELS),
        "norm": partial(norm, low, high),  # one for each panel: bars of one norm would set each other's ticks
        "cmap": "cividis" if higher else "cividis_r",
    }


def _table(result: Result, key: str) -> Floats:
    """A column of the grid as [y, x]."""
    side = int(result.parameters["points"])
    values = np.array([np.nan if value is None else value for value in result.columns[key]], dtype=float)
    return values.reshape(side, side)


def _draw_one(ax: Axes, result: Result, table: Floats, scale: Mapping[str, Any]) -> None:
    x, y = _table(result, "x"), _table(result, "y")
    table = np.ma.masked_invalid(table.clip(scale["levels"][0], scale["levels"][-1]))
    ax.contourf(x, y, table, **scale)
    ax.contour(x, y, table, levels=scale["levels"], colors="black", linewidths=0.25, alpha=0.5)
    shell = _table(result, "norm") - _table(result, "matched_norm")
    if np.isfinite(shell).any() and np.nanmin(shell) < 0 < np.nanmax(shell):
        ax.contour(x, y, np.ma.masked_invalid(shell), levels=[0.0], **_CURVE)
    _draw_corners(ax, result)
    ax.set_aspect("equal")
    ax.grid(visible=False)


def _draw_corners(ax: Axes, result: Result) -> None:
    """The three points and their names: the first's below it, so that it keeps apart from the second's."""
    corners = result.summary["corners"]
    middle = sum(ax.get_xlim()) / 2
    for i, name in enumerate(shortened([corner["adapter"] for corner in corners], MOST // 2)):
        x, y = corners[i]["x"], corners[i]["y"]
        ax.plot(x, y, "o", color="white", markeredgecolor="black", markersize=5)
        place: dict[str, Any] = {"ha": "right" if x > middle else "left", "va": "bottom" if i else "top", "fontsize": 7}
        text = ax.annotate(name, (x, y), xytext=(0, 6 if i else -6), textcoords="offset points", **place)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
