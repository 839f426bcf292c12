"""What a result holds: every table of every kind, its columns with type, unit and meaning, as versioned dataclasses.

A row of a table is a dataclass of `column`s; a `Kind` names the tables of a result, and a change to any of them raises
its version. Results are checked against it, documented by it, and made into tables for papers by it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_lab.errors import shorten, unknown

FORMAT = "lora-lab result 1"
"""What the files of results say that they are."""

ROWS = "rows"
"""The name of a result's main table; the others lie in its summary."""

_KEY = "column"
_NUMBERS = {float: (float, int), int: (int,), bool: (bool,)}
_JSON_TYPES = {
    float: "number",
    int: "integer",
    bool: "boolean",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


@dataclass(frozen=True)
class Column:
    """A column of a table, as it is documented."""

    name: str
    types: tuple[type, ...]
    """What its values are in Python; of a table within a table, list."""
    meaning: str
    unit: str = ""
    optional: bool = False
    """Whether a result may lack it."""
    form: str = ".3f"
    """How tables for papers write its numbers."""
    heading: str = ""
    """What tables for papers call it, where that is not its name with blanks."""
    counts: bool = False
    """Whether it says how many values the means of its row are over."""
    rows: Any = None
    """The row class of a table within this table."""

    @property
    def type_names(self) -> str:
        """Its types as JSON names them; a number that is not finite is null."""
        names = [_JSON_TYPES[each] for each in self.types]
        return " or ".join(names)


def column(meaning: str, unit: str = "", **more: Any) -> Any:
    """A field of a row class: one line of what it means, its unit, and the other fields of `Column`."""
    return field(metadata={_KEY: {"meaning": meaning, "unit": unit, **more}})


@functools.cache
def columns_of(row: Any) -> Mapping[str, Column]:
    """Name → column of a row class, in order."""
    hints = typing.get_type_hints(row)
    return {f.name: _column(f, hints[f.name]) for f in dataclasses.fields(row)}


def _column(field_: dataclasses.Field[Any], hint: Any) -> Column:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options]
    if float in kinds and type(None) not in kinds:
        kinds.append(type(None))
    inner = [part for option in options for part in typing.get_args(option) if dataclasses.is_dataclass(part)]
    return Column(field_.name, tuple(kinds), rows=inner[0] if inner else None, **field_.metadata[_KEY])


@dataclass(frozen=True)
class Paper:
    """The table of a result that a paper prints."""

    columns: tuple[str, ...]
    """Their intervals and spreads stand in the same cell."""
    table: str = ROWS
    index: tuple[str, ...] = ()
    """With `across`: the columns that name a line."""
    across: str | None = None
    """A column of which every value gets columns of its own, side by side."""
    once: tuple[str, ...] = ()
    """With `across`: columns that are alike in all of them, and stand once in a line."""
    further_last: bool = False
    """Whether columns that the table may have besides stand behind these."""


@dataclass(frozen=True)
class Kind:
    """What results of one kind hold."""

    name: str
    meaning: str
    tables: Mapping[str, Any]
    """Name → row class; `rows` are the result's columns, the others lists of rows in its summary."""
    paper: Paper
    version: int = 1
    optional: Collection[str] = ()
    """Tables that a result may lack."""
    open: Mapping[str, str] = field(default_factory=dict)
    """Table → which columns it may have besides, in words."""
    summary: Mapping[str, str] = field(default_factory=dict)
    """What else the summary holds: name → meaning."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What the answer hangs on, beyond what every result says of itself: name → meaning."""


def kinds() -> Mapping[str, Kind]:
    """Name → kind of result, of all that have a schema."""
    from lora_lab.results.kinds.registry import KINDS

    return KINDS


def version_of(kind: str) -> int:
    """The version that results of a kind are written in; 1 of a kind without a schema."""
    return kinds()[kind].version if kind in kinds() else 1


def why_not(kind: str, version: int, columns: Mapping[str, Sequence[Any]], summary: Mapping[str, Any]) -> str | None:
    """What is wrong with a result by its schema, in words; None where it fits, and for kinds without one.

    A newer version than this one may have columns and tables that are unknown here; an older one is not looked at.
    """
    if kind not in kinds() or version < kinds()[kind].version:
        return None
    said = kinds()[kind]
    newer = version > said.version
    for name, row in said.tables.items():
        if name == ROWS:
            reason = _of_columns(columns, row, strict=not newer and name not in said.open)
        elif name in summary:
            reason = _of_rows(summary[name], row, strict=not newer and name not in said.open)
        else:
            reason = None if name in said.optional else "it is not there"
        if reason:
            by = f"; schema {version}, this lora-lab knows {said.version}" if newer else ""
            return f"table {name} of kind {kind}: {reason}{by}"
    return None


