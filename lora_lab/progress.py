"""A bar with the time left, gone when the work is done; where there is no terminal, a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_lab.escape import visible

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """What to call with (pieces done, pieces in all); shown on `console`, by default on standard error.

    Where that is no terminal, a line is written every half minute.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _lines(what, console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        row = shown.add_task(visible(what), total=None)

        def report(done: int, total: int) -> None:
            shown.update(row, completed=done, total=total)

        yield report


_PAUSE = 30.0
"""Seconds between lines."""
_FEW = 10
"""Pieces of which the first takes long enough to tell what the others will."""


def _lines(what: str, console: Console) -> Callable[[int, int], None]:
    """What writes a line when the last one is old enough."""
    began = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _PAUSE:
            return
        last, spent = now, now - began
        # what the first piece took says little where it is one of many: until it was done, workers and models began
        known = done > 1 or (done == 1 and total <= _FEW)
        left = f", about {duration(spent * (total - done) / done)} left" if known else ""
        console.print(
            f"{visible(what)}: {done} of {total} after {duration(spent)}{left}", markup=False, highlight=False
        )

    return report


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """So many bytes, in the unit that suits them."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {units[power]}" if power else f"{count} bytes"
