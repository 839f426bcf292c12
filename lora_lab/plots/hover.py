"""Where the values of a figure are drawn, and what they are: for readers that point at them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import same_color, to_rgb
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from lora_lab.plots.names import is_named

MOST = 6000
"""Spots of a figure: with more, its file would be larger than what it shows."""


@dataclass(frozen=True)
class Spot:
    """A place of a figure in points from its upper left corner, and the value that is drawn there."""

    x: float
    y: float
    width: float
    """0 of a point."""
    height: float
    text: str
    """What is drawn, and below it the names and values of both axes."""


def spots(figure: Figure) -> list[Spot]:
    """The spots of every curve, bar, point and cell; none where they would be more than MOST."""
    found: list[Spot] = []
    for ax in figure.axes:
        if ax.axison and ax.get_visible() and ax.get_label() != "<colorbar>":
            found += _cells(ax, MOST)
            found += _bars(ax)
            found += _points(ax)
        if len(found) > MOST:
            return []
    return found


def _points(ax: Axes) -> Iterator[Spot]:
    """Of curves and of points with intervals."""
    labels = {id(each[0]): each.get_label() for each in ax.containers if isinstance(each, ErrorbarContainer)}
    intervals = {axis: _intervals(ax, axis) for axis in (0, 1)}
    for line in ax.lines:
        if not all(line.get_transform().contains_branch_seperately(ax.transData)):
            continue  # it only leads the eye over the whole panel, as axhline does
        label = str(labels.get(id(line)) or line.get_label())
        name = "" if label.startswith("_") else label
        places = np.column_stack([np.asarray(part, dtype=float) for part in line.get_data(orig=False)])
        for x, y in places[np.isfinite(places).all(1)]:
            ends = _at(intervals[1], x, y) or _band(ax, line, x, y)
            across = _at(intervals[0], y, x)
            text = _text(ax, name, _value(ax.xaxis, x, across), _value(ax.yaxis, y, ends))
            yield from _spot(ax, (x, y), (x, y), text)


def _bars(ax: Axes) -> Iterator[Spot]:
    for container in ax.containers:
        if not isinstance(container, BarContainer):
            continue
        label = str(container.get_label())
        name = "" if label.startswith("_") else label
        flat = container.orientation == "horizontal"
        intervals = _intervals(ax, 0 if flat else 1)
        for patch in container.patches:
            box = patch.get_bbox()
            at = (box.y0 + box.y1) / 2 if flat else (box.x0 + box.x1) / 2
            value = box.x1 if flat else box.y1
            if not math.isfinite(value):
                continue
            value_axis, place_axis = (ax.xaxis, ax.yaxis) if flat else (ax.yaxis, ax.xaxis)
            says = _value(value_axis, value, _at(intervals, at, value))
            place = _value(place_axis, at, None)
            yield from _spot(ax, box.min, box.max, _text(ax, name, place, says))


def _cells(ax: Axes, most: int) -> Iterator[Spot]:
    """Of images whose cells lie at 0, 1, 2 …, as `imshow` lays them."""
    for image in ax.images:
        table = np.ma.filled(np.ma.asarray(image.get_array()).astype(float), np.nan)
        if table.ndim != 2 or table.size > most:
            continue
        left, right, bottom, top = image.get_extent()
        lines, columns = table.shape
        for (i, j), value in np.ndenumerate(table):
            if not math.isfinite(value):
                continue
            x0, x1 = (left + (right - left) * (j + side) / columns for side in (0, 1))
            y0, y1 = (top + (bottom - top) * (i + side) / lines for side in (0, 1))
            where = [_value(ax.yaxis, (y0 + y1) / 2, None), _value(ax.xaxis, (x0 + x1) / 2, None)]
            yield from _spot(ax, (x0, y0), (x1, y1), _text(ax, "", ", ".join(filter(None, where)), f"{value:.4g}"))


def _spot(ax: Axes, first: Sequence[float], last: Sequence[float], text: str) -> Iterator[Spot]:
    """A box between two places of the data, where it lies within its panel."""
    figure: Any = ax.get_figure(root=True)
    corners = ax.transData.transform(np.array([first, last], dtype=float))
    low, high = corners.min(0), corners.max(0)
    box = np.asarray(ax.bbox.extents)
    if not np.isfinite(corners).all() or (high < box[:2] - 1).any() or (low > box[2:] + 1).any():
        return
    low, high = np.clip(low, box[:2], box[2:]), np.clip(high, box[:2], box[2:])
    scale = 72 / figure.dpi
    (x0, y0), (x1, y1) = low * scale, high * scale
    yield Spot(x0, figure.bbox.height * scale - y1, x1 - x0, y1 - y0, text)


def _text(ax: Axes, name: str, place: str, value: str) -> str:
    head = " · ".join(dict.fromkeys(filter(None, (" ".join(ax.get_title().split()), name.strip()))))
    return "\n".join(filter(None, (head, place, value))).replace(r"\$", "$")


def _value(axis: Any, value: float, ends: tuple[float, float] | None) -> str:
    """The name at a place of an axis, or its label and the number with its interval."""
    if is_named(axis):
        return " ".join(str(axis.get_major_formatter()(value)).split())
    label = " ".join(axis.get_label_text().split())
    number = f"{value:.4g}" + (f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends else "")
    return f"{label} = {number}" if label else number


Interval = tuple[float, float, float]


def _intervals(ax: Axes, axis: int) -> list[Interval]:
    """(place, low, high) of the intervals along one axis that `errorbar` has drawn."""
    found: list[Interval] = []
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            for lines in container[2]:
                assert isinstance(lines, LineCollection)
                for part in lines.get_segments():
                    ends = np.asarray(part, dtype=float)
                    if len(ends) == 2 and ends[0, 1 - axis] == ends[1, 1 - axis]:
                        found.append((ends[0, 1 - axis], ends[:, axis].min(), ends[:, axis].max()))
    return found


def _at(intervals: Sequence[Interval], place: float, value: float) -> tuple[float, float] | None:
    """The interval at a place that holds the value."""
    near = (
        (low, high) for at, low, high in intervals if math.isclose(at, place, abs_tol=1e-9) and low <= value <= high
    )
    return next(near, None)


def _band(ax: Any, line: Any, x: float, y: float) -> tuple[float, float] | None:
    """The ends of the band of a curve's own colour at x, where it holds y."""
    for band in ax.collections:
        if not isinstance(band, PolyCollection) or not len(band.get_facecolor()):
            continue
        if not same_color(to_rgb(band.get_facecolor()[0]), to_rgb(line.get_color())):
            continue
        for path in band.get_paths():
            heights: Any = np.asarray(path.vertices)[np.isclose(np.asarray(path.vertices)[:, 0], x, atol=1e-9), 1]
            if len(heights) > 1 and heights.min() <= y <= heights.max():
                return float(heights.min()), float(heights.max())
    return None
