"""Results shown, as what `import lora_lab as ll` gives: figures for papers, and one page of everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.api.given import Path_, Results, results_of
from lora_lab.options import checked
from lora_lab.progress import bar
from lora_lab.results.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
def figure(results: Results, kind: str | None = None, *, metric: str | None = None, width: str = "double") -> Figure:
    """The matplotlib figure of results (or their files) of one kind; `kind` is another view, `metric` what it shows."""
    from lora_lab import plots

    return plots.figure(results_of(results), kind=kind, metric=metric, width=width)


@checked
def report(
    results: Results,
    path: Path_,
    *,
    title: str | None = None,
    rows: int = 500,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """The HTML page `path` of all results in folders, files or at hand: figures, tables, parameters and origin.

    It is one file that loads nothing. At most `rows` of each table are in it. A warning names each damaged file.
    """
    from lora_lab import pages

    given: Any = results if isinstance(results, list | tuple) else [results]
    places = [each if isinstance(each, Result) else Path(each) for each in given]
    with bar("drawing results") as shown:
        more: Any = {"progress": shown} if progress else {}
        return pages.save(places, Path(path), title=title, rows=rows, force=force, **more)
