"""`lora-lab figure`: draw results again, several in one figure, and what belongs beside it in a paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from lora_lab.cli.terminal import messages, say_written
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.registry import Later

if TYPE_CHECKING:
    from lora_lab.results.result import Result


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and how wide."""

    output: list[Path] = option(
        ..., "File to write: .pdf, .png, .svg or .pgf, which needs TeX (repeatable).", flag="o output"
    )
    kind: list[str] | None = option(
        None,
        "Another view of the results; with --panel once for each of them, or for all. NAMES.",
        names=Later("lora_lab.plots.registry", "PLOTS"),
    )
    metric: str | None = option(None, "Another metric of the results than their main one.")
    width: str = option("double", "single or double: the width of one or two conference columns.")
    panel: bool = option(False, "A panel (a), (b), … for each result, of any kinds.")
    columns: int | None = option(
        None, "Panels side by side; by default 2 on the width double, 1 on single.", least=1, most=2
    )
    force: bool = option(False, "Replace existing files.")


@dataclass(frozen=True)
class Beside:
    """What a paper needs beside the figure."""

    help_panel: ClassVar = "For the paper"

    caption: Path | None = option(
        None, "Write the caption for LaTeX (.tex): what is drawn, n, intervals; the figure itself then has none."
    )
    notebook: Path | None = option(
        None, "Write a script (.py) or notebook (.ipynb) of plain matplotlib that draws the figure from the results."
    )


def command(
    results: Annotated[
        list[Path], typer.Argument(help="Result files of one kind, which are overlaid; with --panel of any kinds.")
    ],
    drawing: Drawing,
    beside: Beside,
) -> None:
    """Draw a figure for a paper from result files; nothing is computed and torch is not loaded.

    Fonts in PDF are TrueType, and text in SVG is text. Colours can be told apart by colour-blind readers, markers and
    dashes say them again in grey. With --notebook, everything can be changed by hand.

    Example:  lora-lab figure lora/interpolate.json coto/interpolate.json -o line.pdf --width single
    """
    from lora_lab import plots
    from lora_lab.files.disk import refuse_existing
    from lora_lab.plots import captions
    from lora_lab.plots.panels import PAGE
    from lora_lab.plots.sources import script
    from lora_lab.results.result import Result

    captions.check(beside.caption)
    script.check(beside.notebook)
    loaded = [Result.load(path) for path in results]
    more = [path for path in (beside.caption, beside.notebook) if path is not None]
    figure, said, fitting = _drawn(loaded, drawing, captioned=beside.caption is None)
    refuse_existing(*drawing.output, *more, force=drawing.force)
    plots.save(figure, *drawing.output, force=drawing.force)
    if (high := figure.get_figheight()) > PAGE + 0.05:
        fits = f"the first {fitting} of its panels fit one" if fitting else "fewer results fit one"
        if drawing.width == "single":
            fits += ", and more on --width double"
        messages.print(f"The figure is {high:.1f} inches high, and a page {PAGE:g}: {fits}")
    if beside.caption is not None:
        captions.save(beside.caption, said, force=drawing.force)
    if beside.notebook is not None:
        title = "; ".join(title for title, _ in said)
        script.save(beside.notebook, figure, loaded, results, title=title, force=drawing.force)
    say_written([*drawing.output, *more])


def _drawn(loaded: list[Result], drawing: Drawing, *, captioned: bool) -> tuple[Any, list[tuple[str, str]], int]:
    """The figure, what a caption says of each panel, and how many of several panels fit a page."""
    from lora_lab.plots.composing import Part, compose
    from lora_lab.plots.registry import figure_and_caption

    kinds: list[str | None] = [*(drawing.kind or ())]
    if not drawing.panel:
        if len(kinds) > 1 or drawing.columns:
            raise OptionError("several views, or columns, are those of panels: with --panel")
        kind = kinds[0] if kinds else None
        how: dict[str, Any] = {"metric": drawing.metric, "width": drawing.width, "captioned": captioned}
        figure, said = figure_and_caption(loaded, kind=kind, **how)
        return figure, [said], 0
    if len(kinds) not in (0, 1, len(loaded)):
        raise OptionError(
            f"--kind is given {len(kinds)} times for {len(loaded)} panels; once for each, or once for all"
        )
    views = kinds * len(loaded) if len(kinds) == 1 else kinds or [None] * len(loaded)
    parts = [Part([result], view, drawing.metric) for result, view in zip(loaded, views, strict=True)]
    composed = compose(parts, width=drawing.width, columns=drawing.columns)
    return composed.figure, composed.captions, composed.fitting
