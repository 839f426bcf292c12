"""Several views as the panels (a), (b), … of one figure, at the size that it is printed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from matplotlib.figure import Figure

from lora_lab.errors import OptionError, unknown
from lora_lab.plots import registry
from lora_lab.plots import style as plot_style
from lora_lab.plots.panels import PAGE, Panels
from lora_lab.plots.style import WIDTHS
from lora_lab.results.result import Result

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LETTER = 0.16  # inches above a panel for its letter
_LOWEST = 0.77  # of its own height that a panel may have on a full page: all of its parts are still readable


@dataclass(frozen=True)
class Part:
    """What one panel shows: results of one kind, which view of them, and which metric (None: the usual ones)."""

    results: Sequence[Result]
    view: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Composed:
    """A figure, and of each panel what is to be seen and on what it was measured."""

    figure: Figure
    captions: list[tuple[str, str]]
    fitting: int
    """So many of its panels, from the first on, fit on a page; all of them where it is no higher."""


def compose(parts: Sequence[Part], *, width: str = "double", columns: int | None = None) -> Composed:
    """The parts as lettered panels in `columns`, by default two on the width of two columns of a page, and one on one.

    Each is as high as a figure of its own, or somewhat lower where all of them fit a page so. Nothing stands below the
    panels: it is in `captions`. OptionError where a part cannot be drawn, or for more of them than there are letters.
    """
    if not 0 < len(parts) <= len(_LETTERS):
        raise OptionError(f"{len(parts)} panels; a figure has from 1 to {len(_LETTERS)}")
    if width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    columns = columns or (min(2, len(parts)) if width == "double" else 1)
    if columns > 1 and WIDTHS[width] / columns < WIDTHS["single"]:
        raise OptionError(f"{columns} columns of panels; on the width {width} there is room for 1 or 2")
    inner = "single" if columns > 1 else width
    chosen = [registry.view_of(part.results, part.view) for part in parts]
    heights = [_height(part, view, inner) + _LETTER for part, (_, view) in zip(parts, chosen, strict=True)]
    lines = [max(heights[i : i + columns]) for i in range(0, len(parts), columns)]
    fitting = min(len(parts), columns * sum(high <= PAGE / _LOWEST for high in accumulate(lines)))
    if fitting == len(parts):
        scale = min(1.0, PAGE / sum(lines))
        heights, lines = [scale * height for height in heights], [scale * line for line in lines]
    with plot_style.styled():
        figure = Figure(figsize=(WIDTHS[width], sum(lines)), layout="constrained")
        places = figure.subfigures(len(lines), columns, squeeze=False, height_ratios=lines).ravel()
        captions = []
        for i, (part, (_, view)) in enumerate(zip(parts, chosen, strict=True)):
            place, line = places[i], lines[i // columns]
            if line - heights[i] > _LETTER:  # as high as it is by itself, beside a panel that is higher
                place = place.subfigures(2, 1, height_ratios=[heights[i], line - heights[i]])[0]
            panels = Panels(None, inner, place)
            view.on(part.results, panels, part.metric)
            place.suptitle(f"({_LETTERS[i]})", x=0.01, ha="left", fontweight="bold")
            captions.append((view.title, panels.said))
        identity = [
            [registry.identity(part.results, name, inner, part.metric)]
            for part, (name, _) in zip(parts, chosen, strict=True)
        ]
        figure.set_gid(registry.marked([identity, width, columns]))
        registry.lay_out(figure)
    return Composed(figure, captions, fitting)


def _height(part: Part, view: registry.View, width: str) -> float:
    """How many inches high a part is on a figure of its own."""
    axes = view.on(part.results, Panels(None, width, captioned=False), part.metric)
    figure = axes[0].get_figure(root=True)
    assert isinstance(figure, Figure)
    return float(figure.get_figheight())
