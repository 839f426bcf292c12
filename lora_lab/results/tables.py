"""The tables of a result as a pandas DataFrame, as CSV, as LaTeX with booktabs, and as HTML for notebooks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import escape, files
from lora_lab.errors import OptionError, unknown
from lora_lab.extras import needs
from lora_lab.files.ownership import MARK, foreign
from lora_lab.results import schema
from lora_lab.results.rows import metrics_of
from lora_lab.results.schema import ROWS, Column, Paper

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_lab.results.result import Result

Row = Mapping[str, Any]

_WHO = ("adapter", "method", "seed", "rescaled")
"""What rows of a table within a table carry of the row that they lie in."""

_ENDS = {"value": ("low", "high"), "mean": ("mean_low", "mean_high")}
_SPREADS = {"mean": "spread"}
_SHOWN = 10  # rows in a notebook


def names_of(result: Result) -> list[str]:
    """The names of a result's tables: rows, those of its summary, and those within them, such as adapters.epsilon."""
    known = schema.kinds()[result.kind].tables if result.kind in schema.kinds() else {}
    names = [ROWS]
    for name, value in result.summary.items():
        if isinstance(value, list) and (name in known or (value and all(isinstance(row, Mapping) for row in value))):
            names.append(name)
            inner = schema.columns_of(known[name]).values() if name in known else ()
            names += [f"{name}.{each.name}" for each in inner if each.rows is not None]
    return names


def table(result: Result, name: str = ROWS) -> list[dict[str, Any]]:
    """The rows of one of a result's tables; those within another table know whose they are."""
    if name not in names_of(result):
        raise unknown(f"table of {result.kind} results", name, names_of(result))
    if name == ROWS:
        return result.rows()
    outer, _, inner = name.partition(".")
    rows = [dict(row) for row in result.summary[outer]]
    if not inner:
        return rows
    return [{**{key: row[key] for key in _WHO if key in row}, **each} for row in rows for each in row[inner]]


def frame(result: Result, name: str = ROWS) -> DataFrame:
    """A table as a pandas DataFrame, a column each; OptionError where pandas is not installed."""
    with needs("pandas", "a frame"):
        import pandas
    rows = table(result, name)
    return pandas.DataFrame(rows, columns=list(rows[0] if rows else columns_known(result, name)))


def to_csv(result: Result, name: str = ROWS) -> str:
    """A table as CSV: numbers in full, nothing for null, lists as JSON; a last column says what wrote it.

    Texts that a spreadsheet would take for formulas have an apostrophe in front.
    """
    rows, out = table(result, name), io.StringIO()
    names = list(rows[0] if rows else columns_known(result, name))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, MARK])
    for row in rows:
        writer.writerow([*(_plain(row.get(name)) for name in names), f"{result.kind} {result.schema}"])
    return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | Mapping):
        return escape.spreadsheet(json.dumps(value, ensure_ascii=False))
    return escape.spreadsheet(value) if isinstance(value, str) else value


def to_latex(result: Result, name: str | None = None, columns: Sequence[str] | None = None) -> str:
    """A table for LaTeX with booktabs, intervals and spreads beside their numbers.

    Without a name it is the one that papers print of results of this kind. The spread of a single value is left out.
    """
    kind = schema.kinds().get(result.kind)
    paper = kind.paper if kind and name is None and columns is None else None
    if paper is None:
        rows = table(result, name or ROWS)
        known = columns_known(result, name or ROWS)
        shown = list(columns) if columns is not None else _joined(list(rows[0] if rows else known), known)
        missing = [each for each in shown if rows and each not in rows[0]]
        if missing:
            raise unknown("column", missing[0], list(rows[0]))
        return _booktabs(rows, shown, known)
    rows, known = table(result, paper.table), columns_known(result, paper.table)
    if paper.across is not None:
        metrics = [each for each in metrics_of(result.parameters) if rows and each in rows[0]]
        return _side_by_side(rows, replace(paper, columns=(*metrics, *paper.columns)), known)
    named, further = list(paper.columns), _further(rows, known)
    return _booktabs(rows, named + further if paper.further_last else further + named, known)


