"""Figures of merges: grouped bars, and accuracy over the coefficient or the ratio in small multiples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, more_for, name_axis, shortened
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Row
from lora_lab.progress import size
from lora_lab.results.result import Result, grouped
from lora_lab.results.rows import metrics_of

_ALONE = "alone"
_CHOSEN = "coefficients chosen on validation data"
_CURVES = ("task-arithmetic", "factor-average", "ties", "tsv")
"""What the main figure shows of the coefficients, where these were compared."""


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Bars of all merges at their chosen coefficients, and the coefficient curves of some; for seeds, their ratios."""
    if _one_task(results):
        return draw_ratios(results, panels)
    compared = list(dict.fromkeys(name for result in results for name in result.parameters["merges"]))
    names = ([name for name in _CURVES if name in compared] or compared)[: 2 if panels.single else 4]
    below = 2.0
    height = _bars_height(compared, panels, below)
    axes = panels.stack((1, len(names)), height + below, [height, below], sharey=True)
    _bars(axes[0], results, horizontal=panels.single)
    for i, (ax, name) in enumerate(zip(axes[1:], names, strict=True)):
        _coefficient_curve(ax, results, name, panels)
        if i:
            ax.tick_params(labelleft=False)
            ax.set_ylabel("")
    panels.legend(axes[0])
    panels.caption(axes[0], _caption(results, _CHOSEN))
    return axes


