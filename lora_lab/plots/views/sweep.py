"""Figures of pruning: grouped bars for patterns, curves over sparsities and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import Numbers, labels, more_for
from lora_lab.plots.panels import Panels
from lora_lab.plots.views.metrics import in_words
from lora_lab.results.result import Result, by_adapter
from lora_lab.results.rows import metrics_of

_AXIS = {"unstructured": ("sparsity (share of entries set to 0)", False), "rank": ("rank kept", True)}
"""Kind of pruning that is a curve → what it is over, and whether these are whole numbers."""
_KINDS = ("structured", *_AXIS)


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """All kinds of pruning that the results hold: patterns above, curves below."""
    kinds = [kind for kind in _KINDS if any(result.rows(kind=kind) for result in results)]
    curves = [kind for kind in kinds if kind != "structured"]
    if "structured" not in kinds or not curves:
        return _draw_bars(results, panels) if "structured" in kinds else _draw_curves(results, panels, curves)
    height = _bars_height(results, panels)
    lines = len(curves) if panels.single else 1
    axes = panels.stack((lines, len(curves) // lines), height + 2.4 * lines, [height, *[2.4] * lines], sharey=False)
    _bars(axes[0], results, horizontal=panels.single)
    for ax, kind in zip(axes[1:], curves, strict=True):
        _curve(ax, results, kind)
    panels.legend(*axes, more=_legend(results, curves))
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
    (ax,) = panels.grid(1, 1, _bars_height(results, panels))
    _bars(ax, results, horizontal=panels.single)
    panels.legend(ax)
    panels.caption(ax, caption)
    return [ax]


def _draw_curves(results: Sequence[Result], panels: Panels, kinds: Sequence[str]) -> list[Axes]:
    caption = _caption(results, kinds)
    height = 0.6 + 2.3 * len(kinds) if panels.single else 2.9
    axes = panels.grid(len(kinds), 1 if panels.single else len(kinds), height)
    for ax, kind in zip(axes, kinds, strict=True):
        _curve(ax, results, kind)
    panels.legend(*axes, more=_legend(results, kinds))
    panels.caption(axes[0], caption)
    return axes


def _bars_height(results: Sequence[Result], panels: Panels) -> float:
    names = _patterns(results)
    return 1.2 + 0.16 * len(names) if panels.single else 2.7 + more_for(names)


def _bars(ax: Axes, results: Sequence[Result], *, horizontal: bool) -> None:
    groups = plot_style.grouped(by_adapter(results, kind="structured"))
    names, (metric, axis) = _patterns(results), _metric(results)
    values = {
        label: primitives.band(primitives.points(adapters, names, lambda row: row["label"]), metric)
        for label, adapters in groups.items()
    }
    shown = labels([name.removeprefix("type:").removesuffix("_proj") for name in names])
    primitives.named_bars(ax, values, shown, axis, horizontal=horizontal)
    (ax.set_ylabel if horizontal else ax.set_xlabel)("kept")


def _curve(ax: Axes, results: Sequence[Result], kind: str) -> None:
    """The main metric of every adapter and criterion, these by their dashes."""
    groups = plot_style.grouped(by_adapter(results, kind=kind))
    dashes, (metric, axis) = _dashes(results), _metric(results)
    for label, place in plot_style.places(groups).items():
        adapters = groups[label]
        for criterion in dict.fromkeys(row["criterion"] for rows in adapters for row in rows):
            rows = [row for rows in adapters for row in rows if row["criterion"] == criterion]
            names = sorted({(criterion, row["label"]) for row in rows}, key=lambda name: float(name[1]))
            places = primitives.points(adapters, names, lambda row: (row["criterion"], row["label"]))
            look = {**plot_style.look(place), "linestyle": dashes[criterion]}
            if any(row["draws"] > 1 for row in rows):
                look["markerfacecolor"] = "white"  # means over random draws
            x = np.array([float(name) for _, name in names])
            values = primitives.band(places, metric)
            primitives.curve(ax, x, values, alpha=0.14, **look)
    words, whole = _AXIS[kind]
    ax.xaxis.set_major_locator(Numbers(whole=whole))
    ax.set_xlabel(words)
    ax.set_ylabel(axis)


def _metric(results: Sequence[Result]) -> tuple[str, str]:
    """The main metric, and what an axis calls it."""
    name, said = next(iter(metrics_of(results[0].parameters).items()))
    return name, in_words(name) + (f" ({said['unit']})" if said["unit"] not in ("", "share") else "")


def _dashes(results: Sequence[Result]) -> dict[str, Any]:
    """Criterion → its dashes, the same in all panels."""
    rows = [row for kind in _AXIS for result in results for row in result.rows(kind=kind)]
    return dict(zip(dict.fromkeys(row["criterion"] for row in rows), cycle(plot_style.DASHES), strict=False))


def _legend(results: Sequence[Result], kinds: Sequence[str]) -> dict[str, Line2D]:
    """Adapters by colour and marker, criteria by dashes."""
    places = plot_style.places(label for kind in kinds for label in plot_style.grouped(by_adapter(results, kind=kind)))
    looks = {label: {**plot_style.look(place), "linestyle": "none"} for label, place in places.items()}
    drawn = {row["criterion"] for kind in kinds for result in results for row in result.rows(kind=kind)}
    dashes = {name: dashes for name, dashes in _dashes(results).items() if name in drawn}
    looks |= {name: {"color": "#333333", "linestyle": dashes[name]} for name in dashes}
    return {name: Line2D([], [], **look) for name, look in looks.items()}


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
