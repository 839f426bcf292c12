"""Write the tables of claims.md from the stored results that its marks name: `python docs/claims_tables.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab.results.result import Result

HERE = Path(__file__).parent
PAGE = HERE / "claims.md"
RESULTS = HERE.parent / "figures" / "results"

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A mark with the name of a result, what stands below it, and the mark after that."""


def written(page: str) -> str:
    """The page with every table as its result has it now."""
    return _MARKED.sub(lambda found: found[1] + "\n" + "\n".join(tables(found[2])) + "\n\n" + found[3], page)


def tables(name: str) -> Iterator[str]:
    """The lines of a result's tables: claims about one task, a column each; then those about tasks together."""
    rows = Result.load(RESULTS / name).rows()
    alone = list(dict.fromkeys(row["task"] for row in rows if "," not in row["task"]))
    if len(alone) == 1:
        yield from _whole(rows)
        return
    yield from _side_by_side([row for row in rows if row["task"] in alone], alone)
    together = [row for row in rows if row["task"] not in alone]
    if together:
        yield ""
        yield from _whole(together)


def _whole(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| claim | treated | control | difference | verdict |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = row["says"], _number(row["of_treated"]), _number(row["of_control"]), _difference(row), row["verdict"]
        yield f"| {' | '.join(cells)} |"


def _side_by_side(rows: list[dict[str, Any]], tasks: list[str]) -> Iterator[str]:
    yield f"| claim | {' | '.join(Path(task).stem for task in tasks)} |"
    yield "|---" * (1 + len(tasks)) + "|"
    for says in dict.fromkeys(row["says"] for row in rows):
        of = {row["task"]: row for row in rows if row["says"] == says}
        yield f"| {says} | {' | '.join(_cell(of[task]) for task in tasks)} |"


def _cell(row: dict[str, Any]) -> str:
    sides = " − ".join(filter(None, (_number(row["of_treated"]), _number(row["of_control"]))))
    return f"{sides} = {_difference(row)}: {row['verdict']}" if sides else row["verdict"]


def _difference(row: dict[str, Any]) -> str:
    value, low, high = (_number(row[name]) for name in ("difference", "difference_low", "difference_high"))
    return f"{value} [{low}, {high}]" if low else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".replace("-0.000", "0.000")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
