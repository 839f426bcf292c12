"""What is printed shows control characters of names from files as escapes: tables, lines, errors, logs of others."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console

from ..escape import visible, visible_stream


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
    sys.stdout, sys.stderr = Visible(before[0]), Visible(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Plain(Console):
    """A console without markup or emoji, since brackets and colons in names mean nothing; lines are printed escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, highlight=False, soft_wrap=True, markup=False, emoji=False)

    @property
    def file(self) -> IO[str]:
        """The stream below; while a bar is shown, rich has put one of its own before it."""
        found = super().file
        while isinstance(found, Visible):
            found = found.rich_proxied_file
        return found

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with texts on one line."""
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)
