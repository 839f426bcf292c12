"""The figure of claims fits a page, tells units, verdicts and tasks apart, and shows every row by its name."""

import json
from pathlib import Path

import numpy as np
import pytest
from making_results import long_names, reproduce
from test_sizes import axis_labels, faults

from lora_lab import plots
from lora_lab.plots.panels import PAGE
from lora_lab.plots.sources import script
from lora_lab.results.result import Result, columns

STORED = Path(__file__).parents[2] / "figures" / "results"
UNITS = ("accuracy", "accuracy", "accuracy", "", "s", "learning rate", "share", "")


def many(count, tasks=("data/fashion/rotation.toml", "data/fashion/rotated.toml"), names=None):
    """So many claims on each task, of eight units or statistics, more of one than of the others."""
    result = reproduce(names or [f"a-claim-of-usual-length-{i}" for i in range(count)], tasks)
    rows = [{**row, "unit": UNITS[i % 8], "statistic": f"statistic-{i % 5}"} for i, row in enumerate(result.rows())]
    return Result("reproduce", columns(rows), result.parameters, result.summary)


def stored(name, most):
    """The first claims of a stored result; more of them than a page holds are told of by `figure`."""
    result = Result.load(STORED / f"claims_{name}.json")
    return Result("reproduce", columns(result.rows()[:most]), result.parameters, result.summary)


MADE = {
    "digits": lambda: stored("digits", 50),
    "fashion": lambda: stored("fashion", 50),
    "one of each unit": lambda: many(8, ("digits/relabel",)),
    "sixty of one unit": lambda: reproduce([f"claim-{i}" for i in range(0, 240, 4)]),
    "names of sixty characters": lambda: many(0, names=long_names(12)),
}


@pytest.mark.parametrize("name", ["digits", "fashion", "text"])
def test_all_stored_claims_fit_a_page_on_two_columns(name):
    figure = plots.figure(Result.load(STORED / f"claims_{name}.json"))
    assert figure.get_figheight() <= PAGE + 1e-9
    assert not faults(figure)


@pytest.mark.parametrize("width", plots.WIDTHS)
@pytest.mark.parametrize("made", MADE)
def test_claims_of_all_sizes_fit_a_page_and_every_row_has_its_name(made, width):
    result = MADE[made]()
    figure = plots.figure(result, width=width)
    assert figure.get_figheight() <= PAGE + 1e-9
    assert not faults(figure)
    axes = [ax for ax in figure.axes if ax.axison]
    assert sum(len(axis_labels(ax.yaxis)) for ax in axes) == len(result.rows())
    for ax in axes:  # a name stands at the height of its difference
        values = sorted(y for line in ax.lines if line.get_marker() in "os^" for y in line.get_ydata())
        np.testing.assert_allclose(values, sorted(ax.get_yticks()))


def test_small_units_stand_beside_a_large_one():
    figure = plots.figure(stored("digits", 50))
    assert figure.get_figheight() < 7
    lefts = [round(ax.get_position().x0, 2) for ax in figure.axes]
    assert len(set(lefts)) == 2
    tops = {
        left: [ax.get_position().y1 for ax, x in zip(figure.axes, lefts, strict=True) if x == left] for left in lefts
    }
    first, second = (max(each) for each in tops.values())
    assert first == pytest.approx(second, abs=0.01)


def test_what_has_no_unit_shares_no_axis_with_another_statistic():
    result = many(32, ("digits/relabel",))
    axes = plots.figure(result).axes
    labels = [ax.get_xlabel() for ax in axes]
    assert set(labels) == {"Δ accuracy", "Δ s", "Δ share", "Δ learning rate", *(f"Δ statistic-{i}" for i in range(5))}
    assert len(labels) == len(set(labels))


def test_a_unit_that_goes_on_in_another_column_keeps_its_scale_and_the_tasks_of_a_claim_together():
    result = reproduce([f"claim-{4 * i}" for i in range(21)], ("x", "y", "z"))
    rows = [
        {**row, "unit": "accuracy", "difference_high": row["difference"] + 0.1 * (i > 60)}
        for i, row in enumerate(result.rows())
    ]
    parts = plots.figure(Result("reproduce", columns(rows), result.parameters, result.summary)).axes
    assert len(parts) == 3
    assert len({ax.get_xlim() for ax in parts}) == 1
    claims = [{label.get_text().partition(",")[0] for label in ax.get_yticklabels()} for ax in parts]
    assert sum(map(len, claims)) == len(set().union(*claims)) == 21


def test_verdicts_differ_in_marker_and_what_is_open_is_hollow():
    ax = plots.figure(Result.load(STORED / "claims_digits.json")).axes[0]
    looks = {
        name: (handle[0].get_marker(), handle[0].get_markerfacecolor())
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    assert list(looks) == ["holds", "does not hold", "cannot be told"]
    assert len({marker for marker, _ in looks.values()}) == 3
    assert [face == "white" for _, face in looks.values()] == [False, False, True]


def test_a_long_name_has_two_lines_and_breaks_before_its_task():
    result = reproduce(("against-stochastic-depth",), ("data/rotation.toml", "data/rotated.toml"))
    (ax,) = plots.figure(result, width="single").axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "against-stochastic-depth,\nrotation  ›",
        "against-stochastic-depth,\nrotated  ›",
    ]
    np.testing.assert_allclose(ax.get_yticks(), [1, 3])


def test_a_script_sets_names_of_units_where_the_figure_has_them(tmp_path):
    path = STORED / "claims_digits.json"
    result = Result.load(path)
    figure = plots.figure(result)
    script.save(tmp_path / "x.py", figure, [result], [path], title="x")
    scope = {"__file__": str(tmp_path / "x.py")}
    exec(compile((tmp_path / "x.py").read_text(), "x", "exec"), scope)
    redrawn = scope["fig"]
    for each in (figure, redrawn):
        each.set_dpi(300)
        each.draw_without_rendering()
    for mine, other in zip(figure.axes, redrawn.axes, strict=True):
        ends = [ax.xaxis.label.get_window_extent().extents for ax in (mine, other)]
        np.testing.assert_allclose(*ends, atol=6)
    assert json.loads(path.read_text())["kind"] == "reproduce"