def save(result: Result, *paths: Path, force: bool = False, columns: Sequence[str] | None = None) -> list[Path]:
    """Write the result's table to each path, as .tex or .csv; what is foreign is not replaced (see `refuse`).

    `columns` of the table for LaTeX, if not those that papers print.
    """
    refuse(*paths, force=force)
    for path in paths:
        text = _FORMATS[path.suffix](result, columns)
        files.write_bytes(path, text.encode())
    return list(paths)


def refuse(*paths: Path, force: bool = False) -> None:
    """FileError where a table cannot be written; one of ours is made anew without being asked."""
    for path in paths:
        if path.suffix not in _FORMATS:
            raise OptionError(f"{path}: tables are written as {', '.join(_FORMATS)}")
        files.refuse_existing(path, force=force or foreign(path) is None)


_FORMATS: dict[str, Callable[[Any, Sequence[str] | None], str]] = {
    ".tex": lambda result, columns: f"{to_latex(result, columns=columns).rstrip()}\n% {MARK} {result.kind}\n",
    ".csv": lambda result, columns: to_csv(result),
}


def describe(result: Result) -> str:
    """One line: kind, rows, adapters, task and split, and when it was computed."""
    said = result.parameters
    tasks = said.get("task_names") or [_task(record) for record in said.get("tasks") or [said.get("task")]]
    adapters = said.get("adapters")
    parts = [
        f"{len(next(iter(result.columns.values()), ()))} rows",
        f"{len(adapters)} adapters" if isinstance(adapters, list) else "",
        " ".join([*filter(None, tasks), *([said["split"]] if isinstance(said.get("split"), str) else [])]),
        str(result.provenance.get("date") or "")[:10],
    ]
    return escape.visible(f"Result({result.kind}: {', '.join(filter(None, parts))})")


def to_html(result: Result) -> str:
    """The first rows as a small HTML table, intervals left out, all texts escaped."""
    rows, known = table(result), columns_known(result, ROWS)
    names = [name for name in _joined(list(result.columns), known) if not _is_list(rows, name)]
    return html_table(describe(result), names, ([row[name] for name in names] for row in rows))


def html_table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for notebooks, of so many rows that it stays small."""
    rows = list(rows)
    lines = [f"<table><caption>{escape.html(caption)}</caption>"]
    lines.append("<tr>" + "".join(f"<th>{escape.html(text)}</th>" for text in headings) + "</tr>")
    for row in rows[:_SHOWN]:
        cells = ("–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("<tr>" + "".join(f"<td>{escape.html(cell)}</td>" for cell in cells) + "</tr>")
    if len(rows) > _SHOWN:
        lines.append(f'<tr><td colspan="{len(headings)}">… {len(rows) - _SHOWN} more rows</td></tr>')
    return "\n".join([*lines, "</table>"])


def columns_known(result: Result, name: str) -> Mapping[str, Column]:
    """What the schema says of a table's columns; nothing where there is none."""
    kind = schema.kinds().get(result.kind)
    outer, _, inner = name.partition(".")
    if kind is None or outer not in kind.tables:
        return {}
    known = schema.columns_of(kind.tables[outer])
    if not inner:
        return known
    return {**{each: known[each] for each in _WHO if each in known}, **schema.columns_of(known[inner].rows)}


def _further(rows: Sequence[Row], known: Mapping[str, Column]) -> list[str]:
    """Columns that a table may have besides, such as the options that were tried."""
    return _joined([name for name in (rows[0] if rows else ()) if name not in known], known)


def _joined(names: Sequence[str], known: Mapping[str, Column]) -> list[str]:
    """Names without the ends and spreads that stand in the cell of another, and without tables within the table."""
    nested = {name for name, each in known.items() if {list, dict} & set(each.types)}
    return [name for name in apart(names) if name not in nested]


def apart(names: Sequence[str]) -> list[str]:
    """Names of columns without the ends and spreads that belong to another one."""
    inside = {part for name in names for part in (*ends(name), spread(name))}
    return [name for name in names if name not in inside]


def ends(name: str) -> tuple[str, str]:
    """The columns that hold the interval of a column's values."""
    return _ENDS.get(name, (f"{name}_low", f"{name}_high"))


