"""`lora-lab report`: every result of a folder as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lora_lab.cli.terminal import messages, progress, size
from lora_lab.options import option


@dataclass(frozen=True)
class Page:
    """The page that is written."""

    output: Path = option(Path("report.html"), "The page to write.", flag="o output")
    title: str | None = option(None, "Its title; by default the name of the folder.")
    rows: int = option(500, "Rows of each table that are in the page; how many there are is told.", least=1)
    force: bool = option(False, "Replace an earlier page.")


def command(
    places: Annotated[list[Path], typer.Argument(help="Folders, with all results below them, or result files.")],
    page: Page,
) -> None:
    """Write one HTML page of all results in a folder: figures, tables, parameters, provenance, commands.

    The page is a single file that loads nothing from elsewhere, for any browser, on screen (light or dark) and on
    paper. Values are shown where the pointer is; tables can be sorted and filtered. Nothing is computed. JSON files
    of other programs are left out; results that are damaged are named.

    Example:  lora-lab report out -o report.html
    """
    from lora_lab import pages

    with progress("drawing results") as shown:
        path = pages.save(places, page.output, title=page.title, rows=page.rows, force=page.force, progress=shown)
    messages.print(f"wrote {path} ({size(path.stat().st_size)})")