def draw_bars(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """What every merge keeps of the adapters alone at its chosen coefficient, grouped by training method."""
    if _one_task(results):
        raise OptionError("seeds of one task are drawn over their ratios: compare-merges:ratios")
    (ax,) = panels.grid(1, 1, _bars_height(_in_classes(results), panels))
    _bars(ax, results, horizontal=panels.single)
    panels.legend(ax)
    panels.caption(ax, _caption(results, _CHOSEN))
    return [ax]


def draw_tasks(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Every merge at its chosen coefficient on every task, a panel a task, by the metric of each."""
    rows = [row for result in results for row in result.rows() if row["chosen"]]
    tasks, names = list(dict.fromkeys(row["task"] for row in rows)), _in_classes(results)
    labels = {method: label for method, (label, _) in _looks(results).items()}
    lines = -(-len(tasks) // (2 if panels.single else 4))
    columns, rest = -(-len(tasks) // lines), 0.7 + 0.6 * lines
    height = rest + panels.line(lines * len(names), rest, max(0.2, 0.07 * len(labels))) * lines * len(names)
    axes = panels.grid(len(tasks), columns, height, sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        metric = next(name for name in _metrics(results) if any(row.get(name) is not None for row in of_task))
        values = {}
        for method, label in labels.items():
            places = [[r for r in of_task if (r["method"], r["merge"]) == (method, name)] for name in names]
            values[label] = primitives.band(places, metric)
        primitives.named_bars(ax, values, _with_sizes(results, names), _named([metric]), horizontal=True)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))  # short: panels stand close
        panels.title(ax, task)
    panels.legend(axes[0])
    panels.caption(axes[0], _caption(results, _CHOSEN))
    return axes


def draw_coefficients(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Mean validation accuracy over the coefficient, a panel for each merge."""
    return _multiples(results, panels, _coefficient_curve, _caption(results))


def draw_ratios(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Accuracy over the ratios in which seeds were merged, a panel for each merge."""
    if not _one_task(results):
        raise OptionError("these adapters are of several tasks; ratios are for seeds of one")
    return _multiples(results, panels, _ratio_curve, _caption(results, "as merged"))


def _multiples(
    results: Sequence[Result],
    panels: Panels,
    draw_one: Callable[[Axes, Sequence[Result], str, Panels], None],
    caption: str,
) -> list[Axes]:
    names = list(dict.fromkeys(name for result in results for name in _merged(result)))
    columns = panels.columns(len(names), 2 if panels.single else 4, 1.55)
    axes = panels.grid(len(names), columns, 0.7 + 1.55 * -(-len(names) // columns), sharey=True)
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        draw_one(ax, results, name, panels)
        if i % columns:
            ax.set_ylabel("")
        if i + columns < len(names):
            ax.set_xlabel("")
    panels.legend(axes[0])
    panels.caption(axes[0], caption)
    return axes


def _bars(ax: Axes, results: Sequence[Result], *, horizontal: bool) -> None:
    """One bar a merge and training method: the mean of the sets that have it; over it, what its nulls keep."""
    names = _in_classes(results)
    sets = [row for result in results for row in result.summary["sets"] if row["chosen"]]
    labels = {method: label for method, (label, _) in _looks(results).items()}
    values, (key, axis, whole) = {}, _kept(results)
    for method, label in labels.items():
        places = [[row for row in sets if (row["method"], row["merge"]) == (method, name)] for name in names]
        values[label] = primitives.band(places, key)
    primitives.named_bars(ax, values, _with_sizes(results, names), axis, horizontal=horizontal)
    for replaced, (label, color) in _NULLS.items():
        nulls = [row for result in results for row in result.summary.get("nulls", ()) if row["replaced"] == replaced]
        ranges = {labels[method]: _range(nulls, method, names) for method in labels}
        if nulls and whole:
            primitives.spans(ax, ranges, label, color, horizontal=horizontal)
    line = ax.axvline if horizontal else ax.axhline
    line(whole, color="#333333", linewidth=0.7, linestyle=":")
    across = ax.axhline if horizontal else ax.axvline
    for edge in _edges(results, names):
        across(edge - 0.5, color="#999999", linewidth=0.6)


def _kept(results: Sequence[Result]) -> tuple[str, str, int]:
    """What bars show of merges beside the adapters alone: a column, how its axis is named, and its value of no loss."""
    sets = [row for result in results for row in result.summary["sets"]]
    names = _metrics(results)
    if any(row["normalised"] is not None for row in sets):
        return "normalised", f"{_named(names)} / {_named(names)} alone", 1
    if any(row.get("lost") is not None for row in sets):
        return "lost", f"{_named(names)} worse than alone{_unit(results)}", 0
    raise OptionError(f"tasks judged by {', '.join(names)} have no mean over them; compare-merges:tasks draws each")


def _metrics(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in metrics_of(result.parameters)))


def _named(names: Sequence[str]) -> str:
    """One metric by its name; several are scores."""
    return names[0].replace("_", " ") if len(names) == 1 else "score"


def _unit(results: Sequence[Result]) -> str:
    units = {said["unit"] for result in results for said in metrics_of(result.parameters).values()}
    return f" ({units.pop()})" if len(units) == 1 and not units & {"", "share"} else ""


def _only_metric(results: Sequence[Result]) -> str:
    """The metric that all tasks are judged by; OptionError where there are several."""
    names = _metrics(results)
    if len(names) > 1:
        raise OptionError(f"tasks judged by {', '.join(names)} have no mean over them; compare-merges:tasks draws each")
    return names[0]


_NULLS = {"all": ("nulls in place of all", "#bbbbbb"), "others": ("nulls in place of the others", "#444444")}
"""What nulls stand for → the name of their band, and its colour."""


def _range(nulls: Sequence[Row], method: str | None, names: Sequence[str]) -> tuple[Any, Any]:
    """Of every merge, between which values 95 % of the draws of its nulls lie, of all kinds of nulls together."""
    ends = np.full((2, len(names)), np.nan)
    for i, name in enumerate(names):
        of_merge = [row for row in nulls if (row["method"], row["merge"]) == (method, name)]
        if of_merge:
            ends[:, i] = min(row["normalised_low"] for row in of_merge), max(row["normalised_high"] for row in of_merge)
    return ends[0], ends[1]


def _classes(results: Sequence[Result]) -> dict[str, Row]:
    """Merge → the first row of it, in the order of their classes: no merges, those of equal rank, those without a cut.

    Results from before there were classes have one.
    """
    found: dict[str, Row] = {}
    for row in (row for result in results for row in result.summary["by_method"]):
        if row["merge"] != _ALONE:
            found.setdefault(row["merge"], row)
    return dict(sorted(found.items(), key=lambda item: _ORDER.get(item[1].get("category"), 0)))


_ORDER: dict[str | None, int] = {"reference": 0, "equal rank": 1, "exact": 2}


def _in_classes(results: Sequence[Result]) -> list[str]:
    return list(_classes(results))


def _edges(results: Sequence[Result], names: Sequence[str]) -> list[int]:
    """Places at which another class begins."""
    classes = [row.get("category") for row in _classes(results).values()]
    return [i for i in range(1, len(names)) if classes[i] != classes[i - 1]]


def _with_sizes(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """The names, shortened; with the size of the file where it is not the one that most merges have."""
    rows, common = _classes(results), _common_size(results)
    said = [name.replace("ensemble of logits", "ensemble (logits)") for name in names]
    sizes = [rows[name].get("bytes") for name in names]
    ends = [f", {size(value)}" if value and value != common else "" for value in sizes]
    short = shortened(said, MOST - max(map(len, ends)))
    return [name + end for name, end in zip(short, ends, strict=True)]


def _common_size(results: Sequence[Result]) -> int | None:
    """The size that most of the merges have, in bytes."""
    sizes = [row["bytes"] for row in _classes(results).values() if row.get("category") == "equal rank"]
    return max(sizes, key=sizes.count) if sizes else None


def _bars_height(merges: Sequence[str], panels: Panels, below: float = 0.0) -> float:
    """Inches; `below` of them the page has for others."""
    if not panels.single:
        return 2.6 + more_for(merges)
    return 1.4 + panels.line(len(merges), 1.4 + below) * len(merges)


def _looks(results: Sequence[Result]) -> dict[str | None, tuple[str, dict[str, Any]]]:
    """Training method → label and look, in all panels."""
    methods = list(dict.fromkeys(row["method"] for result in results for row in result.summary["by_method"]))
    labels = plot_style.in_legend([plot_style.method_name(method) for method in methods])
    places = plot_style.places(labels)
    return {method: (label, plot_style.look(places[label])) for method, label in zip(methods, labels, strict=True)}


def _coefficient_curve(ax: Axes, results: Sequence[Result], name: str, panels: Panels) -> None:
    curves = [curve for result in results for curve in result.summary["curves"] if curve["merge"] == name]
    looks, metric = _looks(results), _only_metric(results)
    for head, members in grouped(curves, "method"):
        points: dict[float, list[Row]] = {}
        for member in members:
            for coefficient, value in zip(member["coefficient"], member[metric], strict=True):
                points.setdefault(coefficient, []).append({metric: value})
        coefficients = sorted(points)
        label, look = looks[head["method"]]
        values = primitives.band([points[each] for each in coefficients], metric)
        primitives.curve(ax, coefficients, values, alpha=0.14, label=label, **look)
    ax.set_xscale("log")
    most = 1.05 * max((curve["coefficient"][-1] for curve in curves), default=10)
    ticks = [tick for tick in (0.1, 0.3, 1, 3, 10) if tick <= most]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    panels.title(ax, name)
    ax.set_xlabel("coefficient")
    ax.set_ylabel(f"validation {_named([metric])}{_unit(results)}")


def _ratio_curve(ax: Axes, results: Sequence[Result], name: str, panels: Panels) -> None:
    """Accuracy at each ratio; where nothing is merged, that of the adapters alone."""
    sets = [row for result in results for row in result.summary["sets"] if row["merge"] in (name, _ALONE)]
    sets = [row for row in sets if row["coefficient"] in (None, 1.0)]
    ratios = list(dict.fromkeys(row["ratio"] for row in sets))
    looks, metric = _looks(results), _only_metric(results)
    for head, members in grouped(sets, "method"):
        label, look = looks[head["method"]]
        shown = [ratio for ratio in ratios if any(row["ratio"] == ratio for row in members)]
        places = []
        for ratio in shown:
            there = [row for row in members if row["ratio"] == ratio]
            places.append([row for row in there if row["merge"] == name] or there)
        values = primitives.band(places, metric)
        x = [ratios.index(ratio) for ratio in shown]
        primitives.curve(ax, x, values, alpha=0.14, label=label, **look)
    name_axis(ax.xaxis, [str(ratio) for ratio in ratios])
    panels.title(ax, name)
    ax.set_xlabel("ratio of the seeds")
    ax.set_ylabel(f"{_named([metric])}{_unit(results)}")


def _merged(result: Result) -> list[str]:
    left_out = {row["merge"] for row in result.summary["sets"]}
    return [name for name in result.parameters["merges"] if name in left_out]


def _one_task(results: Sequence[Result]) -> bool:
    return bool(results[0].parameters["one_task"])


def _caption(results: Sequence[Result], how: str | None = None) -> str:
    """`how`: what the test split was used for; None where only validation data is shown."""
    first = results[0]
    several = any(row["sets"] > 1 for result in results for row in result.summary["by_method"])
    over = "combinations of seeds" if _one_task(results) else "seeds"
    one = "95 % interval" if how else "one set of adapters"  # validation curves carry no interval
    band = f"±1 s.d. over {over}" if several else one
    names, n = first.parameters["task_names"], first.provenance.get("examples")
    where = names[0] if len(names) == 1 else f"{len(names)} tasks ({', '.join(names)})"
    split = f"{first.parameters['split']} split, n = {n}, {how}" if how else "validation split"
    return "; ".join([where, split, band, *_ranks(results), *_nulls(results), *_beginnings(results)])


def _ranks(results: Sequence[Result]) -> list[str]:
    """At which rank, and of which size, merges came back."""
    ranks = [row["rank"] for row in _classes(results).values() if row.get("category") == "equal rank"]
    common = _common_size(results)
    if not ranks or common is None:
        return ["merges without a cut"] if any(row.get("category") for row in _classes(results).values()) else []
    low, high = min(ranks), max(ranks)
    return [f"merges of rank {low if low == high else f'{low} to {high}'}, {size(common)}"]


def _nulls(results: Sequence[Result]) -> list[str]:
    """Which nulls the bands are of."""
    rows = [row for result in results for row in result.summary.get("nulls", ())]
    names = list(dict.fromkeys(row["null"] for row in rows))
    return [f"nulls: {', '.join(names)}, 95 % of {max(row['draws'] for row in rows)} draws"] if rows else []


def _beginnings(results: Sequence[Result]) -> list[str]:
    """Whether the adapters of a set began from one A; nothing where that is not known."""
    found = {row["shared"] for result in results for row in result.summary.get("shared_initial_A", [])}
    if found in ({True}, {False}):
        return ["adapters of a set share their initial A" if True in found else "adapters of separate initial A"]
    return ["some adapters share their initial A"] if True in found else []
