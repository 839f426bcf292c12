"""Figures of claims: every difference with its interval, beside its verdict; a panel for each unit."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, Numbers, inches, name_axis, shortened, type_size
from lora_lab.plots.panels import PAGE, Panels
from lora_lab.results.result import Result, grouped
from lora_lab.shortening import last_parts

_WIDE = 44  # characters of a line of a name on the whole width of a page
_SPLIT = 30  # rows of a unit that goes on in another column
_EDGE = 0.3  # lines that a panel has above and below its rows, together
_APART = 0.35  # lines between claims that have several tasks
_LINE, _FULL, _LEAST = 0.155, 0.125, 0.09  # inches of a line: with room, with the print of the style, with 5 points
_NUMBERS = 0.25  # inches below a panel for the numbers of its axis
_LABEL = 0.125  # inches of the name of a unit below them
_AROUND = 0.75  # inches for legend and caption
_SMALLEST = 5.0  # points: print that is still read
_BESIDE = 0.2  # inches from a panel to the name of its unit, which leave room for half of a number

_ARROWS = {"higher": "›", "lower": "‹", "equal": "="}
_FACES: dict[str, dict[str, Any]] = {"holds": {}, "does not hold": {}, "cannot be told": {"markerfacecolor": "white"}}
"""Verdicts in the order of their colours and markers; what is open is hollow, so that it is seen in grey."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """What one panel shows: rows of one unit, and their names in lines."""

    label: str
    rows: Sequence[Row]
    names: Sequence[str]

    @cached_property
    def places(self) -> list[float]:
        """Where the middle of each row lies, in lines from above."""
        ends = np.cumsum([self._gap(i) + name.count("\n") + 1 for i, name in enumerate(self.names)])
        return [float(end) - (name.count("\n") + 1) / 2 for end, name in zip(ends, self.names, strict=True)]

    @property
    def lines(self) -> float:
        """How many lines high the panel is."""
        return self.places[-1] + (self.names[-1].count("\n") + 1) / 2 + _EDGE

    def _gap(self, i: int) -> float:
        """Above a row, where another claim begins among claims of several tasks."""
        several = len({row["claim"] for row in self.rows}) < len(self.rows)
        return _APART * (several and i > 0 and self.rows[i]["claim"] != self.rows[i - 1]["claim"])


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Treated less control, with intervals; shaded is what would be too small to count.

    A panel holds what has one unit, or is one statistic where it has none. On two columns of a page they stand in two
    columns, the second going on where the first ends, so that one is about as high as the other.
    """
    every = [row for result in results for row in result.rows()]
    rows = [row for row in every if row["difference"] is not None]
    if not rows:
        raise OptionError("no claim of these results has a number to draw")
    parts = _parts(rows, panels)
    columns = _columns(parts, two=not panels.single and len(parts) > 1)
    below = [_below(column) for column in columns]
    room = (
        (PAGE - _AROUND - sum(rest)) / sum(part.lines for part in column)
        for column, rest in zip(columns, below, strict=True)
    )
    line = max(_LEAST, min(_LINE, *room))
    axes = panels.packed(
        [
            [(line * part.lines, rest) for part, rest in zip(column, rests, strict=True)]
            for column, rests in zip(columns, below, strict=True)
        ],
        _AROUND,
    )
    for ax, part, rest in zip(axes, parts, chain(*below), strict=True):
        _panel(ax, part)
        ax.set_xlabel(part.label, fontsize=type_size("axes.labelsize") * min(1.0, line / _FULL))
        if rest == _NUMBERS:
            _set_beside(ax)
    _share_ends(axes, parts)
    panels.legend(*axes, columns=3)
    panels.caption(axes[0], _caption(results, len(every) - len(rows)))
    return axes


def _parts(rows: Sequence[Row], panels: Panels) -> list[_Part]:
    """The panels: where two columns of them have room, a unit of many rows goes on in another panel."""
    rows = [{**row, "measured": row["unit"] or row["statistic"]} for row in _named(rows)]
    units: list[tuple[str, Sequence[Row]]] = [
        (head["measured"], members) for head, members in grouped(rows, "measured")
    ]
    if not panels.single:
        units = [(unit, part) for unit, members in units for part in _shared_out(members)]
    names = _folded([row for _, part in units for row in part], MOST if panels.single or len(units) > 1 else _WIDE)
    return [_Part(f"Δ {unit}", part, [names.pop(0) for _ in part]) for unit, part in units]


def _caption(results: Sequence[Result], left_out: int) -> str:
    seeds = " and ".join(str(n) for n in dict.fromkeys(result.parameters["seeds"] for result in results))
    said = [f"Δ: treated less control, {seeds} seeds, bars: 95 % intervals", "claimed: › higher, ‹ lower, = equal"]
    said += ["shaded: too small to count" + (f", {left_out} without a number" if left_out else "")]
    return "; ".join(said)


