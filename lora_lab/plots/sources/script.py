"""A figure as a script of plain matplotlib, so that its author can change everything in it.

The script reads the result files themselves: wherever an array that was drawn is a column of theirs, or a part of one,
it is taken from there by name; all other numbers (means over adapters, and what is made of them) stand in the script.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams, rcParamsDefault
from matplotlib.figure import Figure

from lora_lab import files
from lora_lab.errors import OptionError
from lora_lab.escape import visible
from lora_lab.files.ownership import MARK
from lora_lab.plots import style as plot_style
from lora_lab.plots.sources.decompiling import axes_of, furniture_of, literal
from lora_lab.results.result import Result

_FILTERS = 3
"""So many columns, at most, choose the rows of an array."""
_MOST = 20_000
"""Rows of results that are searched."""

_MARK = f"# {MARK} figure script"
"""The first line of a script, by which it is known."""
_HEAD = '''{mark}
# %% [markdown]
# # {title}
# {about}
# Everything here is plain matplotlib. Run it as a script, or as a notebook cell by cell.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path as Outline

plt.rcParams.update({settings})

# %%
here = Path(globals().get("__file__", "here")).parent
results = [json.loads((here / name).read_text(encoding="utf-8")) for name in {files}]


def column(name, result=0, **where):
    """The values of a column, in those rows where other columns have the values given."""
    columns = results[result]["columns"]
    rows = range(len(columns[name]))
    values = [columns[name][i] for i in rows if all(columns[key][i] == value for key, value in where.items())]
    return np.array(values, dtype=float)


# %%
fig = plt.figure(figsize={size})
'''
_END = """
# %%
fig.savefig(here / {output})
"""


def script(figure: Figure, results: Sequence[Result], files: Sequence[str], *, title: str, output: str) -> str:
    """The script in percent format; `files` are the places of the results, as the script is to read them."""
    with plot_style.styled():
        settings = {
            key: value
            for key, value in rcParams.items()
            if value != rcParamsDefault[key] and not key.startswith(("backend", "axes.prop_cycle"))
        }
    numbers = Numbers(results)
    parts = [
        _HEAD.format(
            mark=_MARK,
            title=visible(" ".join(title.split())),
            about=f"Drawn from {', '.join(map(repr, files))}.",
            settings=_dictionary(settings),
            files=list(files),
            size=tuple(round(float(inches), 4) for inches in figure.get_size_inches()),
        )
    ]
    for i, ax in enumerate(each for each in figure.axes if each.axison or each.get_label() == "<colorbar>"):
        parts.append(f"\n# %%\n# panel {i + 1}\n" + "\n".join(axes_of(ax, figure, numbers)) + "\n")
    parts.append("\n# %%\n# around the panels\n" + "\n".join(furniture_of(figure)) + "\n")
    return "".join([*parts, _END.format(output=repr(output))])


def notebook(text: str) -> str:
    """A script in percent format as a Jupyter notebook."""
    cells: list[dict[str, Any]] = []
    for block in text.split("# %%")[1:]:
        head, _, body = block.partition("\n")
        markdown = "[markdown]" in head
        lines = [
            line.removeprefix("#").removeprefix(" ") if markdown else line for line in body.strip("\n").split("\n")
        ]
        source = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        cell = {"cell_type": "markdown", "metadata": {}, "source": source}
        code: dict[str, Any] = {
            "cell_type": "code",
            "metadata": {},
            "source": source,
            "execution_count": None,
            "outputs": [],
        }
        cells.append({"id": f"cell-{len(cells)}", **(cell if markdown else code)})
    about = {"lora-lab": "figure script", "language_info": {"name": "python"}}
    content = {"metadata": about, "cells": cells, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def save(
    path: Path, figure: Figure, results: Sequence[Result], files_: Sequence[Path], *, title: str, force: bool = False
) -> None:
    """Write the script of a figure as .py, or as a notebook (.ipynb), which find the results from where they lie.

    OptionError for another ending; FileError where something else is at the path.
    """
    check(path)
    files.refuse_existing(path, force=force)
    names = [os.path.relpath(place.resolve(), path.resolve().parent) for place in files_]
    text = script(figure, results, names, title=title, output=f"{path.stem}-redrawn.pdf")
    files.write_bytes(path, (notebook(text) if path.suffix == ".ipynb" else text).encode("utf-8", "backslashreplace"))


def check(path: Path | None) -> None:
    """OptionError for a path that scripts are not written to."""
    if path is not None and path.suffix not in (".py", ".ipynb"):
        raise OptionError(f"{path}: a figure's script is written as .py or .ipynb")


class Numbers:
    """Arrays as Python: a column of a result where one holds these very values, else the values themselves."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._places: dict[tuple[float, ...], str] = {}
        for i, result in enumerate(results):
            rows = len(next(iter(result.columns.values()), ()))
            if 1 < rows <= _MOST:
                self._add(i, result.columns)

    def _add(self, place: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """All parts of columns that equal values of few others choose, those chosen by fewer first."""
        measured = {name: np.array(values, dtype=float) for name, values in columns.items() if _is_numeric(values)}
        named = [
            name
            for name, values in columns.items()
            if all(isinstance(value, str | bool | int) for value in values) and 1 < len(set(values)) <= len(values) / 2
        ]
        of = f", result={place}" if place else ""
        for count in range(_FILTERS + 1):
            for names in itertools.combinations(named, count):
                groups: dict[tuple[Any, ...], list[int]] = {}
                for row, key in enumerate(zip(*(columns[name] for name in names), strict=True) if names else ()):
                    groups.setdefault(key, []).append(row)
                for key, rows in groups.items() if names else [((), list(range(len(next(iter(columns.values()))))))]:
                    where = "".join(f", {name}={value!r}" for name, value in zip(names, key, strict=True))
                    for name, values in measured.items():
                        if len(rows) > 1:
                            self._places.setdefault(_key(values[rows]), f"column({name!r}{of}{where})")

    def __call__(self, values: Any) -> str:
        """The expression whose value they are."""
        array = np.ma.filled(np.ma.asarray(values).astype(float), np.nan)
        if array.ndim == 1 and len(array) > 1 and (place := self._places.get(_key(array))):
            return place
        return f"np.array({literal(array.tolist())})"


def _key(values: Any) -> tuple[float, ...]:
    return tuple("nan" if math.isnan(value) else float(f"{value:.12g}") for value in values)  # type: ignore[misc]


def _is_numeric(values: Sequence[Any]) -> bool:
    kinds = {type(value) for value in values}
    return kinds <= {float, int, type(None)} and bool(kinds & {float, int})


def _dictionary(settings: Mapping[str, Any]) -> str:
    lines = [f"    {key!r}: {value!r},\n" for key, value in settings.items()]
    return "{\n" + "".join(lines) + "}"
