"""Figures of claims: every difference with its interval, beside its verdict; a panel for each unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, name_axis, shortened
from lora_lab.plots.panels import Panels
from lora_lab.results.result import Result, grouped

_WIDE = 44  # characters of a claim and its task on the width of a page
_PLACES = ("holds", "does not hold", "cannot be told")
"""Verdicts in the order of their colours."""


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Treated less control, with intervals; shaded is what would be too small to count."""
    every = [row for result in results for row in result.rows()]
    rows = [row for row in every if row["difference"] is not None]
    if not rows:
        raise OptionError("no claim of these results has a number to draw")
    often, tasks = Counter(row["claim"] for row in rows), _short({row["task"] for row in rows})
    names = [f"{row['claim']}, {tasks[row['task']]}" if often[row["claim"]] > 1 else row["claim"] for row in rows]
    rows = [{**row, "name": name} for row, name in zip(rows, names, strict=True)]
    parts = grouped(rows, "unit")
    lines = [max(2, len(members)) for _, members in parts]
    rest = 0.55 * len(parts) + 0.5
    axes = panels.grid(len(parts), 1, panels.line(sum(lines), rest, 0.17) * sum(lines) + rest, lines)
    for ax, (unit, members) in zip(axes, parts, strict=True):
        _panel(ax, members, MOST if panels.single else _WIDE)
        ax.set_xlabel(f"difference ({unit['unit']})" if unit["unit"] else "difference")
    panels.legend(max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1])), columns=3)
    seeds = " and ".join(str(n) for n in dict.fromkeys(result.parameters["seeds"] for result in results))
    said = [f"{seeds} seeds", "claimed to be › higher, ‹ lower, = equal", "bars: 95 % intervals"]
    left_out = len(every) - len(rows)
    panels.caption(axes[0], "; ".join([*said, *([f"{left_out} without a number"] if left_out else [])]))
    return axes


def _short(tasks: set[str]) -> dict[str, str]:
    """Tasks by their last part, without the folder and the end of a file, where that tells them apart."""
    last = {task: PurePosixPath(task).name.removesuffix(".toml") for task in tasks}
    return last if len(set(last.values())) == len(last) else {task: task for task in tasks}


def _panel(ax: Axes, rows: Sequence[Mapping[str, Any]], most: int) -> None:
    y = np.arange(len(rows))
    least = np.array([row["least"] for row in rows])
    ax.use_sticky_edges = False  # what is shaded, and 0, may be outermost
    ax.barh(y, 2 * least, 0.8, left=-least, color="0.9", zorder=0)
    ax.axvline(0, color="0.4", linewidth=0.6)
    for place, verdict in enumerate(_PLACES):
        mine = [i for i, row in enumerate(rows) if row["verdict"] == verdict]
        value, low, high = (
            np.array([rows[i][name] for i in mine], dtype=float)
            for name in ("difference", "difference_low", "difference_high")
        )
        look = {**plot_style.look(place), "linestyle": "", "markersize": 3.5, "capsize": 1.5, "elinewidth": 0.8}
        ax.errorbar(value, y[mine], xerr=np.stack([value - low, high - value]).clip(min=0), label=verdict, **look)
    arrows = {"higher": "›", "lower": "‹", "equal": "="}
    name_axis(
        ax.yaxis,
        shortened([f"{row['name']}  {arrows[row['direction']]}" for row in rows], most),
    )
    ax.set_ylim(len(rows) - 0.4, -0.6)