def spread(name: str) -> str:
    """The column that holds the spread of what a column's values are means of."""
    return _SPREADS.get(name, f"{name}_spread")


def _is_list(rows: Sequence[Row], name: str) -> bool:
    return any(isinstance(row[name], list | Mapping) for row in rows)


def _task(record: Any) -> str:
    return str(record.get("name") or record.get("kind") or "") if isinstance(record, Mapping) else ""


def _booktabs(rows: Sequence[Row], names: Sequence[str], known: Mapping[str, Column]) -> str:
    sides = ["r" if _numeric(rows, name, known) else "l" for name in names]
    lines = [" & ".join(_heading(name, known) for name in names)]
    body = [" & ".join(_cell(row, name, known) for name in names) for row in rows]
    return _tabular("".join(sides), lines, body)


def _side_by_side(rows: Sequence[Row], paper: Paper, known: Mapping[str, Column]) -> str:
    """A line for each value of the index, and the columns once for each value of another."""
    from lora_lab.results.result import grouped

    assert paper.across is not None
    groups = list(dict.fromkeys(row[paper.across] for row in rows))
    shown = [name for name in paper.columns if any(row.get(name) is not None for row in rows)]
    once = [name for name in paper.once if any(row.get(name) is not None for row in rows)]
    wide = len(shown)
    top = [rf"\multicolumn{{{wide}}}{{c}}{{{escape.latex(str(group or 'adapters'))}}}" for group in groups]
    below = [*(_heading(name, known) for name in once), *[_heading(name, known) for name in shown] * len(groups)]
    body = []
    for head, members in grouped(rows, *paper.index):
        cells = [escape.latex(" ".join(str(part) for part in head.values() if part))]
        cells += [_cell(members[0], name, known) for name in once]
        for group in groups:
            row = next((each for each in members if each[paper.across] == group), None)
            cells += [_cell(row, name, known) for name in shown] if row else ["--"] * wide
        body.append(" & ".join(cells))
    heads = [" & ".join([*[""] * (1 + len(once)), *top]), " & ".join([_heading(paper.index[0], known), *below])]
    return _tabular("l" + "r" * (len(once) + wide * len(groups)), heads, body)


def _tabular(sides: str, heads: Sequence[str], body: Sequence[str]) -> str:
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", *(rf"{line} \\" for line in heads), r"\midrule"]
    return "\n".join([*lines, *(rf"{line} \\" for line in body), r"\bottomrule", r"\end{tabular}"]) + "\n"


def _heading(name: str, known: Mapping[str, Column]) -> str:
    said = known.get(name)
    return escape.latex((said.heading if said else "") or name.replace("_", " "))


def _numeric(rows: Sequence[Row], name: str, known: Mapping[str, Column]) -> bool:
    if name in known:
        return bool({int, float} & set(known[name].types)) and str not in known[name].types
    values = [row.get(name) for row in rows if row.get(name) is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _cell(row: Row, name: str, known: Mapping[str, Column]) -> str:
    value = row.get(name)
    if value is None:
        return "--"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return escape.latex(", ".join(map(str, value)))
    if not isinstance(value, float):
        return f"${value}$" if isinstance(value, int) else escape.latex(str(value))
    low, high = (row.get(end) for end in ends(name))
    around = row.get(spread(name))
    form = known[name].form if name in known else ".4g" if low is None and around is None else ".3f"
    text = _number(value, form)
    if low is not None and high is not None:
        text += rf"\,[{_number(low, form)}, {_number(high, form)}]"
    elif around is not None and _behind(row, known) > 1:
        text += rf" \pm {_number(around, form)}"
    return f"${text}$"


def _behind(row: Row, known: Mapping[str, Column]) -> int:
    """How many values the means of a row are over; 2 where that is not said."""
    return next((row[name] for name, said in known.items() if said.counts), 2)


def _number(value: float, form: str) -> str:
    """A number in LaTeX's maths: 1e-05 is written as a power of ten."""
    digits, e, power = f"{value:{form}}".partition("e")
    return rf"{digits}\cdot10^{{{int(power)}}}" if e else digits
