"""Figures of real sizes: no two texts overlap, none lies off the page, ticks do not merge, no panel is a stamp."""

import itertools
import math

import numpy as np
import pytest
from making_results import REAL_SIZES, of_real_size

from lora_lab import plots
from lora_lab.plots.names import is_named

SIZES = {"single": (9, 80), "double": (40, 12)}
"""Adapters and layers by the width of the figure."""


def axis_labels(axis):
    """The tick labels that are drawn, in the order of their places."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if low <= tick.get_loc() <= high]
    return [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text().strip()]


def seen(text):
    return text.get_visible() and text.get_text().strip()


def drawn(figure):
    """All texts that are seen: those of every axis, and the others."""
    axes = [ax for ax in figure.axes if ax.get_visible() and ax.axison]
    on_axes = [axis_labels(axis) for ax in axes for axis in (ax.xaxis, ax.yaxis)]
    others = [text for ax in axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)]
    others += [axis.get_offset_text() for ax in axes for axis in (ax.xaxis, ax.yaxis)]
    others += [ax.get_legend() for ax in axes if ax.get_legend()]
    others += [text for legend in figure.legends for text in legend.get_texts()]
    others += [text for text in (figure._supxlabel, figure._suptitle) if text]
    return on_axes, [text for text in others if not hasattr(text, "get_text") or seen(text)]


def faults(figure):
    """What a reader would see at once, in print: on a screen letters are whole pixels wide."""
    figure.set_dpi(300)
    figure.draw_without_rendering()
    on_axes, others = drawn(figure)
    found = []
    for labels in on_axes:
        for left, right in itertools.pairwise(sorted(labels, key=lambda label: label.get_position())):
            one, other = left.get_window_extent(), right.get_window_extent()
            if left.get_rotation() % 90:  # parallel lines: how far apart they are
                apart = abs(
                    right.get_transform().transform(right.get_position())[0]
                    - left.get_transform().transform(left.get_position())[0]
                )
                merged = apart * math.sin(math.radians(left.get_rotation())) < left.get_fontsize() * figure.dpi / 72
            else:
                merged = one.overlaps(other)
            if merged:
                found.append(f"ticks {left.get_text()!r} and {right.get_text()!r} merge")
    slanted = [text for labels in on_axes for text in labels if text.get_rotation() % 90]
    texts = [*others, *(text for labels in on_axes for text in labels if not text.get_rotation() % 90)]
    boxes = np.array([text.get_window_extent().extents for text in [*texts, *slanted]])
    # of two pixels: matplotlib before 3.11 makes texts whole pixels wide
    off = (boxes[:, :2] < -2).any(1) | (boxes[:, 2:] > np.array(figure.bbox.size) + 2).any(1)
    found += [f"{[*texts, *slanted][i]} lies off the page" for i in np.flatnonzero(off)]
    for i, box in enumerate(boxes[: len(texts)]):
        rest = boxes[i + 1 :]
        inside = np.minimum(rest[:, 2:], box[2:]) - np.maximum(rest[:, :2], box[:2])
        found += [
            f"{texts[i]} and {[*texts, *slanted][i + 1 + j]} overlap" for j in np.flatnonzero((inside > 1).all(1))
        ]
    if any(text.get_fontsize() < 5 for text in [*texts, *slanted] if hasattr(text, "get_fontsize")):
        found.append("print below 5 points")
    panels = [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]
    # a panel of named rows may be one row high, whose print is measured above
    least = [(0.3, 0.09 if is_named(ax.yaxis) else 0.3) for ax in panels]
    small = [ax for ax, size in zip(panels, least, strict=True) if (ax.bbox.size / figure.dpi < size).any()]
    return found + [f"a panel of {ax.bbox.size / figure.dpi} inches" for ax in small]


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("view", [view for view in plots.PLOTS if view.partition(":")[0] in REAL_SIZES])
def test_texts_keep_apart_and_on_the_page(view, width):
    figure = plots.figure(of_real_size(view, *SIZES[width]), kind=view, width=width)
    assert figure.get_figwidth() == plots.WIDTHS[width]
    assert not faults(figure)


def test_a_legend_is_measured_as_it_is_printed():
    """On a screen this one seems to fit in four columns; its letters are wider in print."""
    view = "shapley:convergence"
    assert not faults(plots.figure(of_real_size(view, 9, 80), kind=view))


def test_a_figure_stays_as_it_was_laid_out_whoever_saves_it(tmp_path):
    view = "compare-merges:coefficients"
    figure = plots.figure(of_real_size(view, 3, 8), kind=view, width="single")
    figure.savefig(tmp_path / "a.png", dpi=figure.dpi)  # in matplotlib's own style, whose print is larger
    assert not faults(figure)
