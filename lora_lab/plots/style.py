"""The looks that all figures share: a style sheet, column widths, colours that everyone can tell apart, names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from matplotlib import rcParams
from matplotlib import style as sheets
from matplotlib.figure import Figure

from lora_lab.errors import OptionError, unknown

WIDTHS = {"single": 3.25, "double": 6.75}
"""Inches: one and two columns of the usual conference templates."""

DEFAULT = "lora-lab"
"""The style sheet of this package (lora-lab.mplstyle)."""

_FORMS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"), ("X", "-."))
_HATCHES = ("", "//", "..", "xx", "--", "\\\\", "++")
_current: list[tuple[str | Path, ...]] = [(DEFAULT,)]

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


def look(label: str, place: int) -> dict[str, Any]:
    """Colour, marker and dashes of a group: a method's own everywhere, else by its place.

    Markers go on where the colours of the style begin anew, so that no two of many groups look alike.
    """
    names = list(METHODS.values())
    place = names.index(label) if label in names else place
    colors = rcParams["axes.prop_cycle"].by_key().get("color", ["black"])
    turn, color = divmod(place, len(colors))
    return {"color": colors[color], "marker": _FORMS[(color + turn) % len(_FORMS)][0], "linestyle": dashes(place)}


def dashes(place: int) -> str:
    """The dashes of the group at a place."""
    return _FORMS[place % len(_FORMS)][1]


def bar_look(label: str, place: int) -> dict[str, Any]:
    """The same for bars: colour, and a hatch that tells them apart in grey."""
    names = list(METHODS.values())
    place = names.index(label) if label in names else place
    look_there = look("", place)
    hatch = _HATCHES[[marker for marker, _ in _FORMS].index(look_there["marker"])]
    return {"color": look_there["color"], "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}


def method_name(method: str | None) -> str:
    """How a figure writes a method."""
    return METHODS.get(method or "", method or "adapters")


def task_name(record: Mapping[str, Any]) -> str:
    """How a caption writes a task, by its record: its name, or the kind and what its data is called."""
    data = record.get("data", "task")
    place = PurePath(data if isinstance(data, str) else data.get("train", "task"))
    return str(record.get("name") or f"{record.get('kind', 'task')}, {place.stem}")


def shortened(text: str, most: int = 28) -> str:
    """A name of so many characters at most, cut in its middle: ends of names are what tells them apart."""
    if len(text) <= most:
        return text
    front = (most - 1) // 3
    # what is drawn has its dollars as \$, and without the backslash one would begin a formula
    return f"{text[:front]}…{text[len(text) - (most - 1 - front) :].removeprefix('$')}"


def distinct(names: Sequence[str], most: int = 28) -> list[str]:
    """The names shortened, but no further than leaves different ones different."""
    longest = max(map(len, names), default=0)
    while len({shortened(name, most) for name in names}) < len(set(names)) and most < longest:
        most += 4
    return [shortened(name, most) for name in names]


def labels(names: Sequence[str]) -> list[str]:
    """Names of modules or players without what all of them have in front, shortened."""
    parts = [name.split(".") for name in names]
    front = 0
    while all(len(p) > front + 1 for p in parts) and len({p[front] for p in parts}) == 1:
        front += 1
    return distinct([".".join(p[front:]) for p in parts])


def grouped(adapters: Sequence[list[dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of adapters by label; by method instead, where methods have several seeds."""
    methods = [rows[0]["method"] for rows in adapters]
    several = len(adapters) > 2 and None not in methods and len(set(methods)) < len(methods)
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    names = distinct([rows[0]["adapter"] for rows in adapters])
    for rows, name in zip(adapters, names, strict=True):
        label = method_name(rows[0]["method"]) if several else name
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
