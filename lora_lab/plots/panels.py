"""Where a view draws: panels in lines, with their titles, one legend, one colour bar and a caption around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, Numbers, extent, fit_names, folded, inches, shortened, type_size

_CAPTION = 7
_GREY = "#555555"
PAGE = 9.0
"""Inches: the height of a page, for which many panels are laid out."""
_LINE = 0.125  # inches from a name to the next below it, at least
_LEGEND = 0.6  # inches that figures have for their legend
_LETTER = 0.25  # inches beside a legend for the letter of a panel
_SMALLEST = 5.0  # points: print that is still read


class Panels:
    """Where a view draws its panels: on a figure of its own, in the place of the Axes given, or on as many Axes.

    Legends and captions outside of the panels belong to whole figures: on Axes that were given, the legend lies in the
    first of them and there is no caption. `host` is the part of a figure, of a size that is given, that is drawn on
    in place of a figure of its own, without a caption; nor has it one where it is not `captioned`.
    """

    def __init__(
        self, ax: Axes | Sequence[Axes] | None, width: str, host: SubFigure | None = None, *, captioned: bool = True
    ) -> None:
        self.width = width
        self.said = ""
        """What the caption says, wherever it stands."""
        self._host = host
        self._captioned = captioned and host is None
        self.single = width == "single"
        self._given = None if ax is None else [ax] if isinstance(ax, Axes) else list(np.ravel(np.asarray(ax)))
        self._titles: dict[Axes, tuple[tuple[str, ...], str]] = {}

    @property
    def page(self) -> float:
        """How many inches wide the figure is."""
        return plot_style.WIDTHS[self.width]

    def matrices(self, names: Sequence[Sequence[str]]) -> tuple[list[Axes], float]:
        """Axes for a matrix of each list of names, with the inches that its square side has."""
        size = type_size("ytick.labelsize")
        beside = max(inches(name, size) for rows in names for name in rows) + 0.3
        columns = 1 if self.single else min(2, len(names))
        # square cells: the height of the figure is what the names leave of its width
        side = min(4.0, self.page / columns - beside - (0.0 if self.single else 1.0 / columns))
        lines = -(-len(names) // columns)
        return self.grid(len(names), columns, (side + 0.5) * lines + (0.7 if self.single else 0.1)), side

    def both_ways(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Names beside the rows and below the columns of a matrix, numbered where they do not fit below."""
        rows = shortened(names, MOST // 2)
        if sum(inches(name, type_size("xtick.labelsize")) + 0.1 for name in rows) <= 0.4 * self.page:
            return rows, rows
        below = [str(i + 1) for i in range(len(rows))]
        return [f"{name}  {number}" for name, number in zip(rows, below, strict=True)], below

    def grid(self, count: int, columns: int, height: float, ratios: Any = None, *, sharey: bool = False) -> list[Axes]:
        """`count` panels in lines of so many, of heights as `ratios`; a figure of its own is `height` inches high."""
        lines = -(-count // columns)
        if self._given is not None and len(self._given) == count:
            return self._given
        spec = self._spec(lines, columns, height, height_ratios=ratios)
        axes: list[Axes] = list(spec.subplots(squeeze=False, sharey=sharey).ravel())
        for ax in axes[count:]:
            ax.set_axis_off()
        return axes[:count]

    def columns(self, count: int, most: int, height: float) -> int:
        """How many of `count` panels, each so many inches high, stand in a line.

        These are at most `most`, or up to twice as many (or 3) where the lines would be more than a page has.
        """
        columns = min(most, count)
        while -(-count // columns) * height > PAGE and columns < max(3, 2 * most):
            columns += 1
        return columns

    def line(self, count: int, rest: float, most: float = 0.2) -> float:
        """Inches for each of `count` names that stand below one another: less than `most`, where the page is full.

        `rest` is what else stands on it.
        """
        return max(_LINE, min(most, (PAGE - rest) / max(1, count)))

    def stack(self, below: tuple[int, int], height: float, ratios: Sequence[float], *, sharey: bool) -> list[Axes]:
        """A panel over the whole width, and below it (lines, columns) of others, which may share their y axis."""
        lines, columns = below
        if self._given is not None and len(self._given) == 1 + lines * columns:
            return self._given
        spec = self._spec(1 + lines, 1, height, height_ratios=ratios, panels=1 + lines * columns)
        figure = spec.figure
        # grids within the grid: long names beside one panel leave the others their width
        axes = [figure.add_subplot(spec[0].subgridspec(1, 1)[0])]
        for line in range(lines):
            inner = spec[1 + line].subgridspec(1, columns)
            for column in range(columns):
                first = axes[1] if sharey and len(axes) > 1 else None
                axes.append(figure.add_subplot(inner[column], sharey=first))
        return axes

    def packed(self, columns: Sequence[Sequence[tuple[float, float]]], rest: float) -> list[Axes]:
        """Panels below one another in columns, each of (its own height, that of what stands below it) in inches.

        A figure of its own is as high as the highest column and the `rest`; lower columns end above its lower end.
        """
        count = sum(map(len, columns))
        if self._given is not None and len(self._given) == count:
            return self._given
        heights = [sum(map(sum, column)) for column in columns]
        spec = self._spec(1, len(columns), max(heights) + rest, panels=count)
        axes: list[Axes] = []
        for place, column, height in zip(spec, columns, heights, strict=True):
            empty = max(heights) - height
            ratios = [own for own, _ in column] + [empty] * (empty > 0)
            inner = place.subgridspec(len(ratios), 1, height_ratios=ratios)
            axes += [spec.figure.add_subplot(inner[i]) for i in range(len(column))]
        return axes

    def _spec(self, lines: int, columns: int, height: float, panels: int | None = None, **ratios: Any) -> Any:
        if self._given is None:
            figure = self._host or plot_style.new(self.width, height)
            return figure.add_gridspec(lines, columns, **ratios)
        place = self._given[0].get_subplotspec() if len(self._given) == 1 else None
        if place is None:
            raise OptionError(
                f"{panels or lines * columns} panels do not fit on {len(self._given)} axes: "
                "as many are needed, or one of a grid"
            )
        self._given[0].set_axis_off()
        return place.subgridspec(lines, columns, **ratios)

    def title(self, ax: Axes, *parts: str, joint: str = " – ") -> None:
        """A title that stays above its panel, its parts in a line each if need be; `lay_out` shortens all of them."""
        self._titles[ax] = parts, joint
        ax.set_title("\n".join(parts))

    def legend(self, *axes: Axes, columns: int | None = None, more: Mapping[str, Any] | None = None) -> None:
        """The legend of some panels for all, a name once: above the figure, in as many columns as fit.

        By default these are up to 4, or 2 in one column of a page. `more` are names → handles that panels lack.
        """
        named: dict[str, Any] = {}
        for ax in axes:
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
                named.setdefault(name, handle)
        for name, handle in (more or {}).items():
            named.setdefault(name, handle)
        if not named:
            return
        handles, names = list(named.values()), list(named)
        if self._given is not None:
            axes[0].legend(handles, names)
            return
        figure = figure_of(axes[0])
        most = columns or (2 if self.single else 4)
        room = figure.bbox.width / figure.dpi - 2 * _LETTER * (self._host is not None)
        for count in range(min(most, len(names)), 0, -1):
            made = figure.legend(handles, names, loc="outside upper center", ncols=count)
            with plot_style.printed(figure):
                box = made.get_window_extent()
                wide, height = box.width / figure.dpi, box.height / figure.dpi
            if count == 1 or wide <= room:
                break
            made.remove()
        if self._host is not None:
            return
        figure.set_figheight(figure.get_figheight() + max(0.0, height - _LEGEND))

    def colour_bar(self, axes: Sequence[Axes], image: Any, label: str, shrink: float = 0.9) -> Any:
        """One colour bar beside all panels, or below them where these have one column of a page."""
        figure = figure_of(axes[0])
        high = figure.bbox.height / figure.dpi
        length = shrink * (self.page if self.single else high)
        text = "\n".join(folded(label, type_size("axes.labelsize"), (0.65 if self.single else 0.8) * length))
        more: dict[str, Any] = {"location": "bottom", "aspect": 30} if self.single else {"aspect": 10 * length}
        if self.single:
            more["pad"] = 0.05 / high
        return figure.colorbar(image, ax=list(axes), label=text, shrink=shrink, ticks=Numbers(), **more)

    def caption(self, ax: Axes, text: str) -> None:
        """Grey lines below the figure that say what it was measured on; in one column, a line for each part.

        Parts stand between semicolons; what is wider than the figure goes on in a further line.
        """
        self.said = text
        if self._given is not None or not self._captioned:
            return
        figure = figure_of(ax)
        room = figure.get_figwidth() - 0.2
        lines: list[str] = []
        for part in text.split("; "):
            whole = f"{lines[-1]}; {part}" if lines and not self.single else part
            if whole is not part and inches(whole, _CAPTION) <= room:
                lines[-1] = whole
            else:
                lines += folded(part, _CAPTION, room)
        figure.supxlabel("\n".join(lines), fontsize=_CAPTION, color=_GREY)

    def lay_out(self, axes: Sequence[Axes]) -> None:
        """Fit titles and the names on axes to the size that the panels have once they are laid out."""
        figure = axes[0].get_figure(root=True)
        with plot_style.printed(figure):
            if self._given is None:
                figure.draw_without_rendering()  # type: ignore[union-attr]
            for axis in (axis for ax in axes for axis in (ax.xaxis, ax.yaxis)):
                fit_names(axis)
            if self._titles:
                self._fit_titles()

    def _fit_titles(self) -> None:
        size, room = type_size("axes.titlesize"), min(extent(ax.xaxis) for ax in self._titles)
        titles = list(self._titles.values())
        whole = all(inches(joint.join(parts), size) <= room for parts, joint in titles)
        parts = [part for parts, _ in titles for part in parts]
        most = max(map(len, parts))
        while not whole and most > 8 and max(inches(f"{part} –", size) for part in shortened(parts, most)) > room:
            most -= 1
        short = iter(shortened(parts, most))
        texts = [
            (joint if whole else f"{joint.rstrip()}\n").join(next(short) for _ in parts) for parts, joint in titles
        ]
        widest = max(inches(text, size) for text in texts)
        for ax, text in zip(self._titles, texts, strict=True):
            ax.set_title(text, fontsize=max(_SMALLEST, size * min(1.0, room / widest)))


def figure_of(ax: Axes) -> Any:
    """The figure, or part of one, that the axes lie on."""
    return ax.get_figure()
