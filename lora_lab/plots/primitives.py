"""What figures are made of: panels, curves with bands, grouped bars, heat maps, legends, captions, names on axes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties

from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.results.stats import mean_and_spread

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]
Band = tuple[Floats, Floats, Floats]
"""Value, low and high at every place."""

_CAPTION = 7
_SMALLEST = 4.0  # points: what smaller print would be is left out
_DARK, _GREY = "#333333", "#555555"


class Panels:
    """Where a view draws its panels: on a figure of its own, in the place of the Axes given, or on as many Axes.

    Legends and captions outside of the panels belong to whole figures: on Axes that were given, the legend lies in the
    first of them and there is no caption.
    """

    def __init__(self, ax: Axes | Sequence[Axes] | None, width: str) -> None:
        self.width = width
        self.single = width == "single"
        self._given = None if ax is None else [ax] if isinstance(ax, Axes) else list(np.ravel(np.asarray(ax)))

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

    def stack(self, below: tuple[int, int], height: float, ratios: Sequence[float], *, sharey: bool) -> list[Axes]:
        """A panel over the whole width, and below it (lines, columns) of others, which may share their y axis."""
        lines, columns = below
        if self._given is not None and len(self._given) == 1 + lines * columns:
            return self._given
        spec = self._spec(1 + lines, columns, height, height_ratios=ratios)
        figure = spec.figure
        axes = [figure.add_subplot(spec[0, :])]
        for i in range(lines * columns):
            first = axes[1] if sharey and i else None
            axes.append(figure.add_subplot(spec[1 + i // columns, i % columns], sharey=first))
        return axes

    def _spec(self, lines: int, columns: int, height: float, **ratios: Any) -> Any:
        if self._given is None:
            return plot_style.new(self.width, height).add_gridspec(lines, columns, **ratios)
        place = self._given[0].get_subplotspec() if len(self._given) == 1 else None
        if place is None:
            raise OptionError(
                f"{lines * columns} panels do not fit on {len(self._given)} axes: as many are needed, or one of a grid"
            )
        self._given[0].set_axis_off()
        return place.subgridspec(lines, columns, **ratios)

    def legend(self, ax: Axes, columns: int | None = None, **more: Any) -> None:
        """The legend of one panel for all: above the figure, in as many columns as fit (by default up to 4, or 2)."""
        handles, names = ax.get_legend_handles_labels()
        if not names:
            return
        if self._given is not None:
            ax.legend(handles, names, **more)
            return
        figure = figure_of(ax)
        for count in range(columns or (2 if self.single else 4), 0, -1):
            made = figure.legend(handles, names, loc="outside upper center", ncols=count, **more)
            if count == 1 or made.get_window_extent().width <= figure.bbox.width:
                break
            made.remove()
        lines = -(-len(names) // count)
        figure.set_figheight(figure.get_figheight() + 0.15 * max(0, lines - 4))

    def colour_bar(self, axes: Sequence[Axes], image: Any, label: str, shrink: float, lines: int = 1) -> None:
        """One colour bar beside so many lines of panels."""
        more = {"aspect": 10 * lines} if lines > 2 else {}
        figure_of(axes[0]).colorbar(image, ax=list(axes), label=label, shrink=shrink, **more)

    def caption(self, ax: Axes, text: str) -> None:
        """Grey lines below the figure that say what it was measured on; in one column, a line for each part.

        Parts stand between semicolons; what is wider than the figure goes on in a further line.
        """
        if self._given is not None:
            return
        figure = figure_of(ax)
        room = figure.get_figwidth() - 0.2
        lines: list[str] = []
        for part in text.split("; "):
            whole = f"{lines[-1]}; {part}" if lines and not self.single else part
            if whole is not part and inches(whole, _CAPTION) <= room:
                lines[-1] = whole
            else:
                lines += _folded(part, room)
        figure.supxlabel("\n".join(lines), fontsize=_CAPTION, color=_GREY)


def points(adapters: Sequence[Sequence[Row]], names: Sequence[Any], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    """For every name, the rows of all adapters that have it: of each the first."""
    tables = [{key(row): row for row in reversed(rows)} for rows in adapters]
    return [[table[name] for table in tables if name in table] for name in names]


def band(places: Sequence[Sequence[Row]], key: str, ends: tuple[str, str] | None = None) -> Band:
    """From the rows at each place: of one its value and interval, of several their mean ± one standard deviation.

    NaN where there is no row or no number. A value without an interval has a band of no width.
    """
    low, high = ends or (f"{key}_low", f"{key}_high")
    table = np.full((3, len(places)), np.nan)
    for i, rows in enumerate(places):
        if len(rows) == 1:
            value = rows[0][key]
            table[:, i] = np.array([value, rows[0].get(low, value), rows[0].get(high, value)], dtype=float)
        elif rows:
            mean, spread = mean_and_spread(np.array([row[key] for row in rows], dtype=float))
            table[:, i] = mean, mean - spread, mean + spread
    return table[0], table[1], table[2]


def curve(ax: Axes, x: Any, values: Band, alpha: float = 0.16, **look: Any) -> None:
    """A line in its band."""
    value, low, high = values
    ax.fill_between(x, low, high, color=look["color"], alpha=alpha, linewidth=0)
    ax.plot(x, value, **look)


def bars(ax: Axes, groups: Mapping[str, Band], *, horizontal: bool = False, capsize: float = 1.2) -> None:
    """Groups of bars side by side, with their intervals."""
    share = 0.8 / len(groups)
    for i, (label, (value, low, high)) in enumerate(groups.items()):
        place = np.arange(len(value)) + (i - (len(groups) - 1) / 2) * share
        error = np.stack([value - low, high - value]).clip(min=0)
        known = np.isfinite(error).all(0)
        look = {**plot_style.bar_look(label, i), "label": label}
        (ax.barh if horizontal else ax.bar)(place, value, share, **look)
        if known.any():
            ends: dict[str, Any] = {"fmt": "none", "ecolor": _DARK, "elinewidth": 0.7, "capsize": capsize}
            ends["xerr" if horizontal else "yerr"] = error[:, known]
            across, up = (value, place) if horizontal else (place, value)
            ax.errorbar(across[known], up[known], **ends)


def heat(ax: Axes, table: Floats, rows: Sequence[str], columns: Sequence[str], **options: Any) -> Any:
    """A matrix as colours, its rows and columns named; the image, for a colour bar."""
    turned = options.pop("rotation", 0)
    size = options.pop("size", None)
    image = ax.imshow(table, **options)
    name_axis(ax.xaxis, columns, rotation=turned, size=size, ha="right" if turned == 45 else "center")
    name_axis(ax.yaxis, rows, size=size)
    ax.grid(visible=False)
    return image


def name_axis(axis: Any, names: Sequence[str], size: float | None = None, **options: Any) -> None:
    """Names at 0, 1, 2 … of an axis: smaller where they are many, and where they would be unreadable, each second …"""
    kind, ax = axis.axis_name, axis.axes
    wanted = max(size, _SMALLEST) if size else type_size(f"{kind}tick.labelsize")
    flat = kind == "x" and not options.get("rotation")
    room = extent(ax, kind) / max(1, len(names))  # inches for each name
    needed = max((inches(name, wanted) for name in names), default=0.0) * 1.1 if flat else wanted / 72
    smallest = min(wanted, 5.5) if flat else _SMALLEST
    shrunk = min(wanted, max(smallest, wanted * room / needed)) if needed else wanted
    step = max(1, int(np.ceil(needed * shrunk / wanted / room - 1e-9)))
    if size is not None or shrunk < wanted:
        options["fontsize"] = shrunk
    if kind == "y":
        options.pop("ha", None)
    (ax.set_xticks if kind == "x" else ax.set_yticks)(range(0, len(names), step), list(names)[::step], **options)


def title(ax: Axes, text: str) -> None:
    """A title that stays above its panel; of two adapters in two lines, if need be."""
    size, room = type_size("axes.titlesize"), 0.9 * extent(ax, "x")
    lines = [text]
    if inches(text, size) > room and " – " in text:
        lines = text.split(" – ", 1)
        lines[0] += " –"
    for i, line in enumerate(lines):
        most = len(line)
        while most > 8 and inches(plot_style.shortened(line, most), size) > room:
            most -= 1
        lines[i] = plot_style.shortened(line, most)
    ax.set_title("\n".join(lines))


def more_for(names: Sequence[str]) -> float:
    """How many inches higher a figure has to be for long names that stand slanted below an axis."""
    return 0.045 * max(0, max(map(len, names), default=0) - 18)


def extent(ax: Axes, kind: str) -> float:
    """About how many inches wide (x) or high (y) a panel will be."""
    return float((ax.bbox.width if kind == "x" else ax.bbox.height) / figure_of(ax).dpi)


def figure_of(ax: Axes) -> Any:
    """The figure, or part of one, that the axes lie on."""
    return ax.get_figure()


def type_size(name: str) -> float:
    """A type size of the style, in points."""
    return float(FontProperties(size=rcParams[name]).get_size_in_points())


def inches(text: str, size: float) -> float:
    """How wide a text is at a size in points: what its letters take, which is known without drawing them."""
    from matplotlib.cbook import is_math_text
    from matplotlib.textpath import text_to_path

    math = is_math_text(text)
    plain = text if math else text.replace(r"\$", "$")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks, which is told when they are drawn
        width, *_ = text_to_path.get_text_width_height_descent(plain, FontProperties(size=size), math)
    return float(width) / 72


def _folded(text: str, room: float) -> list[str]:
    """The words of a text in lines of so many inches, of one word at least."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and inches(longer, _CAPTION) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
