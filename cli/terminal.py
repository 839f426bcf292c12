"""What is printed: tables, lines, bars, JSON; control characters of names from files are shown as escapes."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from lora_lab.escape import visible, visible_json, visible_stream
from lora_lab.forecast import Forecast
from lora_lab.progress import bar, duration
from lora_lab.progress import size as size
from lora_lab.shortening import told_apart


class Visible:
    """A stream whose texts pass through `visible_stream`; rich, which escapes by itself, writes to the stream below."""

    def __init__(self, stream: IO[str]) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write the text, escaped; as many characters as were given count as written."""
        self.rich_proxied_file.write(visible_stream(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write texts one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Standard output and error escape what they are given within the context."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Visible(before[0]), Visible(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Plain(Console):
    """A console without markup or emoji, since brackets and colons in names mean nothing; lines are printed escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, highlight=False, soft_wrap=True, markup=False, emoji=False)

    @property  # type: ignore[misc]  # rich's can be set, too
    def file(self) -> IO[str]:
        """The stream below; while a bar is shown, rich has put one of its own before it."""
        found = super().file
        while isinstance(found, Visible):
            found = found.rich_proxied_file
        return found

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with texts on one line."""
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)


# In a pipe or a file there is no width to keep to, and a cut table would lose numbers.
console = Plain(width=None if sys.stdout and sys.stdout.isatty() else 160)
messages = Plain(stderr=True)


def with_flags(text: str) -> str:
    """The library's names of options, in backticks, as the flags that they are here."""
    return re.sub(r"`([a-z_]+)`", lambda found: "--" + found[1].replace("_", "-"), text)


def say_written(paths: Iterable[Path]) -> None:
    """Name the files written, on standard error."""
    messages.print("wrote " + ", ".join(str(path) for path in paths))


def print_json(content: object) -> None:
    """Strict JSON on standard output."""
    from lora_lab.results.result import finite

    print(visible_json(json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)))


_LEAST = 40
"""Characters of a name that a table always has room for."""


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1) -> None:
    """A table on standard output; the first column (or so many) is text, the others are set right.

    Where it is wider than the terminal, long names among the texts lose their middle before anything is folded.
    """
    cells = [[visible(cell) if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    shown = _table(title, headings, cells, texts)
    over = console.measure(shown, options=console.options.update(max_width=_WIDE)).maximum - console.width
    names = {cell for row in cells for cell in row[:texts] if len(cell) > _LEAST and " " not in cell}
    if over > 0 and names:
        room = max(_LEAST, max(map(len, names)) - -(-over // texts))
        short = dict(zip(names, told_apart(list(names), room), strict=True))
        shown = _table(title, headings, [[short.get(cell, cell) for cell in row] for row in cells], texts)
    console.print(shown)


_WIDE = 10_000
_SENTENCE = 30
"""Characters of a text with spaces that a table may set in several lines, though it breaks no other."""


def _whole(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> set[int]:
    """Columns that a table need not break for its others to have room: all but sentences, or all without spaces."""
    columns = list(zip(headings, *rows, strict=True))
    words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    wide = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    for most in (_SENTENCE, 0):
        whole = {i for i, column in enumerate(columns) if not any(" " in c and len(c) > most for c in column[1:])}
        if sum(wide[i] if i in whole else words[i] for i in range(len(columns))) + 2 * len(columns) <= console.width:
            return whole
    return set()


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> Table:
    shown = Table(
        title=visible(title), title_justify="left", box=None, pad_edge=False, padding=(0, 1), header_style="bold"
    )
    heads = ["\n".join(map(visible, heading.split("\n"))) for heading in headings]
    whole = _whole(heads, rows)
    for i, heading in enumerate(heads):
        shown.add_column(heading, justify="left" if i < texts else "right", overflow="fold", no_wrap=i in whole)
    for row in rows:
        shown.add_row(*row)
    return shown


_LONG = 1e12
"""From which on a number is shown by its power of ten."""


def number(value: object, digits: int = 3) -> str:
    """A number for a table; – for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < _LONG else f"{value:.4g}"


def estimate(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval."""
    return number(value) if low is None else f"{number(value)} [{number(low)}, {number(high)}]"


def estimates(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Cells of a row with their intervals."""
    return [estimate(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in names]


def say_not_defined(result: Any) -> None:
    """What of behaviour beside the task a result does not tell, and why."""
    for line in result.parameters.get("not_defined", ()):
        console.print(line)


def in_words(metric: str) -> str:
    """The name of a metric as a heading has it."""
    return metric.replace("_", " ")


def foretell(what: str, expected: Forecast) -> None:
    """Tell what something will take, in one line, where that is much."""
    if expected.is_long:
        time = "" if expected.seconds is None else f", about {duration(expected.seconds)} of a core"
        if expected.passes:
            time += f", as much as {expected.passes:,.0f} forward passes of one example"
        messages.print(
            f"{what}: {expected.modules} modules, rank {expected.rank}, {size(expected.bytes)}{time}, "
            f"up to {size(expected.memory)} of memory"
        )


def progress(what: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """A bar with the time left, on standard error, gone when the work is done."""
    return bar(what, messages)