def _of_columns(found: Mapping[str, Sequence[Any]], row: Any, *, strict: bool) -> str | None:
    known = columns_of(row)
    if not found:  # a table without rows has no columns either
        return None
    missing = [name for name, each in known.items() if name not in found and not each.optional]
    if missing:
        return f"without column {shorten(missing)}"
    unknown = [name for name in found if name not in known]
    if strict and unknown:
        return f"with column {shorten(unknown)}, which its schema does not have"
    for name, values in found.items():
        if name in known and (reason := _of_values(known[name], values, strict=strict)):
            return reason
    return None


def _of_values(said: Column, values: Sequence[Any], *, strict: bool) -> str | None:
    """Of numbers every value is looked at, and of tables within the table every row; texts are taken as they are."""
    if said.rows is not None:
        tables = [value for value in values if value is not None]
        reasons = (_of_rows(table, said.rows, strict=strict) for table in tables)
        return next((f"{said.name}: {reason}" for reason in reasons if reason), None)
    if not set(said.types) <= {*_NUMBERS, type(None)}:
        return None
    allowed = {kind for each in said.types for kind in _NUMBERS.get(each, (each,))}
    wrong = {type(value) for value in values} - allowed
    if wrong:
        return f"column {said.name} holds a {sorted(kind.__name__ for kind in wrong)[0]}, not {said.type_names}"
    return None


def _of_rows(rows: Any, row: Any, *, strict: bool) -> str | None:
    if not isinstance(rows, list | tuple) or not all(isinstance(each, Mapping) for each in rows):
        return "no list of rows"
    if len({frozenset(each) for each in rows}) <= 1:
        names = list(rows[0]) if rows else []
        return _of_columns({name: [each[name] for each in rows] for name in names}, row, strict=strict)
    reasons = (_of_columns({name: [value] for name, value in each.items()}, row, strict=strict) for each in rows)
    return next((reason for reason in reasons if reason), None)


def documented(name: str) -> list[dict[str, Any]]:
    """Every column of every table of a kind (or of a report): table, column, type, unit, meaning; OptionError else."""
    found = []
    for table, row in _tables(name).items():
        for each in columns_of(row).values():
            found.append(_line(table, each))
            inner = columns_of(each.rows).values() if each.rows is not None else ()
            found += [_line(f"{table}.{each.name}", part) for part in inner]
    return found


def _line(table: str, said: Column) -> dict[str, Any]:
    kind = said.type_names + (", may be absent" if said.optional else "")
    return {"table": table, "column": said.name, "type": kind, "unit": said.unit, "meaning": said.meaning}


def json_schema(name: str) -> dict[str, Any]:
    """The file of a kind's results (or a report) as a JSON Schema of draft 2020-12."""
    said = kinds().get(name)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"lora-lab {name}"}
    if said is None:
        (row,) = _tables(name).values()
        return {**head, **_row_schema(row, further=False)}
    others = {table: row for table, row in said.tables.items() if table != ROWS}
    summary = {
        "type": "object",
        "properties": {
            **{table: _array(_row_schema(row, further=table in said.open)) for table, row in others.items()},
            **{each: {"description": meaning} for each, meaning in said.summary.items()},
        },
        "required": [table for table in others if table not in said.optional],
    }
    parameters = {each: {"description": meaning} for each, meaning in said.parameters.items()}
    known = columns_of(said.tables[ROWS]).values()
    rows: dict[str, Any] = {
        "type": "object",
        "properties": {each.name: {**_array(_value_schema(each)), "description": _about(each)} for each in known},
        "additionalProperties": {"type": "array"} if ROWS in said.open else False,
    }
    parts = {
        "format": {"const": FORMAT},
        "kind": {"const": name},
        "schema": {"const": said.version},
        "columns": rows,
        "parameters": {"type": "object", "properties": parameters},
        "summary": summary,
        "provenance": {"type": "object"},
    }
    return {**head, "description": said.meaning, "type": "object", "properties": parts, "required": list(parts)}


def _tables(name: str) -> Mapping[str, Any]:
    from lora_lab.results.reports import REPORTS

    if name not in kinds() and name not in REPORTS:
        raise unknown("kind of result", name, [*kinds(), *REPORTS])
    return kinds()[name].tables if name in kinds() else {"report": REPORTS[name]}


def _row_schema(row: Any, *, further: bool) -> dict[str, Any]:
    known = columns_of(row)
    return {
        "type": "object",
        "properties": {name: {**_value_schema(each), "description": _about(each)} for name, each in known.items()},
        "required": [name for name, each in known.items() if not each.optional],
        "additionalProperties": further,
    }


def _value_schema(said: Column) -> dict[str, Any]:
    names = [_JSON_TYPES[each] for each in said.types]
    inner = {"items": _row_schema(said.rows, further=False)} if said.rows is not None else {}
    return {"type": names if len(names) > 1 else names[0], **inner}


def _about(said: Column) -> str:
    return said.meaning + (f" ({said.unit})" if said.unit else "")


def _array(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(items)}
