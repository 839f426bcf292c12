"""The looks that all figures share: a style sheet, column widths, colours that everyone can tell apart, names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path, PurePath
from typing import Any

from matplotlib import rcParams
from matplotlib import style as sheets
from matplotlib.figure import Figure

from lora_lab.errors import OptionError, unknown
from lora_lab.plots.names import MOST, shortened

WIDTHS = {"single": 3.25, "double": 6.75}
"""Inches: one and two columns of the usual conference templates."""

_PRINT = 300
"""Dots per inch of what is measured."""

DEFAULT = "lora-lab"
"""The style sheet of this package (lora-lab.mplstyle)."""

FORMS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"), ("X", "-."))
"""Marker and dashes, in the order of places."""
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (10, 3)))
"""What tells lines of one colour apart."""
_HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
_current: list[tuple[str | Path, ...]] = [(DEFAULT,)]

FEW = 7
"""So many groups have a colour, and a bar, each of their own."""

METHODS = {
    "lora": "LoRA",
    "coto": "CoTo",
    "coto-h": "CoTo-H",
    "coto-l": "CoTo-L",
    "dropout": "Dropout",
    "progressive-dropout": "Progressive dropout",
    "stochastic-depth": "Stochastic depth",
    "stochastic-depth-scaled": "Stochastic depth, scaled",
}
"""Training methods as papers write them."""


class use:  # noqa: N801  (a function to its users, as matplotlib.style.use)
    """Draw in another style from here on, or within a `with`: names of matplotlib styles, sheets' paths, or "lora-lab".

    Of several, the later ones have the last word: use("lora-lab", "dark_background"). OptionError for an unknown one.
    """

    def __init__(self, *styles: str | Path) -> None:
        self._before = _current[0]
        for style in styles:
            if style != DEFAULT and str(style) not in sheets.available and not Path(style).is_file():
                raise unknown("style", str(style), [DEFAULT, *sheets.available])
        _current[0] = styles or (DEFAULT,)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _current[0] = self._before


def in_use() -> tuple[str, ...]:
    """The style sheets that figures are drawn with."""
    return tuple(map(str, _current[0]))


def styled() -> Any:
    """The style, as a context to draw and save in."""
    own = Path(__file__).with_name("lora-lab.mplstyle")
    return sheets.context([own if style == DEFAULT else style for style in _current[0]])


def new(width: str, height: float) -> Figure:
    """An empty figure of a column width, `height` inches high, that lays itself out."""
    if width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    return Figure(figsize=(WIDTHS[width], height), layout="constrained")


@contextlib.contextmanager
def printed(figure: Any) -> Iterator[None]:
    """Measure what is on the figure as it is printed: on a screen, letters are whole pixels wide, up to a tenth off."""
    root = figure.get_figure(root=True)
    screen = root.dpi
    root.set_dpi(_PRINT)
    try:
        yield
    finally:
        root.set_dpi(screen)


def look(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the group at a place.

    Markers and dashes go on where the colours of the style begin anew, so that no two of many groups look alike.
    """
    colors = rcParams["axes.prop_cycle"].by_key().get("color", ["black"])
    turn, color = divmod(place, len(colors))
    marker, dashes = FORMS[(color + turn) % len(FORMS)]
    return {"color": colors[color], "marker": marker, "linestyle": dashes}


def one_of_many() -> dict[str, Any]:
    """How lines look that are too many to be told apart."""
    return {**look(0), "marker": "", "linestyle": "-", "linewidth": 0.6, "alpha": 0.3}


def bar_look(place: int) -> dict[str, Any]:
    """The same for bars: colour, and a hatch that tells them apart in grey."""
    there = look(place)
    hatch = _HATCHES[[marker for marker, _ in FORMS].index(there["marker"])]
    return {"color": there["color"], "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}


def places(names: Iterable[str], known: Mapping[str, int | None] | None = None) -> dict[str, int]:
    """Each name's place among the looks: its own, if it has one (by default, that of a training method), or a free one.

    So a method looks alike in all figures, and whatever is not known here looks like nothing else in its own.
    """
    own = dict(zip(METHODS.values(), count(), strict=False)) if known is None else known
    names = list(dict.fromkeys(names))
    found: dict[str, int] = {}
    for name in names:
        place = own.get(name)
        if place is not None and place not in found.values():
            found[name] = place
    free = (place for place in count() if place not in found.values())
    return {name: found[name] if name in found else next(free) for name in names}


def method_name(method: str | None) -> str:
    """How a figure writes a method, or several of a pair."""
    return " – ".join(METHODS.get(name, name) for name in (method or "adapters").split(" – "))


def task_name(record: Mapping[str, Any]) -> str:
    """How a caption writes a task, by its record: its name, or the kind and what its data is called."""
    data = record.get("data", "task")
    place = PurePath(data if isinstance(data, str) else data.get("train", "task"))
    return str(record.get("name") or f"{record.get('kind', 'task')}, {place.stem}")


def in_legend(names: Sequence[str]) -> list[str]:
    """Names shortened for a legend: the more, the shorter."""
    return shortened(names, MOST if len(set(names)) <= FEW else MOST // 2)


def grouped(adapters: Sequence[list[dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of adapters by label; by method instead, where methods have several seeds."""
    methods = [rows[0]["method"] for rows in adapters]
    several = len(adapters) > 2 and None not in methods and len(set(methods)) < len(methods)
    names = [method_name(rows[0]["method"]) if several else rows[0]["adapter"] for rows in adapters]
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for rows, name in zip(adapters, in_legend(names), strict=True):
        label = name
        while not several and label in groups:  # two files of one name are two adapters
            label += "′"
        groups.setdefault(label, []).append(rows)
    if not groups:
        raise OptionError("these results hold no adapters")
    return groups


def bands(counts: Mapping[str, int], one: str, several: str) -> str:
    """What bands are, by the number of adapters behind each group: of one and of several, all alike or by name."""
    kinds = {name: several if count > 1 else one for name, count in counts.items()}
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    if len(kinds) > 4:
        return f"{one}, or {several} where there are several"
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def measured_on(results: Sequence[Any]) -> str:
    """What a caption says of where the numbers come from: task, split, number of examples."""
    said, n = results[0].parameters, results[0].provenance.get("examples")
    return f"{task_name(said['task'])}, {said['split']} split, n = {n}"


def players(results: Sequence[Any]) -> str:
    """What a caption calls the players."""
    given = results[0].parameters["players"]
    return given if isinstance(given, str) else "group"
