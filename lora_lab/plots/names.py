"""Names on figures: how wide they are, how they are shortened, and how many of them fit on an axis."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.cbook import is_math_text
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator

from lora_lab.shortening import MOST as MOST
from lora_lab.shortening import told_apart

_SMALLEST = 5.0  # points: print that is still read
_STEPS = (1, 2, 4, 5, 10, 20)
_LINE = 1.25  # height of a line of text, in type sizes


def inches(text: str, size: float) -> float:
    """How wide the widest line of a text is at a size in points: what its letters take, without drawing them."""
    return max(_width(line, tuple(rcParams["font.family"])) for line in text.split("\n")) * size / 72


@cache
def _width(text: str, family: tuple[str, ...]) -> float:
    """Of a line, in type sizes."""
    math = is_math_text(text)
    plain = text if math else text.replace(r"\$", "$")
    font = FontProperties(family=list(family), size=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks, which is told when they are drawn
        width, *_ = text_to_path.get_text_width_height_descent(plain, font, math)
    return float(width) / 100


def type_size(name: str) -> float:
    """A type size of the style, in points."""
    return points(rcParams[name])


def tick_size(axis: Any) -> float:
    """The type size of an axis' tick labels, in points; of its own, whatever the style is when it is drawn."""
    size = axis.get_tick_params().get("labelsize")
    return type_size(f"{axis.axis_name}tick.labelsize") if size is None else points(size)


def points(size: Any) -> float:
    """A type size, or its name, in points."""
    return float(FontProperties(size=size).get_size_in_points())


def shortened(names: Sequence[str], most: int = MOST) -> list[str]:
    """The names in so many characters, or as many as leave different ones different (see shortening.py)."""
    plain = [name.replace(r"\$", "$") for name in names]  # what is drawn has \$, and half of it would begin a formula
    return [name.replace("$", r"\$") for name in told_apart(plain, most)]


def labels(names: Sequence[str]) -> list[str]:
    """Names of modules or players without what all of them have in front, shortened."""
    parts = [name.split(".") for name in names]
    front = 0
    while all(len(p) > front + 1 for p in parts) and len({p[front] for p in parts}) == 1:
        front += 1
    return shortened([".".join(p[front:]) for p in parts])


def folded(text: str, size: float, room: float) -> list[str]:
    """The words of a text in lines of so many inches, of one word at least."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and inches(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


class _Names(Locator):
    """Ticks at given places, each second, fourth … where the names of all of them would run into one another."""

    axis: Any

    def __init__(self, names: Sequence[str], places: Sequence[float]) -> None:
        self.names, self.places = list(names), np.asarray(places, dtype=float)
        self.needed = 0.0  # inches from one tick to the next

    def __call__(self) -> Any:
        """The places where there is room at the present size of the axes."""
        ax, along = self.axis.axes, 0 if self.axis.axis_name == "x" else 1
        points = np.ones((len(self.places), 2))
        points[:, along] = self.places
        at = ax.transData.transform(points)[:, along] / ax.get_figure(root=True).dpi
        for step in (*_STEPS, *range(40, max(41, len(at)), 20)):
            if len(at[::step]) < 2 or np.abs(np.diff(at[::step])).min() >= self.needed:
                break
        return self.places[::step]

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """All places."""
        return self.places


class Numbers(MaxNLocator):
    """Round numbers, as many as an axis has room for; only integers where it counts."""

    axis: Any

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__(steps=[1, 2, 2.5, 5, 10], integer=whole)

    def __call__(self) -> Any:
        """The numbers at the present size of the axes."""
        size = tick_size(self.axis)
        for bins in range(max(1, self.axis.get_tick_space()), 0, -1):
            self.set_params(nbins=min(9, bins))
            at = super().__call__()
            texts = self.axis.get_major_formatter().format_ticks(at)
            needed = [
                inches(text, size) + size / 72 if self.axis.axis_name == "x" else _LINE * size / 72 for text in texts
            ]
            if sum(needed) <= extent(self.axis):
                break
        return at


def extent(axis: Any) -> float:
    """How many inches long an axis is; before its figure is laid out, about so many."""
    box = axis.axes.bbox
    return float((box.width if axis.axis_name == "x" else box.height) / axis.axes.get_figure(root=True).dpi)


def name_axis(axis: Any, names: Sequence[str], places: Sequence[float] | None = None) -> None:
    """Names at 0, 1, 2 … of an axis, or at other places; thinned where they are too many for its length.

    On an x axis they lie flat if they are numbers or if all of them fit, and are slanted otherwise.
    """
    locator = _Names(names, range(len(names)) if places is None else places)
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: names[int(np.abs(locator.places - value).argmin())]))
    fit_names(axis)


def is_named(axis: Any) -> bool:
    """Whether an axis has names at its places, and no numbers."""
    return isinstance(axis.get_major_locator(), _Names)


def fit_names(axis: Any) -> None:
    """Lay names flat or slanted, and choose their size, by the length that their axis has now."""
    locator = axis.get_major_locator()
    if not isinstance(locator, _Names):
        return
    kind, names = axis.axis_name, locator.names
    # beside an axis, a line of text has 1 of its units
    units = max(1, len(names)) if kind == "x" else abs(np.ptp(axis.get_view_interval()))
    size, room = tick_size(axis), extent(axis) / units
    widest = max((inches(name, size) for name in names), default=0.0)
    numbers = all(re.fullmatch(r"[\d.:e+-]+", name) for name in names)
    slanted = kind == "x" and not numbers and widest + size / 72 > room
    flat = kind == "x" and not slanted
    apart = _LINE / math.sin(math.pi / 4) if slanted else _LINE  # from one to the next, in lines
    if not numbers and not flat:  # words: smaller, before some of them are left out
        size = min(size, max(_SMALLEST, 0.99 * 72 * room / apart))
    locator.needed = widest + size / 72 if flat else apart * size / 72
    axis.set_tick_params(labelsize=size)
    for tick in axis.get_major_ticks(len(names)) if kind == "x" else ():
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {"rotation": 0}
        tick.label1.set(**turned)


def more_for(names: Sequence[str]) -> float:
    """How many inches higher a figure has to be for long names that stand slanted below an axis."""
    return 0.045 * max(0, max(map(len, names), default=0) - 18)
