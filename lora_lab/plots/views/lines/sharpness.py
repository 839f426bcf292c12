"""Figures of curvature: eigenvalues and traces of adapters, and the rates that they allow beside those tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, name_axis, shortened
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import plain_numbers
from lora_lab.plots.views import metrics
from lora_lab.results.result import Result

_MEASURES = (("sharpness", "largest eigenvalue λ"), ("trace", "trace"))
_COMPARED = "balanced"
"""The tensors that serve to compare adapters, in which nobody trains."""
_RATES = {"rate_adam": "Adam", "rate_gd": "gradient descent"}


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Largest eigenvalue and trace of every adapter in each set of tensors; negative ones are left out."""
    rows = [(i, row) for i, result in enumerate(results) for row in result.rows()]
    places = {place: k for k, place in enumerate(dict.fromkeys((i, row["adapter"]) for i, row in rows))}
    groups = list(dict.fromkeys(row["at"] for _, row in rows))
    height = max(1.6, 0.2 * len(places) + 1)
    axes = panels.grid(2, 1 if panels.single else 2, 2 * height + 0.3 if panels.single else height + 0.3)
    for ax, (key, label) in zip(axes, _MEASURES, strict=True):
        for k, at in enumerate(groups):
            shown = [(i, row) for i, row in rows if row["at"] == at and (row[key] or 0) > 0]
            x = np.array([[row[key], row[f"{key}_low"], row[f"{key}_high"]] for _, row in shown], dtype=float)
            y = np.array([places[i, row["adapter"]] + 0.2 * (k - (len(groups) - 1) / 2) for i, row in shown])
            x = x.reshape(-1, 3)
            ends = np.stack([x[:, 0] - x[:, 1], x[:, 2] - x[:, 0]]).clip(min=0)
            look = {**plot_style.look(k), "linestyle": "", "markersize": 4, "capsize": 1.5, "elinewidth": 0.8}
            ax.errorbar(x[:, 0], y, xerr=ends, label=at, **look)
        ax.set_xscale("log", nonpositive="clip")
        if ax.dataLim.width:
            least = min((row[key] for _, row in rows if (row[key] or 0) > 0), default=1.0)
            ax.set_xlim(left=max(ax.get_xlim()[0], least / 10))  # an interval may reach to 0
        plain_numbers(ax.xaxis)
        name_axis(ax.yaxis, shortened([name for _, name in places], MOST))
        ax.set_ylim(len(places) - 0.4, -0.6)
        ax.set_xlabel(label)
    panels.legend(axes[0], columns=3)
    panels.caption(axes[0], f"{plot_style.measured_on(results)}; bars: 95 % intervals")
    return axes


def draw_rates(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Validation loss (or another metric) over the rates tried, a panel an adapter, and the largest stable ones."""
    tried = [
        (result, name, [row for row in result.summary["rates"] if row["adapter"] == name])
        for result in results
        for name in dict.fromkeys(row["adapter"] for row in result.summary["rates"])
    ]
    metric = metrics.main(results)
    if not tried:
        raise OptionError("these adapters record no learning rate that was tried")
    columns = panels.columns(len(tried), 1 if panels.single else 3, 2.2)
    lines = -(-len(tried) // columns)
    axes = panels.grid(len(tried), columns, 2.2 * lines + 0.6)
    ats = list(dict.fromkeys(row["at"] for result in results for row in result.rows() if row["at"] != _COMPARED))
    for k, (ax, (result, name, rates)) in enumerate(zip(axes, tried, strict=True)):
        _draw_tried(ax, rates, metric)
        for i, at in enumerate(ats):
            for row in result.rows(adapter=name, at=at)[:1]:
                _draw_largest(ax, row, plot_style.look(i + 1)["color"], at)
        ax.set_xscale("log")
        plain_numbers(ax.xaxis)
        panels.title(ax, name)
        if k % columns == 0:
            ax.set_ylabel(f"validation {metrics.label(results, metric)}")
        if k + columns >= len(axes):
            ax.set_xlabel("learning rate")
    panels.legend(*axes, columns=1 if panels.single else 2)
    panels.caption(axes[0], f"{plot_style.measured_on(results)}; ring: chosen; ×: diverged")
    return axes


def _draw_tried(ax: Axes, rates: Sequence[Mapping[str, Any]], metric: str) -> None:
    """What was found; where training diverged, a cross on top."""
    rows = sorted(rates, key=lambda row: row["rate"])
    known = [row for row in rows if row[metric] is not None]
    look = {**plot_style.look(0), "label": f"found: validation {metrics.in_words(metric)} at each rate"}
    ax.plot([row["rate"] for row in known], [row[metric] for row in known], **look)
    chosen = [row for row in known if row["chosen"]]
    ax.plot(
        [row["rate"] for row in chosen],
        [row[metric] for row in chosen],
        "o",
        markersize=9,
        fillstyle="none",
        color="#333333",
    )
    top = max((row[metric] for row in known), default=1.0)
    lost = [row["rate"] for row in rows if row[metric] is None]
    ax.plot(lost, [top] * len(lost), "x", color="#333333")


def _draw_largest(ax: Axes, row: Mapping[str, Any], color: Any, at: str) -> None:
    """A vertical line for the largest stable rate by each rule."""
    for dashes, (key, name) in zip(plot_style.DASHES, _RATES.items(), strict=False):
        if row[key] is not None:
            ax.axvline(row[key], color=color, linestyle=dashes, linewidth=1, label=f"predicted: {name}, {at}")