def _named(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with names: of claims that were put to several tasks, each with its task, and beside one another."""
    often, tasks = Counter(row["claim"] for row in rows), last_parts(row["task"] for row in rows)
    order = list(dict.fromkeys(row["claim"] for row in rows))
    named = []
    for row in sorted(rows, key=lambda row: order.index(row["claim"])):
        name = f"{row['claim']}, {tasks[row['task']]}" if often[row["claim"]] > 1 else row["claim"]
        named.append({**row, "name": name})
    return named


def _shared_out(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows in parts of about as many, none of which is too long or ends amid the tasks of a claim."""
    count = -(-len(rows) // _SPLIT)
    ends = [i for i in range(1, len(rows)) if rows[i]["claim"] != rows[i - 1]["claim"]]
    cuts = {min(ends, key=lambda end: abs(end - len(rows) * k / count)) for k in range(1, count) if ends}
    for start, end in pairwise([0, *sorted(cuts), len(rows)]):
        yield rows[start:end]


def _folded(rows: Sequence[Row], most: int) -> list[str]:
    """The names of rows with what is claimed behind them: where that is too wide, in two lines."""
    found = []
    for row, name in zip(rows, shortened([row["name"] for row in rows], 2 * most - 10), strict=True):
        lines = textwrap.wrap(name.replace(r"\$", "$"), most)
        claim, _, task = name.partition(", ")
        if len(lines) > 1 and task and max(len(claim) + 1, len(task)) <= most:
            lines = [f"{claim},", task]
        found.append("\n".join(lines).replace("$", r"\$") + f"  {_ARROWS[row['direction']]}")
    return found


def _columns(parts: Sequence[_Part], *, two: bool) -> list[Sequence[_Part]]:
    """Panels in their order, in one column or in two of which the higher one is as low as can be."""
    choices = [[parts[:cut], parts[cut:]] for cut in range(1, len(parts))] if two else [[parts]]
    return min(
        choices,
        key=lambda columns: max(_LINE * sum(part.lines for part in column) + sum(_below(column)) for column in columns),
    )


def _below(column: Sequence[_Part]) -> list[float]:
    """Inches below each panel of a column: a unit too wide to stand beside the numbers, in any print, is below them."""
    room = max(inches(name, _SMALLEST) for part in column for name in part.names) - _BESIDE
    return [_NUMBERS + _LABEL * (inches(part.label, _SMALLEST) > room) for part in column]


def _set_beside(ax: Axes) -> None:
    """The name of the unit at the left of the numbers, where it takes no height."""
    figure: Any = ax.get_figure(root=True)
    down = 4 / 72  # where numbers begin: a tick and the space below it
    ax.xaxis.set_label_coords(0, 0, ax.transAxes + ScaledTranslation(-_BESIDE, -down, figure.dpi_scale_trans))
    ax.xaxis.label.set(ha="right", va="top")


def _share_ends(axes: Sequence[Axes], parts: Sequence[_Part]) -> None:
    """One scale for the parts of a unit."""
    for label in {part.label for part in parts}:
        alike = [ax for ax, part in zip(axes, parts, strict=True) if part.label == label]
        ends = np.array([ax.get_xlim() for ax in alike])
        for ax in alike:
            ax.set_xlim(ends[:, 0].min(), ends[:, 1].max())


def _panel(ax: Axes, part: _Part) -> None:
    y, least = np.array(part.places), np.array([row["least"] for row in part.rows])
    ax.use_sticky_edges = False  # what is shaded, and 0, may be outermost
    ax.barh(y, 2 * least, 0.8, left=-least, color="0.88", zorder=0)
    ax.axvline(0, color="0.4", linewidth=0.6)
    for place, (verdict, face) in enumerate(_FACES.items()):
        mine = [i for i, row in enumerate(part.rows) if row["verdict"] == verdict]
        value, low, high = (
            np.array([part.rows[i][name] for i in mine], dtype=float)
            for name in ("difference", "difference_low", "difference_high")
        )
        look = {**plot_style.look(place), "linestyle": "", "markersize": 3.5, "capsize": 1.5, "elinewidth": 0.8}
        error = np.stack([value - low, high - value]).clip(min=0)
        ax.errorbar(value, y[mine], xerr=error, label=verdict, **look, **face)
    name_axis(ax.yaxis, part.names, part.places)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", length=2, pad=2)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(Numbers())
    ax.set_ylim(part.lines - _EDGE / 2, -_EDGE / 2)
