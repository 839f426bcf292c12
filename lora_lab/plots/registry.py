"""Results as figures ready for a paper. Nothing is computed here that the results do not hold, and torch stays out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine

from lora_lab import files
from lora_lab.errors import LoraLabError, OptionError, shorten, unknown
from lora_lab.escape import drawn
from lora_lab.files.ownership import MARK
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import tick_size
from lora_lab.plots.panels import Panels
from lora_lab.plots.sources import pgf as plot_pgf
from lora_lab.plots.style import WIDTHS
from lora_lab.plots.views import claims as plot_claims
from lora_lab.plots.views import compare as plot_compare
from lora_lab.plots.views import merges as plot_merges
from lora_lab.plots.views import metrics as plot_metrics
from lora_lab.plots.views import places as plot_places
from lora_lab.plots.views import shapley as plot_shapley
from lora_lab.plots.views import stability as plot_stability
from lora_lab.plots.views import sweep as plot_sweep
from lora_lab.plots.views import train as plot_train
from lora_lab.plots.views.lines import checkpoints as plot_checkpoints
from lora_lab.plots.views.lines import curve as plot_curve
from lora_lab.plots.views.lines import layerwise as plot_layerwise
from lora_lab.plots.views.lines import line as plot_line
from lora_lab.plots.views.lines import plane as plot_plane
from lora_lab.plots.views.lines import sharpness as plot_sharpness
from lora_lab.registry import Registry
from lora_lab.results.result import Result, fingerprint

_ENDS = {".pdf": b"%%EOF", ".png": b"IEND\xaeB`\x82", ".svg": b"</svg>", ".pgf": b"\\endgroup%"}
"""What files of figures end with, by what they are called."""


@dataclass(frozen=True)
class View:
    """One way to show results of a kind."""

    draw: Callable[[Sequence[Result], Panels], list[Axes]]
    """What draws results, their texts made harmless, and gives its panels in reading order."""
    kind: str
    """Of the results that it shows."""
    title: str
    """What is to be seen, in a few words."""
    shared: tuple[str, ...] = ("task", "split")
    """Parameters in which results must agree to share a figure."""

    def __call__(
        self,
        results: Result | Sequence[Result],
        ax: Axes | Sequence[Axes] | None = None,
        *,
        metric: str | None = None,
        width: str = "double",
    ) -> Any:
        """The Axes drawn on: one of a view with one panel, else a list in reading order.

        `metric` is another one of the results' metrics in place of the main one; views that show none do not change.
        `ax` is where to draw: Axes, in whose place the view's panels are laid out (of a grid, where they are several),
        or as many Axes as it has panels. Without, it is a figure of its own with a legend and a caption around.
        """
        if width not in WIDTHS:
            raise unknown("width", width, WIDTHS)
        axes = self.on([results] if isinstance(results, Result) else list(results), Panels(ax, width), metric)
        return axes[0] if len(axes) == 1 else axes

    def on(self, results: Sequence[Result], panels: Panels, metric: str | None = None) -> list[Axes]:
        """The Axes drawn on, in reading order, where `panels` lays them."""
        _agree(results, self.shared)
        with plot_style.styled(), _one_line(f"results of kind {self.kind!r} that lack what {self.title} shows"):
            shown = results if metric is None else [plot_metrics.showing(result, metric) for result in results]
            axes = self.draw([_drawn(result) for result in shown], panels)
            panels.lay_out(axes)
        return axes


def draw(
    results: Result | Sequence[Result],
    kind: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    *,
    metric: str | None = None,
    width: str = "double",
) -> Any:
    """Draw results of one kind, in their usual view or another one of PLOTS; the Axes (see `View`)."""
    results = [results] if isinstance(results, Result) else list(results)
    return view_of(results, kind)[1](results, ax, metric=metric, width=width)


def figure(
    results: Result | Sequence[Result], *, kind: str | None = None, metric: str | None = None, width: str = "double"
) -> Figure:
    """The figure of some results of one kind; `kind` chooses another view of them (see PLOTS), `metric` what it shows.

    Without it, that is their main metric. OptionError for a metric that they have not got.
    """
    return figure_and_caption(results, kind=kind, metric=metric, width=width)[0]


def figure_and_caption(
    results: Result | Sequence[Result],
    *,
    kind: str | None = None,
    metric: str | None = None,
    width: str = "double",
    captioned: bool = True,
) -> tuple[Figure, tuple[str, str]]:
    """The figure, and what is to be seen and on what it was measured: below it, too, where it is to be `captioned`."""
    results = [results] if isinstance(results, Result) else list(results)
    name, view = view_of(results, kind)
    if width not in WIDTHS:
        raise unknown("width", width, WIDTHS)
    panels = Panels(None, width, captioned=captioned)
    made: Any = view.on(results, panels, metric)[0].get_figure()
    made.set_gid(identity(results, name, width, metric, None if captioned else "without a caption"))
    with plot_style.styled(), _one_line("a figure that cannot be drawn"):
        lay_out(made)
    return made, (view.title, panels.said)


def lay_out(made: Figure) -> None:
    """Lay a figure out once and for all: a second layout would be a little different, and so would the files be."""
    if not isinstance(made.get_layout_engine(), PlaceHolderLayoutEngine):
        for ax in made.axes:  # how many ticks there is room for goes by it, and would go by the style of who saves it
            for axis in (ax.xaxis, ax.yaxis):
                if axis.get_scale() != "log":  # whose minor ticks carry labels of their own
                    axis.set_tick_params(labelsize=tick_size(axis))
        with plot_style.printed(made):
            made.draw_without_rendering()
        made.set_layout_engine("none")
        made.draw_without_rendering()  # whoever asks where things are means the screen


def view_of(results: Sequence[Result], kind: str | None) -> tuple[str, View]:
    """The name of the view that is asked for (None: the usual one), and the view; OptionError without one."""
    if not results:
        raise OptionError("no results to draw")
    kinds = sorted({result.kind for result in results})
    if len(kinds) > 1:
        raise OptionError(f"results of different kinds cannot share a figure: {shorten(kinds)}")
    names = [name for name, view in PLOTS.items() if view.kind == kinds[0]]
    if not names:
        raise OptionError(f"there is no figure for results of kind {kinds[0]!r}; there are: {', '.join(PLOTS)}")
    name = kind or kinds[0]
    if name not in names:
        raise unknown(f"figure of {kinds[0]} results", name, names)
    return name, PLOTS[name]


def _agree(results: Sequence[Result], names: Sequence[str]) -> None:
    """Only what was measured alike shares axes."""
    for name in names:
        values = [result.parameters.get(name) for result in results]
        if any(value != values[0] for value in values):
            different = shorten(dict.fromkeys(map(str, values)))
            raise OptionError(f"these results cannot share a figure: {name.replace('_', ' ')} is {different}")


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
    marked = identity(results, kind or results[0].kind, width).encode() in content
    return marked and content.rstrip().endswith(_ENDS.get(path.suffix, b""))


def identity(results: Sequence[Result], kind: str, width: str, *more: str | None) -> str:
    """What a figure says it was drawn from; when and where the numbers were computed is not part of it."""
    shown = [[result.kind, result.columns, result.parameters, result.summary] for result in results]
    style = [] if plot_style.in_use() == (plot_style.DEFAULT,) else [plot_style.in_use()]
    return marked([kind, width, shown, *style, *filter(None, more)])


def marked(content: Any) -> str:
    """The mark of a figure that was drawn from this."""
    return f"{MARK} {fingerprint(content)}"


def _drawn(result: Result) -> Result:
    """The result with its texts as matplotlib draws them just as they are."""
    columns, parameters, summary = map(drawn, (result.columns, result.parameters, result.summary))
    return replace(result, columns=columns, parameters=parameters, summary=summary)


def save(made: Figure, *paths: Path, force: bool = False) -> None:
    """Write a figure as .pdf, .png, .svg or .pgf (see pgf.py); equal figures give equal bytes."""
    for path in paths:
        if path.suffix not in _ENDS:
            raise OptionError(f"{path}: figures are written as {', '.join(_ENDS)}")
    files.refuse_existing(*paths, force=force)
    with plot_style.styled(), _one_line("a figure that cannot be drawn"):
        lay_out(made)
        made_of = {path: _content(made, path) for path in paths}  # all of them, or none
    for path, content in made_of.items():
        files.write_bytes(path, content)


def _content(made: Figure, path: Path) -> bytes:
    """The figure in the format that the path is called by."""
    identity = made.get_gid() or MARK
    if path.suffix == ".pgf":
        return plot_pgf.content(made, identity, path)
    buffer = io.BytesIO()
    made.savefig(buffer, format=path.suffix[1:], metadata=_metadata(path.suffix, identity))
    return buffer.getvalue()


def _metadata(ending: str, identity: str) -> dict[str, str | None]:
    """Who drew it and from what, where each format has a place for it; no date, so that equal figures stay equal."""
    formats: dict[str, dict[str, str | None]] = {
        ".pdf": {"Creator": MARK, "Keywords": identity, "CreationDate": None},
        ".png": {"Software": MARK, "Source": identity},
        ".svg": {"Creator": MARK, "Identifier": identity, "Date": None},
    }
    return formats[ending]


_ON_LINES = ("task", "split", "points")
_IN_GAMES = ("task", "split", "worth")
_ALONG_TRAINING = ("task", "split", "steps", "spaces", "keep")
_OF_MERGES = ("one_task", "split")

PLOTS = Registry(
    "figure",
    "lora_lab.plots",
    View,
    {
        "interpolate": View(plot_line.draw, "interpolate", "the main metric along lines, and ‖ΔW‖", _ON_LINES),
        "interpolate:matrix": View(plot_line.draw_matrix, "interpolate", "barriers between all adapters", _ON_LINES),
        "interpolate:ratios": View(plot_line.draw_ratios, "interpolate", "the main metric of mixtures", _ON_LINES),
        "plane": View(plot_plane.draw, "plane", "metrics on the plane through three points"),
        "layerwise": View(plot_layerwise.draw, "layerwise", "barriers of single layers", ("task", "split", "players")),
        "curve": View(plot_curve.draw, "curve", "the main metric along curves and lines, and ‖ΔW‖", _ON_LINES),
        "curve:arc": View(plot_curve.draw_arc, "curve", "the same along their length", _ON_LINES),
        "checkpoints": View(
            plot_checkpoints.draw, "checkpoints", "the main metric along training, and p(t)", _ALONG_TRAINING
        ),
        "shapley": View(plot_shapley.draw, "shapley", "Shapley values", _IN_GAMES),
        "shapley:bars": View(plot_shapley.draw_bars, "shapley", "values with their intervals", _IN_GAMES),
        "shapley:heatmap": View(plot_shapley.draw_heatmap, "shapley", "values by type and layer", _IN_GAMES),
        "shapley:convergence": View(
            plot_shapley.draw_convergence, "shapley", "standard errors over the coalitions", _IN_GAMES
        ),
        "shapley:interactions": View(plot_shapley.draw_interactions, "shapley", "pairwise interactions", _IN_GAMES),
        "sharpness": View(plot_sharpness.draw, "sharpness", "largest eigenvalues and traces of the Hessian"),
        "sharpness:rates": View(
            plot_sharpness.draw_rates, "sharpness", "learning rates predicted as stable against those tried"
        ),
        "stability": View(plot_stability.draw, "stability", "the main metric over the share of players kept"),
        "stability:p": View(plot_stability.draw_p, "stability", "the same over the probability of keeping them"),
        "stability:leave-one-out": View(
            plot_stability.draw_leave_one_out, "stability", "the main metric without each player, and with it alone"
        ),
        "sweep": View(plot_sweep.draw, "sweep", "accuracy after all kinds of pruning"),
        "sweep:structured": View(plot_sweep.draw_structured, "sweep", "accuracy of patterns"),
        "sweep:unstructured": View(plot_sweep.draw_unstructured, "sweep", "accuracy over sparsity"),
        "sweep:rank": View(plot_sweep.draw_rank, "sweep", "accuracy over the rank kept"),
        "compare": View(plot_compare.draw, "compare", "how alike the adapters are", ()),
        "compare:matrix": View(plot_compare.draw_matrix, "compare", "cosines of ΔW between all adapters", ()),
        "compare:overlap": View(plot_compare.draw_overlaps, "compare", "overlap of subspaces of all adapters", ()),
        "compare:angles": View(plot_compare.draw_angles, "compare", "angles between subspaces of all adapters", ()),
        "compare:groups": View(
            plot_compare.draw_groups, "compare", "cosines, overlaps and distances of groups of pairs", ()
        ),
        "compare:map": View(plot_places.draw_map, "compare", "adapters as points, and the base where they began", ()),
        "compare:base": View(plot_places.draw_inside, "compare", "intruders, and ΔW in the base, by layer", ()),
        "compare:forecast": View(plot_places.draw_forecast, "compare", "how well pairs tell what merges lose", ()),
        "compare:spectra": View(plot_compare.draw_spectra, "compare", "singular values of every adapter", ()),
        "compare:layers": View(plot_compare.draw_layers, "compare", "angles between subspaces by layer", ()),
        "compare-merges": View(
            plot_merges.draw, "compare-merges", "all merges, and curves over the coefficient", _OF_MERGES
        ),
        "compare-merges:bars": View(
            plot_merges.draw_bars, "compare-merges", "all merges at their chosen coefficients", _OF_MERGES
        ),
        "compare-merges:tasks": View(plot_merges.draw_tasks, "compare-merges", "every task by its metric", _OF_MERGES),
        "compare-merges:coefficients": View(
            plot_merges.draw_coefficients, "compare-merges", "the metric over the coefficient", _OF_MERGES
        ),
        "compare-merges:ratios": View(
            plot_merges.draw_ratios, "compare-merges", "the metric over the ratios of seeds", _OF_MERGES
        ),
        "reproduce": View(
            plot_claims.draw, "reproduce", "differences that claims are about, and verdicts", ("testbed",)
        ),
        "train": View(plot_train.draw, "train", "p(t), masks and loss", ()),
        "tuning": View(plot_train.draw_tuning, "tuning", "accuracy over the settings tried", ("task", "criterion")),
    },
)
"""Kind of result, and after a colon the view → how it is drawn."""
