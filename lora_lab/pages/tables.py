"""The tables of a result as a page shows them: intervals beside their numbers, columns that say nothing left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.results import schema, tables
from lora_lab.results.result import Result
from lora_lab.results.schema import ROWS, Column

_ALIKE = 3
"""From so many rows on, a column with one value is told once above them."""
_LONGEST = 200
"""Characters of a cell."""


@dataclass(frozen=True)
class Heading:
    """A column."""

    text: str
    about: str
    """What it means, and its unit."""
    numeric: bool


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it is sorted by, where it is one."""

    text: str
    number: float | None


@dataclass(frozen=True)
class Table:
    """One table of a result, ready to be shown."""

    name: str
    about: str
    headings: list[Heading]
    rows: list[list[Cell]]
    count: int
    """Rows of the whole table."""
    alike: list[tuple[str, str, str]]
    """Columns with the same value in all rows: heading, what it means, value."""


def shown(result: Result, most: int) -> list[Table]:
    """The tables of a result that have rows, that of its paper first, of each at most so many rows."""
    kind = schema.kinds().get(result.kind)
    first = kind.paper.table if kind else ROWS
    names = sorted(tables.names_of(result), key=lambda name: name != first)
    made = (_table(result, name, most) for name in names)
    return [table for table in made if table is not None]


def _table(result: Result, name: str, most: int) -> Table | None:
    rows = tables.table(result, name)
    if not rows:
        return None
    known = tables.columns_known(result, name)
    told = result.parameters.get("metrics")
    metrics = told if isinstance(told, Mapping) else {}
    names = tables.apart(list(dict.fromkeys(column for row in rows for column in row)))
    names = [column for column in names if _says(rows, column)]
    alike = [column for column in names if _is_alike(rows, column)]
    names = [column for column in names if column not in alike]
    if not names:
        alike, names = [], alike
    return Table(
        name,
        "rows" if name == ROWS else name.replace("_", " ").replace(".", ": "),
        [Heading(_heading(each, known), _about(each, known, metrics), _numeric(rows, each)) for each in names],
        [[_cell(row, each, known) for each in names] for row in rows[:most]],
        len(rows),
        [(_heading(each, known), _about(each, known, metrics), _cell(rows[0], each, known).text) for each in alike],
    )


def _says(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a column holds more than nothing, and something that fits into cells: no numbers in lists, no tables."""
    values = [row.get(name) for row in rows]
    lists = [value for value in values if isinstance(value, list | Mapping)]
    texts = all(isinstance(value, list) and all(isinstance(part, str) for part in value) for value in lists)
    return texts and any(value not in (None, "", []) for value in values)


def _is_alike(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    measured = any(isinstance(value, float) for value in values)
    return len(rows) >= _ALIKE and not measured and all(value == values[0] for value in values)


def _heading(name: str, known: Mapping[str, Column]) -> str:
    return (known[name].heading if name in known else "") or name.replace("_", " ")


def _about(name: str, known: Mapping[str, Column], metrics: Mapping[str, Any]) -> str:
    """What a column means, and its unit: by the schema, or of a metric by the result itself."""
    if name in known:
        about, unit = known[name].meaning, known[name].unit
    else:
        said = metrics.get(name)
        said = said if isinstance(said, Mapping) else {}
        about, unit = str(said.get("about") or ""), str(said.get("unit") or "")
    return about + (f" ({unit})" if about and unit else "")


def _numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _cell(row: Mapping[str, Any], name: str, known: Mapping[str, Column]) -> Cell:
    value = row.get(name)
    if value is None:
        return Cell("–", None)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", None)
    if isinstance(value, list):
        return Cell(", ".join(value), None)
    if isinstance(value, int):
        return Cell(str(value), value)
    if not isinstance(value, float):
        return Cell(shorter(str(value)), None)
    form = known[name].form if name in known else ".3f" if tables.ends(name)[0] in row else ".4g"
    low, high, spread = (row.get(part) for part in (*tables.ends(name), tables.spread(name)))
    text = number(value, form)
    if isinstance(low, int | float) and isinstance(high, int | float):
        text += f" [{number(low, form)}, {number(high, form)}]"
    elif isinstance(spread, int | float):
        text += f" ± {number(spread, form)}"
    return Cell(text, value)


def number(value: float, form: str) -> str:
    """A number as the schema writes it, or with two digits where that would show none of them; − for the minus."""
    text = f"{value:{form}}"
    if value and not any(digit in "123456789" for digit in text.partition("e")[0]):
        text = f"{value:.2g}"
    return text.replace("-", "−")


def shorter(value: Any, most: int = _LONGEST) -> str:
    """A value as text of so many characters at most; what is no text as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 3 :]}"
