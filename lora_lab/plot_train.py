"""The figure of a training run: p(t), the masks that were really drawn under it, and the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lora_lab import plot_style
from lora_lab.result import Result

Floats = npt.NDArray[np.float64]

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


def draw(results: Sequence[Result], width: str) -> Figure:
    """One column a run: probability, masks, loss over the optimiser steps."""
    figure = plot_style.new(width, 3.3)
    axes = figure.subplots(3, len(results), squeeze=False, sharex="col", height_ratios=(1, 1.15, 1))
    for column, result in enumerate(results):
        top, middle, bottom = axes[:, column]
        _probability(top, result)
        _raster(middle, result)
        _loss(bottom, result)
        record = result.parameters["record"]
        top.set_title(f"{plot_style.method_name(record['method'])}, seed {record['seed']}")
        bottom.set_xlabel("optimiser step")
        if column == 0:
            top.set_ylabel("p(t)")
            middle.set_ylabel("group (blue: on)")
            bottom.set_ylabel("loss (nats)")
    highest = max(ax.get_ylim()[1] for ax in axes[2])
    for ax in axes[2]:
        ax.set_ylim(0, highest)
    figure.align_ylabels(axes[:, 0])
    return figure


def _probability(ax: Axes, result: Result) -> None:
    steps, end = result.columns["step"], full_from(result)
    ax.plot(steps, result.columns["p"], color=_ON)
    ax.set_ylim(0, 1.08)
    if 0 < end < len(steps):
        ax.axvspan(end, len(steps), color="#999999", alpha=0.15, linewidth=0)
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
