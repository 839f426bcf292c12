"""Figures of curves between two adapters: a metric and ‖ΔW‖ along each, beside the straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, shortened
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Row
from lora_lab.plots.views import metrics as plot_metrics
from lora_lab.results.result import Result, grouped

_LINES = {"line": ("straight line", 0), "matched line": ("straight line, ‖ΔW‖ matched", 4)}
_SPACES = {"delta": "ΔW mixed", "aligned": "factors, aligned", "factors": "factors"}


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric along t, and ‖ΔW‖."""
    return _draw(results, panels, "t")


def draw_arc(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric along the arc length, and ‖ΔW‖."""
    return _draw(results, panels, "arc")


def _draw(results: Sequence[Result], panels: Panels, by: str) -> list[Axes]:
    metric = plot_metrics.main(results)
    looks = _looks(results)
    spaces = list(dict.fromkeys(space for result in results for space in result.parameters["spaces"]))
    count = len(spaces)
    if panels.single:  # a line a space
        axes = panels.grid(2 * count, 2, 1.7 * count + 0.6)
        places = [(axes[2 * i], axes[2 * i + 1]) for i in range(count)]
    else:  # a column a space
        axes = panels.grid(2 * count, count, 3.6, (3, 2))
        places = [(axes[i], axes[count + i]) for i in range(count)]
    for i, (space, (metrics, norms)) in enumerate(zip(spaces, places, strict=True)):
        if i:
            metrics.sharey(places[0][0])
            norms.sharey(places[0][1])
        for path, rows in _rows(results, space).items():
            x = np.array([np.mean([row[by] for row in place]) for place in rows])
            primitives.curve(metrics, x, primitives.band(rows, metric), **looks[path])
            primitives.curve(norms, x, primitives.band(rows, "norm"), **looks[path])
        panels.title(metrics, _SPACES.get(space, space))
        for ax in (metrics, norms):
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
        for ax, label in ((metrics, plot_metrics.label(results, metric)), (norms, "‖ΔW‖")):
            if panels.single or not i:
                ax.set_ylabel(label)
        for ax in (metrics, norms) if panels.single and i + 1 == count else () if panels.single else (norms,):
            ax.set_xlabel("t" if by == "t" else "share of the length")
    places[0][1].set_ylim(0, 1.05 * max(float(norms.dataLim.ymax) for _, norms in places))
    panels.legend(axes[0], columns=1 if panels.single else 2)
    band = "95 % interval over examples" if len(results) == 1 else f"±1 s.d. over {len(results)} pairs"
    panels.caption(axes[0], f"{plot_style.measured_on(results)}; bands: {band}")
    return axes


def _rows(results: Sequence[Result], space: str) -> dict[str, list[list[Row]]]:
    """Path → for every point, the rows of all results."""
    found: dict[str, list[list[Row]]] = {}
    for result in results:
        for head, rows in grouped(result.rows(space=space), "path"):
            places = found.setdefault(head["path"], [[] for _ in rows])
            for place, row in zip(places, rows, strict=True):
                place.append(row)
    return found


def _looks(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Path → label, colour, marker and dashes: lines have theirs, curves those of their entries."""
    said: dict[str, Any] = {path: {"label": label, "place": place} for path, (label, place) in _LINES.items()}
    for result in results:
        said |= result.parameters["looks"]
    names = dict.fromkeys(name for result in results for name in result.columns["path"])
    places = plot_style.places(names, {name: look["place"] for name, look in said.items()})
    labels = shortened([said[name]["label"] if name in said else name for name in names], MOST + 12)
    return {name: {"label": label, **plot_style.look(places[name])} for name, label in zip(names, labels, strict=True)}
