"""`lora-lab figure`: draw results again, or several in one figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options import option
from ..registry import Later
from .terminal import say_written


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and how wide."""

    output: list[Path] = option(..., "File to write: .pdf, .png or .svg (repeatable).", flag="o output")
    kind: str | None = option(
        None, "Another view of the results: NAMES.", names=Later("lora_lab.plots.registry", "PLOTS")
    )
    metric: str | None = option(None, "Another metric of the results than their main one.")
    width: str = option("double", "single or double: the width of one or two conference columns.")
    force: bool = option(False, "Replace existing files.")


def command(
    results: Annotated[list[Path], typer.Argument(help="Result files of one kind; several are overlaid.")],
    drawing: Drawing,
) -> None:
    """Draw a figure for a paper from result files; nothing is computed and torch is not loaded.

    Example:  lora-lab figure lora/interpolate.json coto/interpolate.json -o line.pdf --width single
    """
    from .. import plots
    from ..results.result import Result

    loaded = [Result.load(path) for path in results]
    drawn = plots.figure(loaded, kind=drawing.kind, metric=drawing.metric, width=drawing.width)
    plots.save(drawn, *drawing.output, force=drawing.force)
    say_written(drawing.output)
