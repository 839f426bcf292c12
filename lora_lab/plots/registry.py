"""Results as figures ready for a paper. Nothing is computed here that the results do not hold, and torch stays out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from lora_lab import files
from lora_lab.errors import LoraLabError, OptionError, some, unknown
from lora_lab.escape import drawn
from lora_lab.files.ownership import MARK
from lora_lab.plots import line as plot_line
from lora_lab.plots import merges as plot_merges
from lora_lab.plots import shapley as plot_shapley
from lora_lab.plots import stability as plot_stability
from lora_lab.plots import style as plot_style
from lora_lab.plots import sweep as plot_sweep
from lora_lab.plots import train as plot_train
from lora_lab.plots.style import WIDTHS
from lora_lab.results.result import Result, fingerprint

__all__ = ["PLOTS", "WIDTHS", "figure", "save", "shows"]

_FORMATS = (".pdf", ".png", ".svg")
_ENDS = {".pdf": b"%%EOF", ".png": b"IEND\xaeB`\x82", ".svg": b"</svg>"}


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
    with plot_style.styled(), _one_line(f"results of kind {kinds[0]!r} that lack what {chosen} shows"):
        made = PLOTS[chosen]([_drawn(result) for result in results], width)
    made.set_gid(_identity(results, chosen, width))
    return made


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What a drawing raises over numbers that are not as they were written, as this project's own error."""
    try:
        yield
    except LoraLabError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0]
        raise OptionError(f"{what} ({type(error).__name__}: {text[:200]})") from error


def shows(path: Path, results: Sequence[Result], *, kind: str | None = None, width: str = "double") -> bool:
    """Whether the file is, whole, the figure that `figure` draws of these results."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    marked = _identity(results, kind or results[0].kind, width).encode() in content
    return marked and content.rstrip().endswith(_ENDS.get(path.suffix, b""))


def _identity(results: Sequence[Result], kind: str, width: str) -> str:
    """What a figure says it was drawn from; when and where the numbers were computed is not part of it."""
    shown = [[result.kind, result.columns, result.parameters, result.summary] for result in results]
    return f"{MARK} {fingerprint([kind, width, shown])}"


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
    with plot_style.styled(), _one_line("a figure that cannot be drawn"):
        made.draw_without_rendering()
        made.set_layout_engine("none")  # the layout is done: every format gets this one
        for path in paths:
            buffer = io.BytesIO()
            made.savefig(buffer, format=path.suffix[1:], metadata=_metadata(path.suffix, made.get_gid() or MARK))
            files.write_bytes(path, buffer.getvalue())


def _metadata(ending: str, identity: str) -> dict[str, str | None]:
    """Who drew it and from what, where each format has a place for it; no date, so that equal figures stay equal."""
    formats: dict[str, dict[str, str | None]] = {
        ".pdf": {"Creator": MARK, "Keywords": identity, "CreationDate": None},
        ".png": {"Software": MARK, "Source": identity},
        ".svg": {"Creator": MARK, "Identifier": identity, "Date": None},
    }
    return formats[ending]


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
