"""What figures are made of: curves with bands, grouped bars, heat maps; and from which rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter

from lora_lab.plots import style as plot_style
from lora_lab.plots.names import extent, name_axis
from lora_lab.results.stats import mean_and_spread

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]
Band = tuple[Floats, Floats, Floats]
"""Value, low and high at every place."""

_DARK = "#333333"
_THINNEST = 2.5  # points: of a bar; thinner ones are their edges
_MARKERS = 10  # markers on a curve, of more points than twice as many


def points(adapters: Sequence[Sequence[Row]], names: Sequence[Any], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    """For every name, the rows of all adapters that have it: of each the first."""
    tables = [{key(row): row for row in reversed(rows)} for rows in adapters]
    return [[table[name] for table in tables if name in table] for name in names]


def band(places: Sequence[Sequence[Row]], key: str, ends: tuple[str, str] | None = None) -> Band:
    """From the rows at each place: of one its value and interval, of several their mean ± one standard deviation.

    NaN where there is no row or no number. A value without an interval has a band of no width.
    """
    low, high = ends or (f"{key}_low", f"{key}_high")
    table = np.full((3, len(places)), np.nan)
    for i, rows in enumerate(places):
        if len(rows) == 1:
            value = rows[0][key]
            table[:, i] = np.array([value, rows[0].get(low, value), rows[0].get(high, value)], dtype=float)
        elif rows:
            mean, spread = mean_and_spread(np.array([row[key] for row in rows], dtype=float))
            table[:, i] = mean, mean - spread, mean + spread
    return table[0], table[1], table[2]


def curve(ax: Axes, x: Any, values: Band, alpha: float = 0.16, **look: Any) -> None:
    """A line in its band; of many points, only some have a marker, on each line others."""
    value, low, high = values
    ax.fill_between(x, low, high, color=look["color"], alpha=alpha, linewidth=0)
    if (step := len(x) // _MARKERS) > 1:
        look["markevery"] = (len(ax.lines) % step, step)
    ax.plot(x, value, **look)


def too_thin(ax: Axes, groups: Mapping[str, Band], *, horizontal: bool = False) -> bool:
    """Whether so many groups of bars would be too thin to be seen, or more than there are colours."""
    return len(groups) > plot_style.FEW or _thickness(ax, groups, horizontal=horizontal) < _THINNEST


def _thickness(ax: Axes, groups: Mapping[str, Band], *, horizontal: bool) -> float:
    """Points that each bar has for itself."""
    count = sum(len(value) for value, _, _ in groups.values())
    return 72 * 0.8 * extent(ax.yaxis if horizontal else ax.xaxis) / max(1, count)


def bars(ax: Axes, groups: Mapping[str, Band], *, horizontal: bool = False, capsize: float = 1.2) -> None:
    """Groups of bars side by side, with their intervals; points instead, where the bars would be too thin."""
    share, thin = 0.8 / len(groups), too_thin(ax, groups, horizontal=horizontal)
    for i, (label, place) in enumerate(plot_style.places(groups).items()):
        value, low, high = groups[label]
        at = np.arange(len(value)) + (i - (len(groups) - 1) / 2) * share
        error = np.stack([value - low, high - value]).clip(min=0)
        known = np.isfinite(error).all(0)
        ends: dict[str, Any] = {"fmt": "none", "ecolor": _DARK, "elinewidth": 0.7, "capsize": capsize}
        if thin:
            look = plot_style.look(place)
            ends |= {"fmt": look["marker"], "color": look["color"], "ecolor": look["color"], "capsize": 0}
            ends |= {"markersize": 3, "label": label}
            ends["elinewidth"] = min(0.7, 0.4 * _thickness(ax, groups, horizontal=horizontal))  # else they were a block
        else:
            (ax.barh if horizontal else ax.bar)(at, value, share, **plot_style.bar_look(place), label=label)
        if known.any():
            ends["xerr" if horizontal else "yerr"] = error[:, known]
            across, up = (value, at) if horizontal else (at, value)
            ax.errorbar(across[known], up[known], **ends)


def spans(
    ax: Axes, groups: Mapping[str, tuple[Floats, Floats]], label: str, color: str, *, horizontal: bool = False
) -> None:
    """Ranges (low, high) at the places of the bars of these groups, of one colour and one name in the legend."""
    share = 0.8 / len(groups)
    for i, (low, high) in enumerate(groups.values()):
        known = np.isfinite(low)
        if not known.any():
            continue
        at = (np.arange(len(low)) + (i - (len(groups) - 1) / 2) * share)[known]
        width = np.maximum(high - low, 0.004)[known]  # of no width it would not be seen
        drawn: dict[str, Any] = {"color": color, "alpha": 0.8, "linewidth": 0, "zorder": 1.5}  # below the intervals
        if horizontal:
            ax.barh(at, width, share, left=low[known], label=label, **drawn)
        else:
            ax.bar(at, width, share, bottom=low[known], label=label, **drawn)


def named_bars(ax: Axes, groups: Mapping[str, Band], names: Sequence[str], label: str, *, horizontal: bool) -> None:
    """Bars that have their names beside them where they are horizontal, the first on top, and else below them."""
    bars(ax, groups, horizontal=horizontal)
    name_axis(ax.yaxis if horizontal else ax.xaxis, names)
    if horizontal:
        ax.set_ylim(len(names) - 0.4, -0.6)
    (ax.set_xlabel if horizontal else ax.set_ylabel)(label)


def heat(ax: Axes, table: Floats, rows: Sequence[str], columns: Sequence[str], **options: Any) -> Any:
    """A matrix as colours, its rows and columns named; the image, for a colour bar."""
    image = ax.imshow(table, **options)
    name_axis(ax.xaxis, columns)
    name_axis(ax.yaxis, rows)
    ax.grid(visible=False)
    return image


def plain_numbers(axis: Axis) -> None:
    """1, 2 and 5 of every decade as numbers on a logarithmic axis, or its decades alone where these are many."""
    low, high = axis.get_view_interval()
    digits = "125" if high < 300 * low else "1"
    for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else ""))
