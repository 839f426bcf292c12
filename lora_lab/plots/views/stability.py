"""Figures of dropout stability: a metric over the share kept or its probability, and with one player left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import labels, name_axis
from lora_lab.plots.panels import Panels
from lora_lab.plots.views import metrics
from lora_lab.results.result import Result, by_adapter

_WORST: dict[str, Any] = {"linestyle": ":", "linewidth": 0.9}

Groups = dict[str, list[list[dict[str, Any]]]]


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric over the share of players kept: mean over keep-sets with its band, and the worst keep-set."""
    return _draw_curves(results, panels, "k-of-G", "share of players kept", worst=True)


def draw_p(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric over the probability with which each player is kept."""
    return _draw_curves(results, panels, "p", "probability p of keeping each player", worst=False)


def draw_leave_one_out(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The main metric with each player left out, and with it alone."""
    axes = panels.grid(2, 1 if panels.single else 2, 4.2 if panels.single else 2.4)
    metric = metrics.main(results)
    for ax, family, words in zip(axes, ("leave-one-out", "one-alone"), ("left out", "alone"), strict=True):
        groups = _groups(results, family, rescaled=False)
        for label, place in plot_style.places(groups).items():
            value = primitives.band(list(zip(*groups[label], strict=True)), metric)
            primitives.curve(ax, np.arange(len(value[0])), value, **plot_style.look(place), label=label)
        name_axis(ax.xaxis, labels([row["label"] for row in next(iter(groups.values()))[0]]))
        ax.set_title(f"each player {words}")
        ax.set_ylabel(metrics.label(results, metric))
    axes[-1].set_xlabel("player")
    if len(groups) > 1:
        panels.legend(axes[0])
    return axes


def _draw_curves(results: Sequence[Result], panels: Panels, family: str, label: str, *, worst: bool) -> list[Axes]:
    metric = metrics.main(results)
    kinds = [rescaled for rescaled in (False, True) if by_adapter(results, rescaled=rescaled)]
    height = 0.6 + 1.9 * len(kinds) if panels.single else 2.5
    axes = panels.grid(len(kinds), 1 if panels.single else len(kinds), height, sharey=True)
    for ax, rescaled in zip(axes, kinds, strict=True):
        groups = _groups(results, family, rescaled=rescaled)
        for name, place in plot_style.places(groups).items():
            adapters, look = groups[name], plot_style.look(place)
            x = np.array([row["share"] for row in adapters[0]])
            places = list(zip(*adapters, strict=True))
            primitives.curve(ax, x, primitives.band(places, metric), **look, label=name)
            if worst:
                lines = np.array([[row[f"{metric}_worst"] for row in rows] for rows in adapters], dtype=float)
                ax.plot(x, lines.mean(0), color=look["color"], **_WORST)
        ax.set_title("updates × G/k" if rescaled else "as they are")
        ax.set_xlabel(label)
    axes[0].set_ylabel(metrics.label(results, metric))
    panels.legend(axes[0], more={"worst keep-set": Line2D([], [], color="#333333", **_WORST)} if worst else {})
    counts = {name: len(adapters) for name, adapters in groups.items()}
    kind = plot_style.bands(counts, "95 % interval (keep-sets and examples)", "±1 s.d. over seeds")
    where = plot_style.measured_on(results)
    panels.caption(axes[0], f"players: {plot_style.players(results)}; {where}; bands: {kind}")
    return axes


def _groups(results: Sequence[Result], family: str, *, rescaled: bool) -> Groups:
    """Label → rows of each adapter; by method where a method has several seeds."""
    adapters = by_adapter(results, rescaled=rescaled, family=family)
    if len({len(rows) for rows in adapters}) > 1:
        raise OptionError("results with different players or probabilities cannot share a figure")
    return plot_style.grouped(adapters)
