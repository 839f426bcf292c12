"""A bar with the time left, on a terminal and in notebooks, gone when the work is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_lab.escape import visible

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """What to call with (pieces done, pieces in all); shown on `console`, by default on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as shown:
        row = shown.add_task(visible(what), total=None)

        def report(done: int, total: int) -> None:
            shown.update(row, completed=done, total=total)

        yield report
