"""Figures of training: p(t), the masks that were really drawn under it, the loss; and what several settings gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import Numbers, extent, inches, name_axis, type_size
from lora_lab.plots.panels import Panels, figure_of
from lora_lab.plots.primitives import Floats, Row
from lora_lab.results.result import Result, grouped

_OFF, _ON = "#f0f0f0", "#0072B2"


def masks(result: Result) -> npt.NDArray[np.bool_] | None:
    """The drawn masks, [groups, steps]; None for a method without masks."""
    drawn = result.columns["mask"]
    if any(mask is None for mask in drawn):
        return None
    return np.array([[sign == "1" for sign in mask] for mask in drawn]).T


def full_from(result: Result) -> int:
    """The first step from which every group stays on."""
    p = np.array(result.columns["p"], dtype=float)
    below = np.flatnonzero(p < 1)
    return int(below[-1]) + 1 if len(below) else 0


def smoothed(loss: Floats, window: int = 15) -> Floats:
    """Centred running mean, shorter at the ends."""
    kernel = np.ones(min(window, len(loss)))
    sums, counts = np.convolve(loss, kernel, "same"), np.convolve(np.ones_like(loss), kernel, "same")
    return np.asarray(sums / counts)


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """One column a run: probability, masks, loss over the optimiser steps; further runs below the first."""
    columns = panels.columns(len(results), 2 if panels.single else 4, 3.3)
    blocks = -(-len(results) // columns)
    places = panels.grid(3 * blocks * columns, columns, 3.3 * blocks, (1, 1.15, 1) * blocks)
    axes = []
    for i, result in enumerate(results):
        first = 3 * columns * (i // columns) + i % columns
        top, middle, bottom = column = places[first : first + 3 * columns : columns]
        axes += column
        for ax in (middle, bottom):
            ax.sharex(top)
        _probability(top, result)
        _raster(middle, result)
        _loss(bottom, result)
        for ax in (top, middle):
            ax.tick_params(labelbottom=False)
        record = result.parameters["record"]
        panels.title(top, plot_style.method_name(record["method"]), f"seed {record['seed']}", joint=", ")
        words = "optimiser step"
        fits = inches(words, type_size("axes.labelsize")) < 0.8 * panels.page / columns
        bottom.set_xlabel(words if fits else "step")
        for ax in column if i % columns else ():  # as on the left
            ax.tick_params(labelleft=False)
        if i % columns == 0:
            top.set_ylabel("p(t)")
            middle.set_ylabel("group (blue: on)")
            bottom.set_ylabel("loss (nats)")
        bottom.xaxis.set_major_locator(Numbers(whole=True))
    for ax in places:
        if ax not in axes:
            ax.set_axis_off()
    highest = max(ax.get_ylim()[1] for ax in axes[2::3])
    for ax in axes[2::3]:
        ax.set_ylim(0, highest)
    figure_of(axes[0]).align_ylabels(places[::columns])
    return axes


def _probability(ax: Axes, result: Result) -> None:
    steps, end = result.columns["step"], full_from(result)
    ax.plot(steps, result.columns["p"], color=_ON)
    ax.set_ylim(0, 1.08)
    if 0 < end < len(steps):
        ax.axvspan(end, len(steps), color="#999999", alpha=0.15, linewidth=0)
        if inches("all on", 7) < extent(ax.xaxis) * (1 - end / len(steps)):
            ax.text((end + len(steps)) / 2, 0.5, "all on", ha="center", va="center", fontsize=7)


def _raster(ax: Axes, result: Result) -> None:
    drawn = masks(result)
    groups = len(result.parameters["groups"])
    if drawn is None:
        drawn = np.ones((groups, len(result.columns["step"])), dtype=bool)
    ax.imshow(
        drawn,
        cmap=ListedColormap([_OFF, _ON]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(-0.5, drawn.shape[1] - 0.5, -0.5, groups - 0.5),
    )
    ax.grid(visible=False)
    ax.set_yticks([0, groups - 1], ["first", "last"] if groups > 1 else ["only", ""])


def _loss(ax: Axes, result: Result) -> None:
    loss = np.array([np.nan if value is None else value for value in result.columns["loss"]], dtype=float)
    ax.plot(result.columns["step"], loss, color="#999999", linewidth=0.5)
    ax.plot(result.columns["step"], smoothed(loss), color="#333333")


def draw_tuning(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """The task's main metric on the validation split over the settings: mean and spread over seeds, choices ringed.

    The option with the most values is the axis; every combination of the others is a line.
    """
    criterion, axis = results[0].parameters["criterion"], _widest(results)
    (ax,) = panels.grid(1, 1, 2.5)
    lines: list[tuple[str, list[Row]]] = []
    for result in results:
        others = [name for name in result.parameters["options"] if name != axis]
        for fixed, rows in grouped(result.rows(), "method", *others):
            method = plot_style.method_name(fixed.pop("method"))
            words = [method, *(f"{_SPOKEN.get(name, name)} {value:g}" for name, value in fixed.items())]
            lines.append((", ".join(words), rows))
    labels = plot_style.in_legend([label for label, _ in lines])
    places = plot_style.places(labels)
    for label, (_, rows) in zip(labels, lines, strict=True):
        _tuning_line(ax, rows, axis, criterion, plot_style.look(places[label]), label)
    _tuning_axes(ax, results, axis)
    ax.set_ylabel(f"validation {criterion.replace('_', ' ')}" + (" (nats)" if criterion == "loss" else ""))
    panels.legend(ax)
    return [ax]


_SPOKEN = {
    "learning_rate": "learning rate",
    "lora_plus": "LoRA+ ratio",
    "batch_size": "batch size",
    "weight_decay": "weight decay",
    "max_grad_norm": "clipping norm",
    "p0": "p₀",
}


def _widest(results: Sequence[Result]) -> str:
    """The option with the most values, that all results have."""
    shared: list[str] = [
        n for n in results[0].parameters["options"] if all(n in r.parameters["options"] for r in results)
    ]
    if not shared:
        raise OptionError("these results vary different options; draw each on its own")
    return max(shared, key=lambda name: len({value for result in results for value in result.columns[name]}))


def _tuning_line(
    ax: Axes, rows: Sequence[Mapping[str, Any]], axis: str, criterion: str, look: Mapping[str, Any], label: str
) -> None:
    settings = sorted(grouped(rows, axis), key=lambda setting: setting[0][axis])
    x = np.array([head[axis] for head, _ in settings])
    chosen = np.array([seeds[0]["chosen"] for _, seeds in settings])
    mean, _, high = primitives.band([seeds for _, seeds in settings], criterion)  # NaN where one diverged
    ax.errorbar(x, mean, high - mean, label=label, capsize=2, elinewidth=0.8, **look)
    ax.plot(x[chosen], mean[chosen], "o", markersize=9, markerfacecolor="none", color=look["color"])


def _tuning_axes(ax: Axes, results: Sequence[Result], axis: str) -> None:
    values = sorted({value for result in results for value in result.columns[axis]})
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        ax.set_xscale("log")
    name_axis(ax.xaxis, [f"{value:g}" for value in values], values)
    ax.minorticks_off()
    ax.set_xlabel(_SPOKEN.get(axis, axis.replace("_", " ")))
