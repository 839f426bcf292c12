"""Figures of adapters side by side: matrices of pairs, spectra, angles by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lora_lab.errors import OptionError
from lora_lab.plots import primitives
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import MOST, labels, name_axis, shortened
from lora_lab.plots.panels import Panels
from lora_lab.plots.primitives import Floats, Row
from lora_lab.results.result import Result, grouped

_RIGHT_ANGLE = np.pi / 2
_SIDES = "below the diagonal: column spaces; above: row spaces"


def draw(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Angles by layer of one pair; of more, the matrix of cosines."""
    several = any(len(result.summary["adapters"]) > 2 for result in results)
    layered = all(result.rows(level="layer") for result in results)
    return draw_matrix(results, panels) if several or not layered else draw_layers(results, panels)


def draw_matrix(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Cosines of ΔW between all adapters of each result, those that are alike beside each other.

    Adapters whose names do not fit below the columns are numbered.
    """
    tables = [_of_pairs(result, panels, "cosine", "cosine", 1.0) for result in results]
    return _heat(tables, panels, "cosine of ΔW", "", vmin=-1, vmax=1, cmap="PuOr")


def draw_overlaps(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Overlap of the column spaces below the diagonal, and of the row spaces above it."""
    tables = [_of_pairs(result, panels, "left_overlap", "right_overlap", 1.0) for result in results]
    return _heat(tables, panels, "overlap", _SIDES, vmin=0, vmax=1, cmap="viridis")


def draw_angles(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Mean angle between the column spaces below the diagonal, and between the row spaces above it."""
    tables = [_of_pairs(result, panels, "left_mean", "right_mean", 0.0) for result in results]
    return _heat(tables, panels, "mean angle (rad)", _SIDES, vmin=0, vmax=_RIGHT_ANGLE, cmap="viridis_r")


def _heat(
    tables: Sequence[tuple[list[str], list[str], Floats]], panels: Panels, label: str, caption: str, **look: Any
) -> list[Axes]:
    axes, _ = panels.matrices([rows for rows, *_ in tables])
    for ax, (rows, below, table) in zip(axes, tables, strict=True):
        image = primitives.heat(ax, table, rows, below, **look)
    panels.colour_bar(axes, image, label)
    if caption:
        panels.caption(axes[0], caption)
    return axes


def draw_spectra(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Singular values of every adapter over their place, as root mean squares over the modules."""
    rows = [row for result in results for row in result.summary["parts"] if row["level"] == "total"]
    (ax,) = panels.grid(1, 1, 2.4)
    for i, (name, row) in enumerate(zip(plot_style.in_legend([row["adapter"] for row in rows]), rows, strict=True)):
        values = np.array([value for value in row["spectrum"] if value])  # they fall, and 0 has no place on the axis
        primitives.curve(ax, np.arange(1, len(values) + 1), (values, values, values), label=name, **plot_style.look(i))
    if any(value for row in rows for value in row["spectrum"]):
        ax.set_yscale("log")
    ax.set_xlabel("place among the singular values")
    ax.set_ylabel("singular value (r.m.s.)")
    panels.legend(ax)
    return [ax]


def draw_layers(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Mean principal angle between column spaces and between row spaces, layer by layer, a line a pair."""
    pairs = [pair for result in results for pair in grouped(result.rows(level="layer"), "first", "second")]
    if not pairs:
        raise OptionError("these adapters were not compared by layer, or have none")
    layers = list(dict.fromkeys(row["group"] for _, rows in pairs for row in rows))
    axes = panels.grid(2, 1 if panels.single else 2, 3.6 if panels.single else 2.4)
    names = _pair_names([(head["first"], head["second"]) for head, _ in pairs])
    looks = [plot_style.look(i) for i in range(len(pairs))] if names else [plot_style.one_of_many()] * len(pairs)
    for ax, side, title in zip(axes, ("left", "right"), ("column spaces", "row spaces"), strict=True):
        for i, (_, rows) in enumerate(pairs):
            values = _by_layer(rows, layers, f"{side}_mean")
            look = {**looks[i], "label": names[i]} if names else looks[i]
            primitives.curve(ax, np.arange(len(layers)), (values, values, values), **look)
        ax.axhline(_RIGHT_ANGLE, color="#555555", linestyle=":", linewidth=0.8, zorder=1)
        ax.set_ylim(0, 1.05 * _RIGHT_ANGLE)
        name_axis(ax.xaxis, labels(layers))
        panels.title(ax, title)
    for ax in axes if panels.single else axes[:1]:
        ax.set_ylabel("mean angle (rad)")
    for ax in axes[1:] if panels.single else axes:
        ax.set_xlabel("layer")
    if names:
        panels.legend(axes[0], columns=1 if panels.single else 2)
    panels.caption(axes[0], "dotted: a right angle" + ("" if names else f"; {len(pairs)} pairs, a line each"))
    return axes


_LIKENESS = {"cosine": "cosine of ΔW", "left_overlap": "overlap, columns", "right_overlap": "overlap, rows"}
"""Columns of a pair that are 1 of two equal ones → what they are called."""
_APART = {"distance": "‖ΔW₁ − ΔW₂‖"}


def draw_groups(results: Sequence[Result], panels: Panels) -> list[Axes]:
    """Cosines, overlaps of subspaces and distances of pairs, as means with their spread over the pairs of a group.

    Groups are pairs of the same two methods, apart where they share their initial A.
    """
    groups = _pair_groups(results)
    height = 1.0 + 0.13 * len(groups) * len(_LIKENESS)
    ratios = [len(_LIKENESS), len(_APART)] if panels.single else None
    axes = panels.grid(2, 1 if panels.single else 2, 1.4 * height if panels.single else height, ratios)
    for ax, (names, label) in zip(axes, ((_LIKENESS, "mean"), (_APART, "mean distance")), strict=True):
        bands = {name: _bands(rows, list(names)) for name, rows in groups.items()}
        primitives.named_bars(ax, bands, list(names.values()), label, horizontal=True)
        ax.axvline(0, color="#555555", linewidth=0.6, zorder=1)
    panels.legend(axes[0], columns=1 if panels.single else 2)
    counts = ", ".join(str(len(rows)) for rows in groups.values())
    chance = [_chance([row for rows in groups.values() for row in rows], side) for side in ("left", "right")]
    said = f"bars: ±1 s.d. over {counts} pairs; overlap of random column spaces {chance[0]}, of row spaces {chance[1]}"
    panels.caption(axes[0], said)
    return axes


def _pair_groups(results: Sequence[Result]) -> dict[str, list[Row]]:
    """Pairs by their two methods, as far as there are colours, and by whether they share their initial A."""
    pairs: list[tuple[str, Row]] = []
    for result in results:
        adapters = [(each["adapter"], each.get("method")) for each in result.summary["adapters"]]
        methods = [None if method == name else method for name, method in adapters]  # which is not recorded
        for row in result.rows(level="total"):
            both = sorted({methods[i] for i in row["indices"]}, key=methods.index)
            name = "pairs" if None in both else " – ".join(plot_style.method_name(method) for method in both)
            pairs.append((name, row))
    if not pairs:
        raise OptionError("one adapter has no pairs")
    many = 2 * len({name for name, _ in pairs}) > plot_style.FEW
    groups: dict[str, list[Row]] = {}
    for name, pair in pairs:
        start = "same initial A" if pair["A_shared"] else "different initial A"
        groups.setdefault(f"{'pairs' if many else name}, {start}", []).append(pair)
    return groups


def _bands(rows: Sequence[Row], keys: Sequence[str]) -> primitives.Band:
    """Mean and spread of each column over the rows that have it."""
    value, low, high = zip(
        *(primitives.band([[row for row in rows if row[key] is not None]], key) for key in keys), strict=True
    )
    return np.concatenate(value), np.concatenate(low), np.concatenate(high)


def _chance(rows: Sequence[Row], side: str) -> str:
    """The overlap that random subspaces of the same sizes have, on average over pairs."""
    each = [row[f"{side}_overlap"] / row[f"{side}_over_chance"] for row in rows if row[f"{side}_over_chance"]]
    return f"{np.mean(each):.2g}" if each else "–"


def _pair_names(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What a legend calls the pairs; nothing of more than have a colour of their own."""
    if len(pairs) > plot_style.FEW:
        return []
    short = iter(shortened([name for pair in pairs for name in pair], MOST // 2))
    return [f"{next(short)} – {next(short)}" for _ in pairs]


def _by_layer(rows: Sequence[Row], layers: Sequence[str], key: str) -> Floats:
    values = {row["group"]: row[key] for row in rows}
    return np.array([values.get(layer) for layer in layers], dtype=float)


def _of_pairs(
    result: Result, panels: Panels, below: str, above: str, own: float
) -> tuple[list[str], list[str], Floats]:
    """Names beside the rows and below the columns, and one number of every pair below the diagonal and one above it.

    Adapters stand in the order of likeness; `own` is on the diagonal.
    """
    order = result.summary["order"]
    known = [one["adapter"] for one in result.summary["adapters"]]
    rows, columns = panels.both_ways([known[i] for i in order])
    place = {adapter: at for at, adapter in enumerate(order)}
    table = np.eye(len(rows)) * own
    for row in result.rows(level="total"):
        i, j = sorted(place[index] for index in row["indices"])
        table[j, i], table[i, j] = (np.nan if row[key] is None else row[key] for key in (below, above))
    return rows, columns, table
