"""`lora-lab figure`: draw results again, or several in one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import common


def command(
    results: Annotated[list[Path], typer.Argument(help="Result files of one kind; several are overlaid.")],
    output: Annotated[
        list[Path], typer.Option("-o", "--output", help="File to write: .pdf, .png or .svg (repeatable).")
    ],
    kind: Annotated[
        str | None,
        typer.Option(help="Another view of the results, e.g. interpolate:matrix (an unknown name lists all)."),
    ] = None,
    width: Annotated[
        str, typer.Option(help="single or double: the width of one or two conference columns.")
    ] = "double",
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Draw a figure for a paper from result files; nothing is computed and torch is not loaded.

    Example:  lora-lab figure lora/interpolate.json coto/interpolate.json -o line.pdf --width single
    """
    from .. import plots
    from ..results.result import Result

    plots.save(plots.figure([Result.load(path) for path in results], kind=kind, width=width), *output, force=force)
    common.say_written(output)
