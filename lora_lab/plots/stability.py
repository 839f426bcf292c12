"""Figures of dropout stability: accuracy over the share kept or its probability, and with one player left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.results.result import Result, by_adapter

Floats = npt.NDArray[np.float64]


def draw(results: Sequence[Result], width: str) -> Figure:
    """Accuracy over the share of players kept: mean over keep-sets with its band, and the worst keep-set."""
    return _draw_curves(results, width, "k-of-G", "share of players kept", worst=True)


def draw_p(results: Sequence[Result], width: str) -> Figure:
    """Accuracy over the probability with which each player is kept."""
    return _draw_curves(results, width, "p", "probability p of keeping each player", worst=False)


def draw_leave_one_out(results: Sequence[Result], width: str) -> Figure:
    """Accuracy lost by leaving out each player, and accuracy with it alone."""
    groups = _groups(results, rescaled=False)
    figure = plot_style.new(width, 2.4 if width == "double" else 4.2)
    axes = figure.subplots(*((1, 2) if width == "double" else (2, 1)))
    for ax, family, title in zip(axes, ("leave-one-out", "one-alone"), ("left out", "alone"), strict=True):
        for i, (label, adapters) in enumerate(groups.items()):
            lines = [[row for row in rows if row["family"] == family] for rows in adapters]
            names = [row["label"] for row in lines[0]]
            accuracy = np.array([[1 - row["error"] for row in line] for line in lines])
            style = {**plot_style.look(label, i), "label": label}
            _line(ax, np.arange(len(names), dtype=float), accuracy, lines[0], **style)
        short = [name.rpartition(".")[2] if len(name) > 4 else name for name in names]
        ax.set_xticks(range(len(names)), short, rotation=60 if max(map(len, short)) > 3 else 0)
        ax.set_title(f"each player {title}")
        ax.set_ylabel("accuracy")
    axes[-1].set_xlabel("player")
    if len(groups) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _draw_curves(results: Sequence[Result], width: str, family: str, label: str, *, worst: bool) -> Figure:
    panels = [rescaled for rescaled in (False, True) if _groups(results, rescaled=rescaled)]
    shape = (1, len(panels)) if width == "double" else (len(panels), 1)
    figure = plot_style.new(width, 2.5 if width == "double" else 0.6 + 1.9 * len(panels))
    axes = figure.subplots(*shape, squeeze=False, sharey=True).ravel()
    for ax, rescaled in zip(axes, panels, strict=True):
        for i, (name, adapters) in enumerate(_groups(results, rescaled=rescaled).items()):
            lines = [[row for row in rows if row["family"] == family] for rows in adapters]
            x = np.array([row["share"] for row in lines[0]])
            style = {**plot_style.look(name, i), "label": name}
            _line(ax, x, np.array([[1 - row["error"] for row in line] for line in lines]), lines[0], **style)
            if worst:
                lowest = np.mean([[1 - row["error_worst"] for row in line] for line in lines], axis=0)
                ax.plot(x, lowest, color=style["color"], linestyle=":", linewidth=0.9, label=f"{name}, worst keep-set")
        ax.set_title("updates × G/k" if rescaled else "as they are")
        ax.set_xlabel(label)
    axes[0].set_ylabel("accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4 if width == "double" else 2)
    plot_style.caption(figure, width, _caption(results))
    return figure


def _line(ax: Axes, x: Floats, accuracy: Floats, rows: Sequence[dict[str, Any]], **style: Any) -> None:
    """One adapter with its interval, or the mean of several with their spread."""
    mean = accuracy.mean(0)
    if len(accuracy) > 1:
        spread = accuracy.std(0, ddof=1)
        low, high = mean - spread, mean + spread
    else:
        low, high = (np.array([1 - row[f"error_{end}"] for row in rows]) for end in ("high", "low"))
    ax.fill_between(x, low, high, color=style["color"], alpha=0.16, linewidth=0)
    ax.plot(x, mean, **style)


def _groups(results: Sequence[Result], *, rescaled: bool) -> dict[str, list[list[dict[str, Any]]]]:
    """Label → rows of each adapter; by method where a method has several seeds."""
    adapters = by_adapter(results, rescaled=rescaled)
    if len({len(rows) for rows in adapters}) > 1:
        raise OptionError("results with different players or probabilities cannot share a figure")
    return plot_style.grouped(adapters)


def _caption(results: Sequence[Result]) -> str:
    first = results[0]
    counts = {name: len(rows) for name, rows in _groups(results, rescaled=False).items()}
    band = plot_style.bands(counts, "95 % interval (keep-sets and examples)", "±1 s.d. over seeds")
    players = first.parameters["players"]
    what = players if isinstance(players, str) else "group"
    task = plot_style.task_name(first.parameters["task"])
    n = first.provenance.get("examples")
    return f"players: {what}; {task}, {first.parameters['split']} split, n = {n}; bands: {band}"
