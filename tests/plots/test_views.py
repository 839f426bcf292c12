"""Views draw where they are told, in the style that is in use, and stay readable at real sizes."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making_results import (
    checkpoints,
    compared,
    curve,
    layerwise,
    line,
    merges,
    plane,
    reproduce,
    run,
    shapley_result,
    sharpness,
    stability_result,
    sweep_result,
    tried_result,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lab import escape, plots
from lora_lab.errors import OptionError
from lora_lab.plots import names, primitives
from lora_lab.plots import style as plot_style
from lora_lab.results.result import Result, columns

LONG = [f"meta-llama_Llama-3.1-70B-Instruct-lora-r16-alpha32-domain-{i}" for i in range(9)]
MADE = {
    "train": run,
    "tuning": lambda: tried_result("coto", [(1e-3, [0.5, 0.6], False), (2e-3, [0.7, 0.8], True)]),
    "compare": compared,
    "compare-merges": merges,
    "interpolate": lambda: line(pairs=((0, 1), (0, 2)), ratios=("1:1",)),
    "plane": plane,
    "layerwise": layerwise,
    "checkpoints": checkpoints,
    "reproduce": reproduce,
    "sharpness": sharpness,
    "curve": curve,
    "shapley": lambda: shapley_result(interactions=True),
    "stability": stability_result,
    "sweep": sweep_result,
}


def made(name):
    seeds = ("0:1", "1:1") if name == "compare-merges:ratios" else (None,)
    return merges(ratios=seeds) if name.startswith("compare-merges") else MADE[name.partition(":")[0]]()


def flat(axes):
    return axes if isinstance(axes, list) else [axes]


@pytest.mark.parametrize("name", plots.PLOTS)
def test_every_view_draws_in_the_place_of_axes_and_on_as_many_axes_as_it_has_panels(name):
    result, view = made(name), plots.PLOTS[name]
    own = flat(view(result))
    assert all(isinstance(ax, Axes) for ax in own)
    figure = Figure(layout="constrained")
    here, other = figure.subplots(1, 2)
    inside = flat(plots.draw(result, name, here))
    assert len(inside) == len(own)
    assert all(ax.get_figure() is figure for ax in inside)
    assert not other.has_data()
    assert not figure.legends
    assert not figure.get_supxlabel()
    given = Figure().subplots(1, len(own), squeeze=False).ravel()
    assert flat(view([result], given)) == list(given)
    for mine, theirs in zip(own, given, strict=True):
        assert [list(line.get_ydata()) for line in mine.lines] == [list(line.get_ydata()) for line in theirs.lines]


def test_axes_of_another_number_and_axes_outside_of_a_grid_are_refused():
    with pytest.raises(OptionError, match="2 panels do not fit on 3 axes: as many are needed, or one of a grid"):
        plots.draw(stability_result(), None, Figure().subplots(3))
    with pytest.raises(OptionError, match="one of a grid"):
        plots.draw(stability_result(), None, Figure().add_axes((0, 0, 1, 1)))


def test_a_figure_is_the_axes_of_its_view_on_a_page():
    axes = plots.draw(shapley_result(players="layer"), "shapley:bars")
    figure = plots.figure(shapley_result(players="layer"), kind="shapley:bars")
    assert isinstance(axes, Axes)
    assert [bar.get_height() for bar in axes.patches] == [bar.get_height() for bar in figure.axes[0].patches]


def test_a_view_of_ones_own_is_drawn_as_the_others_are():
    def points(results, panels):
        (ax,) = panels.grid(1, 1, 2)
        ax.plot([row["x"] for row in results[0].rows()], label=results[0].parameters["name"])
        panels.legend(ax)
        return [ax]

    plots.PLOTS.register("demo", plots.View(points, "demo", "points", ()))
    try:
        result = Result("demo", {"x": [1, 2, 3]}, {"name": "$a_b$"})
        figure = plots.figure(result)
        assert list(figure.axes[0].lines[0].get_ydata()) == [1, 2, 3]
        assert figure.legends[0].get_texts()[0].get_text() == r"\$a_b\$"
        with pytest.raises(OptionError, match=r"results of kind 'demo' that lack what points shows .KeyError"):
            plots.figure(Result("demo", {"x": [1]}))
    finally:
        del plots.PLOTS.entries["demo"]


@pytest.mark.parametrize("make", [shapley_result, stability_result, sweep_result])
def test_only_what_was_measured_alike_shares_axes(make):
    one = make()
    other = Result(one.kind, one.columns, {**one.parameters, "split": "validation"}, one.summary, one.provenance)
    with pytest.raises(OptionError, match="cannot share a figure: split is test, validation"):
        plots.figure([one, other])


def test_the_style_can_be_switched_and_comes_back(tmp_path):
    def colour():
        return matplotlib.colors.to_hex(plots.draw(sweep_result(), "sweep:structured").patches[0].get_facecolor())

    sheet = tmp_path / "red.mplstyle"
    sheet.write_text("axes.prop_cycle: cycler('color', ['ff0000', '00ff00'])\nfont.size: 13\n")
    before = plots.figure(sweep_result()).get_gid()
    assert colour() == "#0072b2"
    with plots.use("lora-lab", sheet):
        assert colour() == "#ff0000"
        assert plots.figure(sweep_result()).get_gid() != before
        with plots.use("ggplot"):
            assert colour() == "#e24a33"
        assert colour() == "#ff0000"
    assert colour() == "#0072b2"
    assert plots.figure(sweep_result()).get_gid() == before
    with pytest.raises(OptionError, match=r"unknown style 'ggplt' .did you mean 'ggplot'"):
        plots.use("ggplt")
    plots.use("ggplot")
    try:
        assert colour() == "#e24a33"
    finally:
        plots.use()
    assert colour() == "#0072b2"


def test_no_two_of_many_groups_look_alike(tmp_path):
    six = tmp_path / "six.mplstyle"
    six.write_text(f"axes.prop_cycle: cycler('color', {[f'{red}0a0b0' for red in '13579b']})\n")
    for style in ("lora-lab", "tableau-colorblind10", six):  # 7, 10 and 6 colours
        with plots.use(style), plot_style.styled():
            looks = [tuple(plot_style.look(place).values())[:2] for place in range(42)]
            bars = [tuple(plot_style.bar_look(place).values())[:2] for place in range(42)]
        assert len(set(looks)) == len(set(bars)) == 42


def test_names_are_shortened_only_as_far_as_they_stay_different():
    assert names.shortened(["a", "b"]) == ["a", "b"]
    short = names.shortened(LONG)
    assert short == [f"meta-llam…6-alpha32-domain-{i}" for i in range(9)]
    assert max(map(len, short)) == 28
    both = [f"{'begin-' * 5}{i}{'-end' * 10}" for i in (7, 12, 100)]
    assert names.shortened([*both, "short"], 14) == ["begin…7…nd-end", "begin…12…d-end", "begi…100…d-end", "short"]
    middle = [f"{'x' * 30}{i}{'y' * 40}" for i in range(3)]
    assert len(set(names.shortened(middle))) == 3
    assert names.labels(["vit.layers.0", "vit.layers.1"]) == ["0", "1"]
    assert names.labels(["k_proj.0", "q_proj.0"]) == ["k_proj.0", "q_proj.0"]


@given(st.lists(st.text("ab-1$", min_size=1, max_size=30), min_size=1, max_size=6, unique=True), st.integers(6, 20))
def test_different_names_stay_different_however_short(different, most):
    short = names.shortened([escape.drawn(name) for name in different], most)
    assert len(set(short)) == len(different)


def test_a_band_is_the_interval_of_one_and_the_spread_of_several():
    one, other = {"x": 1.0, "x_low": 0.5, "x_high": 3.0}, {"x": 2.0}
    value, low, high = primitives.band([[one], [one, other], [], [other], [{"x": None}]], "x")
    assert value.tolist() == pytest.approx([1, 1.5, np.nan, 2, np.nan], nan_ok=True)
    assert low.tolist() == pytest.approx([0.5, 1.5 - 0.5**0.5, np.nan, 2, np.nan], nan_ok=True)
    assert high.tolist() == pytest.approx([3, 1.5 + 0.5**0.5, np.nan, 2, np.nan], nan_ok=True)


def test_pairs_of_long_names_keep_panels_and_titles_of_their_own():
    pairs = [(0, 1), (0, 2), (1, 2)]
    results = line(pairs=pairs)
    rows = [{**row, "method": f"{LONG[row['indices'][0]]} – {LONG[row['indices'][1]]}"} for row in results.rows()]
    figure = plots.figure(Result("interpolate", columns(rows), results.parameters, results.summary, {"examples": 500}))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[-1] == "norm"
    assert len(set(titles)) == 4
    assert all("\n" in title for title in titles[:3])
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
    assert all(ax.xaxis.label.get_text() == "t" for ax in figure.axes)


def test_many_runs_go_on_in_further_lines():
    figure = plots.figure([run("coto" if i % 2 else "lora") for i in range(9)])
    shown = [ax for ax in figure.axes if ax.axison]
    assert len(shown) == 27
    assert len({round(ax.get_position().x0, 2) for ax in shown[::3]}) == 5


def test_adapters_side_by_side_are_drawn_as_layers_of_one_pair_and_else_as_cosines_in_the_order_of_likeness():
    pair, three = compared(("a", "b"), layers=3), compared(("a", "b", "c"))
    left, right = plots.draw(pair)
    values = [row["left_mean"] for row in pair.rows(level="layer")]
    np.testing.assert_allclose(left.lines[0].get_ydata(), values)
    assert (left.get_title(), right.get_title()) == ("column spaces", "row spaces")
    shown = plots.draw(three).images[0].get_array()
    # c, b, a: of c, whose ΔW is 0, there is no cosine
    np.testing.assert_allclose(np.ma.filled(shown, np.nan), [[1, np.nan, np.nan], [np.nan, 1, 0.5], [np.nan, 0.5, 1]])
    spectrum = plots.draw(three, "compare:spectra").lines
    np.testing.assert_allclose(spectrum[0].get_ydata(), 1 / np.arange(1, 17))
    assert not len(spectrum[2].get_ydata())
    with pytest.raises(OptionError, match="not compared by layer"):
        plots.draw(compared(layers=0), "compare:layers")


def test_matrices_of_both_sides_have_columns_below_and_rows_above_the_diagonal():
    three = compared(("a", "b", "c"))
    shown = plots.draw(three, "compare:overlap").images[0].get_array()
    half, third = 1 / 4, 1 / 6  # of neighbours, and of a and c
    np.testing.assert_allclose(shown, [[1, half / 2, third / 2], [half, 1, half / 2], [third, half, 1]])
    angles = plots.draw(three, "compare:angles").images[0].get_array()
    assert (np.diag(angles) == 0).all()
    assert angles[1, 0] == angles[0, 1] == 1.57


def test_adapters_are_joined_to_the_base_that_they_began_from():
    few, many = compared(("a", "b", "c")), compared([f"s{i}" for i in range(12)])
    left, right = plots.draw(few, "compare:map")
    assert [ax.get_title() for ax in (left, right)] == ["principal components", "t-SNE"]
    points = [line.get_xydata()[0] for line in left.lines if line.get_marker() not in ("None", "+", "")]
    np.testing.assert_allclose(points, [(1, 0), (np.cos(1), np.sin(1)), (np.cos(2), 2 * np.sin(2))])
    lines = [line.get_xydata() for line in left.lines if line.get_marker() in ("None", "")]
    assert all((line[0] == 0).all() for line in lines)
    assert len(lines) == 3
    texts = [text.get_text() for text in plots.figure([many], kind="compare:map").legends[0].get_texts()]
    assert texts == ["an initial A of its own", "initial A 2", "initial A 1", "initial A 3"]
    few.summary["map"] = [{**row, "tsne_x": None} for row in few.summary["map"]]
    assert plots.draw(few, "compare:map").get_title() == "principal components"


def of_two_methods(count=8):
    names = [f"s{i}" for i in range(count)]
    result = compared(names, layers=0)
    result.summary["adapters"] = [{"adapter": name, "method": ("lora", "coto")[i % 2]} for i, name in enumerate(names)]
    return result


def test_many_adapters_of_known_methods_look_alike_by_method_and_the_caption_says_what_the_map_keeps():
    result = of_two_methods()
    result.summary["map_perplexity"] = 8 / 3
    figure = plots.figure(result, kind="compare:map")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "CoTo"]
    caption = " ".join(figure.get_supxlabel().split())
    assert "show 75% of the squared distances" in caption
    assert "t-SNE of perplexity 2.67: who is near whom" in caption


def test_groups_of_pairs_are_means_with_their_spread_and_say_what_chance_is():
    result = of_two_methods()
    rows = result.rows(level="total")  # pairs that are an even number apart share their initial A, and their method
    figure = plots.figure(result, kind="compare:groups")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["LoRA – CoTo, different initial A", "LoRA, same initial A", "CoTo, same initial A"]
    left, right = figure.axes
    of_lora = [row for row in rows if row["indices"][0] % 2 == row["indices"][1] % 2 == 0]
    for ax, place, key in ((left, 3, "cosine"), (left, 4, "left_overlap"), (right, 1, "distance")):
        assert ax.patches[place].get_width() == pytest.approx(np.mean([row[key] for row in of_lora]))
    spread = np.std([row["distance"] for row in of_lora], ddof=1)
    (ends,) = [line.get_segments()[0] for line in right.collections[1:2]]
    assert np.ptp(ends[:, 0]) == pytest.approx(2 * spread)
    caption = " ".join(figure.get_supxlabel().split())
    assert "over 16, 6, 6 pairs; overlap of random column spaces 0.062, of row spaces 0.12" in caption


def test_pairs_of_unknown_methods_are_told_apart_by_where_they_began():
    figure = plots.figure(compared([f"s{i}" for i in range(9)]), kind="compare:groups")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["pairs, different initial A", "pairs, same initial A"]


def test_what_lies_in_a_base_is_drawn_by_layer_and_what_merges_lose_with_intervals():
    pair = compared(("a", "b"), layers=3)
    counts, shares = plots.draw(pair, "compare:base")
    np.testing.assert_allclose(counts.lines[1].get_ydata(), [0.2, 0.3, 0.4])
    np.testing.assert_allclose(shares.lines[1].get_ydata(), [1.5, 4 / 3, 5 / 4])
    ax = plots.draw(pair, "compare:forecast")
    assert [bar.get_width() for bar in ax.patches[:3]] == pytest.approx([0.5, 0.4, 0.3])
    assert [text.get_text() for text in ax.get_figure().legends[0].get_texts()] == ["average", "ties"]
    without = compared(("a", "b"), layers=0, merges=())
    for view, text in (("base", "in a base by layer"), ("forecast", "beside results of their merges")):
        with pytest.raises(OptionError, match=text):
            plots.draw(without, f"compare:{view}")


def test_planes_of_several_results_have_plain_numbers_beside_all_their_colour_bars():
    figure = plots.figure([plane(), plane(("c", "d", "base"))])
    figure.draw_without_rendering()
    beside = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    texts = [label.get_text() for ax in beside for label in ax.get_yticklabels()]
    assert len(beside) == 4
    assert all(math.isfinite(float(text)) for text in texts)  # no 2.47835 × 10⁻¹, and none empty


def test_claims_name_their_task_only_where_they_were_put_to_several():
    once = [reproduce(("midpoint",)), reproduce(("fusion",), ("digits/mod3, digits/mod5",))]
    (axes, *_) = plots.figure(once).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["midpoint  ›", "fusion  ›"]
    (axes, *_) = plots.figure([reproduce(("midpoint",), ("a/x", "b/y"))]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["midpoint, x  ›", "midpoint, y  ›"]
    (axes, *_) = plots.figure([reproduce(("midpoint",), ("a/x.toml", "b/x.toml"))]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["midpoint, a/x.toml  ›", "midpoint, b/x.toml  ›"]
