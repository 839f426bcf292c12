"""The looks that all figures share: column widths, type sizes, colours that everyone can tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lora_lab.errors import unknown

WIDTHS = {"single": 3.25, "double": 6.75}
"""Inches: one and two columns of the usual conference templates."""

STYLE: dict[str, Any] = {
    "pdf.fonttype": 42,  # TrueType, embedded: what publishers ask for
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-lab",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so figures look alike everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "savefig.dpi": 300,
}

# Okabe & Ito's palette, which colour-blind readers can tell apart; markers and dashes say it again in grey.
CYCLE = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
    {"color": "#333333", "marker": "X", "linestyle": "-."},
]

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


def new(width: str, height: float) -> Figure:
    """An empty figure of a column width, `height` inches high, that lays itself out."""
    if width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    return Figure(figsize=(WIDTHS[width], height), layout="constrained")


def styled() -> Any:
    """The style, as a context to draw and save in."""
    return rc_context(STYLE)


def method_name(method: str | None) -> str:
    """How a figure writes a method."""
    return METHODS.get(method or "", method or "adapters")


def task_name(record: Mapping[str, Any]) -> str:
    """How a caption writes a task, by its record: its name, or the kind and what its data is called."""
    data = record.get("data", "task")
    place = PurePath(data if isinstance(data, str) else data.get("train", "task"))
    return str(record.get("name") or f"{record.get('kind', 'task')}, {place.stem}")


def grouped(adapters: Sequence[list[dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Rows of adapters by label; by method instead, where methods have several seeds."""
    methods = [rows[0]["method"] for rows in adapters]
    several = len(adapters) > 2 and None not in methods and len(set(methods)) < len(methods)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for rows in adapters:
        label = method_name(rows[0]["method"]) if several else rows[0]["adapter"]
        while not several and label in found:  # two files of one name are two adapters
            label += "′"
        found.setdefault(label, []).append(rows)
    return found


def bands(counts: Mapping[str, int], one: str, several: str) -> str:
    """What bands are, by the number of adapters behind each group: of one and of several, all alike or by name."""
    kinds = {name: several if count > 1 else one for name, count in counts.items()}
    if len(set(kinds.values())) == 1:
        return next(iter(kinds.values()))
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def look(label: str, place: int) -> dict[str, Any]:
    """Colour, marker and dashes of a group: a method's own everywhere, else by its place."""
    names = list(METHODS.values())
    return dict(CYCLE[(names.index(label) if label in names else place) % len(CYCLE)])


def hatch(label: str, place: int) -> str:
    """What tells bars of a group apart in grey."""
    return ["", "//", "..", "xx", "--", "\\\\", "++"][CYCLE.index(look(label, place))]


def caption(figure: Figure, width: str, text: str) -> None:
    """Grey lines below the figure that say what it was measured on; in one column, a line for each part.

    Parts stand between semicolons; what is wider than the figure goes on in a further line.
    """
    room = figure.get_figwidth() - 0.2
    lines: list[str] = []
    for part in text.split("; "):
        whole = f"{lines[-1]}; {part}" if lines and width != "single" else part
        if whole is not part and _inches(whole) <= room:
            lines[-1] = whole
        else:
            lines += _folded(part, room)
    figure.supxlabel("\n".join(lines), fontsize=_CAPTION, color="#555555")


def _folded(text: str, room: float) -> list[str]:
    """The words of a text in lines of so many inches, of one word at least."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and _inches(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _inches(text: str) -> float:
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=_CAPTION).get_extents().width) / 72


_CAPTION = 7
"""Points."""
