"""Results as figures ready for a paper. Nothing is computed here that the results do not hold, and torch stays out."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from lora_lab import files, plot_line, plot_merges, plot_shapley, plot_stability, plot_style, plot_sweep, plot_train
from lora_lab.errors import OptionError, some, unknown
from lora_lab.escape import drawn
from lora_lab.plot_style import WIDTHS
from lora_lab.result import Result

__all__ = ["PLOTS", "WIDTHS", "figure", "save"]

_FORMATS = (".pdf", ".png", ".svg")


def figure(results: Sequence[Result], *, kind: str | None = None, width: str = "double") -> Figure:
    """The figure of some results of one kind; `kind` chooses another view of them (see PLOTS)."""
    if not results:
        raise OptionError("no results to draw")
    kinds = sorted({result.kind for result in results})
    if len(kinds) > 1:
        raise OptionError(f"results of different kinds cannot share a figure: {some(kinds)}")
    views = [name for name in PLOTS if name.partition(":")[0] == kinds[0]]
    chosen = kind or kinds[0]
    if not views:
        raise OptionError(f"there is no figure for results of kind {kinds[0]!r}; there are: {', '.join(PLOTS)}")
    if chosen not in views:
        raise unknown(f"figure of {kinds[0]} results", chosen, views)
    if width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    with plot_style.styled():
        return PLOTS[chosen]([_drawn(result) for result in results], width)


def _drawn(result: Result) -> Result:
    """The result with its texts as matplotlib draws them just as they are."""
    columns, parameters, summary = map(drawn, (result.columns, result.parameters, result.summary))
    return replace(result, columns=columns, parameters=parameters, summary=summary)


def save(made: Figure, *paths: Path, force: bool = False) -> None:
    """Write a figure as .pdf, .png or .svg; equal figures give equal bytes."""
    for path in paths:
        if path.suffix not in _FORMATS:
            raise OptionError(f"{path}: figures are written as {', '.join(_FORMATS)}")
    files.refuse_existing(*paths, force=force)
    with plot_style.styled():
        made.draw_without_rendering()
        made.set_layout_engine("none")  # the layout is done: every format gets this one
        for path in paths:
            buffer = io.BytesIO()
            dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}
            made.savefig(buffer, format=path.suffix[1:], metadata=dates[path.suffix])
            files.write_bytes(path, buffer.getvalue())


PLOTS: dict[str, Callable[[Sequence[Result], str], Figure]] = {
    "interpolate": plot_line.draw_accuracy,
    "interpolate:loss": plot_line.draw_loss,
    "interpolate:matrix": plot_line.draw_matrix,
    "interpolate:ratios": plot_line.draw_ratios,
    "shapley": plot_shapley.draw,
    "shapley:bars": plot_shapley.draw_bars,
    "shapley:heatmap": plot_shapley.draw_heatmap,
    "shapley:convergence": plot_shapley.draw_convergence,
    "shapley:interactions": plot_shapley.draw_interactions,
    "stability": plot_stability.draw,
    "stability:p": plot_stability.draw_p,
    "stability:leave-one-out": plot_stability.draw_leave_one_out,
    "sweep": plot_sweep.draw,
    "sweep:structured": plot_sweep.draw_structured,
    "sweep:unstructured": plot_sweep.draw_unstructured,
    "sweep:rank": plot_sweep.draw_rank,
    "compare-merges": plot_merges.draw,
    "compare-merges:bars": plot_merges.draw_bars,
    "compare-merges:coefficients": plot_merges.draw_coefficients,
    "compare-merges:ratios": plot_merges.draw_ratios,
    "train": plot_train.draw,
    "tuning": plot_train.draw_tuning,
}
"""Kind of result, and after a colon the view → function (results, width) → figure."""
