import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making_results import line, merges, run, shapley_result, stability_result, sweep_result, tried_result, with_nulls

from lora_lab import escape, plots
from lora_lab.errors import FileError, OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.names import inches, shortened
from lora_lab.plots.views import train as plot_train
from lora_lab.plots.views.lines import line as plot_line
from lora_lab.results.result import Result, columns
from lora_lab.training.schedule import Schedule

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "figures").glob("*.py"))


def test_curves_are_the_columns_with_their_intervals():
    t, (value, low, high) = plot_line.curves([line()], "accuracy")["LoRA"]["factors"]
    assert t == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert value == pytest.approx([0.9, 0.675, 0.6, 0.675, 0.9])
    assert value - low == pytest.approx([0.02] * 5)
    assert high - value == pytest.approx([0.02] * 5)


def test_several_pairs_give_mean_and_standard_deviation_also_over_results():
    one = plot_line.curves([line(pairs=((0, 1), (0, 2)))], "accuracy")["LoRA"]["factors"]
    two = plot_line.curves([line(depth=0.3), line(depth=0.4)], "accuracy")["LoRA"]["factors"]
    for _, (value, low, high) in (one, two):
        assert value[2] == pytest.approx(0.55)
        assert high[2] - value[2] == pytest.approx(np.std([0.6, 0.5], ddof=1))
        assert value[2] - low[2] == pytest.approx(high[2] - value[2])


def test_a_line_figure_draws_every_curve_and_says_what_its_bands_are():
    figure = plots.figure([line("lora"), line("coto", depth=0.1)])
    lora, coto, norm = figure.axes
    assert [ax.get_title() for ax in (lora, coto)] == ["LoRA", "CoTo"]
    assert norm.get_title() == "norm"
    assert lora.lines[0].get_ydata() == pytest.approx([0.9, 0.675, 0.6, 0.675, 0.9])
    assert coto.lines[0].get_ydata()[2] == pytest.approx(0.8)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    spaces = ["factors A, B averaged", "factors, ‖ΔW‖ matched", "ΔW averaged"]
    assert labels == [*spaces, "norm of LoRA", "norm of CoTo"]
    handles = figure.legends[0].legend_handles
    assert [handle.get_linestyle() for handle in handles[3:]] == ["-", "--"]
    assert [drawn.get_linestyle() for drawn in norm.lines[:6]] == ["-"] * 3 + ["--"] * 3
    assert figure.get_supxlabel() == "digits/relabel, test split, n = 500; bands: 95 % interval over examples"
    several = plots.figure([line(pairs=((0, 1), (1, 2)))])
    assert several.get_supxlabel().endswith("bands: ±1 s.d. over pairs")


def test_results_of_different_tasks_or_splits_do_not_share_a_figure():
    one = line()
    for name, value in (("task", {"name": "digits/mod3"}), ("split", "validation")):
        other = Result(one.kind, one.columns, {**one.parameters, name: value}, one.summary, one.provenance)
        with pytest.raises(OptionError, match=f"cannot share a figure: {name} is"):
            plots.figure([one, other])


def test_a_mixed_figure_says_whose_bands_are_what():
    caption = plots.figure([line("lora", pairs=((0, 1), (0, 2))), line("coto")]).get_supxlabel()
    assert caption.endswith("bands: LoRA ±1 s.d. over pairs, CoTo 95 % interval over examples")


def test_norms_above_those_of_the_ends_are_on_the_axes():
    result = line()
    rows = [{**row, "norm": row["norm"] * (6 if row["t"] == 0.5 else 1)} for row in result.rows()]
    figure = plots.figure([Result("interpolate", columns(rows), result.parameters, result.summary, result.provenance)])
    norms = figure.axes[-1]
    assert max(max(drawn.get_ydata()) for drawn in norms.lines) < norms.get_ylim()[1]


def test_the_panel_of_norms_treats_every_space_alike():
    spaces = ("factors", "matched", "one of my own")
    norms = plots.figure([line(spaces=spaces)]).axes[-1]
    labels = [drawn.get_label() for drawn in norms.lines]
    assert labels[:3] == [f"LoRA {space}" for space in spaces]


def test_the_matrix_is_of_the_first_space_that_all_results_have():
    first, second = line(spaces=("mine", "factors")), line("coto", spaces=("factors", "delta"), depth=0.2)
    one, other, bar = plots.figure([first, second], kind="interpolate:matrix").axes
    assert [ax.images[0].get_array()[0, 1] for ax in (one, other)] == pytest.approx([0.3, 0.2])
    assert " ".join(bar.get_ylabel().split()) == "accuracy barrier, factors A, B averaged"
    alone = plots.figure([line(spaces=("delta", "factors"))], kind="interpolate:matrix")
    assert " ".join(alone.axes[-1].get_ylabel().split()) == "accuracy barrier, ΔW averaged"
    with pytest.raises(OptionError, match="no space is in all of them"):
        plots.figure([line(spaces=("delta",)), line(spaces=("factors",))], kind="interpolate:matrix")


def test_a_line_without_norms_has_no_norm_panel():
    bare = line("coto", spaces=("factors",))
    rows = [{**row, "norm": None} for row in bare.rows()]
    figure = plots.figure([Result("interpolate", columns(rows), bare.parameters, bare.summary, bare.provenance)])
    assert len(figure.axes) == 1


def test_the_matrix_shows_every_barrier_twice_on_one_scale():
    figure = plots.figure([line(pairs=((0, 1), (0, 2), (1, 2))), line("coto")], kind="interpolate:matrix")
    first, second = figure.axes[:2]
    assert sorted(text.get_text() for text in first.texts) == ["0.30", "0.30", "0.40", "0.40", "0.50", "0.50"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 0.5)


def test_small_barriers_keep_their_digits():
    figure = plots.figure([line(pairs=((0, 1), (0, 2)), depth=0.002)], kind="interpolate:matrix")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == [
        "0.0",
        "0.0",
        "0.0020",
        "0.0020",
        "0.10",
        "0.10",
    ]


def test_a_space_that_is_not_built_in_has_a_look_of_its_own_and_may_bring_one():
    result = line(spaces=("factors", "mine", "yours", "delta"))
    result.parameters["looks"]["yours"] = {"label": "yours, averaged", "place": 3}
    looks = plot_line.space_looks([result])
    assert len({look["color"] for look in looks.values()}) == 4
    assert [looks[space]["label"] for space in ("mine", "yours")] == ["mine", "yours, averaged"]
    assert looks["yours"]["color"] == plot_style.look(3)["color"]
    result.parameters["looks"]["yours"]["place"] = 1  # that of factors
    assert len({look["color"] for look in plot_line.space_looks([result]).values()}) == 4


def test_a_method_that_is_not_built_in_does_not_look_like_one_that_is():
    places = plot_style.places(["mine", "LoRA", "yours", "CoTo"])
    assert places == {"LoRA": 0, "CoTo": 1, "mine": 2, "yours": 3}


def test_many_pairs_of_unknown_methods_are_drawn_together():
    result = line(pairs=[(i, j) for i in range(5) for j in range(i + 1, 5)])
    rows = [{**row, "method": f"a{row['indices'][0]} – a{row['indices'][1]}"} for row in result.rows()]
    many = Result("interpolate", columns(rows), result.parameters, result.summary, result.provenance)
    (pairs, norm) = plots.figure([many]).axes
    assert [pairs.get_title(), norm.get_title()] == ["all pairs", "norm"]
    assert pairs.lines[0].get_ydata()[2] == pytest.approx(0.9 - np.mean([0.3 + 0.1 * k for k in range(10)]))


def test_mixtures_show_each_combination_and_the_mean():
    figure = plots.figure([line(pairs=((0, 1), (0, 2)), ratios=("0:1", "1:1"))], kind="interpolate:ratios")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0:1", "1:1"]
    assert ax.lines[-1].get_ydata() == pytest.approx([0.805, 0.805])
    with pytest.raises(OptionError, match="these results hold no mixtures"):
        plots.figure([line()], kind="interpolate:ratios")


def test_a_training_figure_shows_the_masks_that_were_drawn():
    result = run()
    drawn = plot_train.masks(result)
    assert drawn.shape == (4, 40)
    assert (drawn[:, 7] == Schedule().mask(7, 40, 4, 0)).all()
    assert plot_train.full_from(result) == 30
    figure = plots.figure([result, run("lora")])
    top, _, middle, lora, *_ = figure.axes
    assert (middle.images[0].get_array() == drawn).all()
    assert lora.images[0].get_array().all()
    assert [text.get_text() for text in top.texts] == ["all on"]


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_runs_of_any_length_are_drawn(steps):
    figure = plots.figure([run(steps=steps)])
    assert len(figure.axes[2].lines[1].get_ydata()) == steps


def test_a_figure_overlays_methods_over_the_settings_and_leaves_gaps_where_one_diverged():
    lora = tried_result("lora", [(1e-3, [0.6, 0.8], True), (4e-3, [0.5, None], False)])
    coto = tried_result("coto", [(1e-3, [0.5, 0.5], False), (4e-3, [0.9, 0.7], True)])
    (ax,) = plots.figure([lora, coto]).axes
    lines = {container.get_label(): container[0] for container in ax.containers}
    assert list(lines) == ["LoRA", "CoTo"]
    assert lines["LoRA"].get_ydata() == pytest.approx([0.7, math.nan], nan_ok=True)
    assert lines["CoTo"].get_ydata() == pytest.approx([0.5, 0.8])
    rings = [line for line in ax.lines if line.get_markersize() == 9]
    assert [ring.get_xdata()[0] for ring in rings] == [1e-3, 4e-3]
    assert [ring.get_ydata()[0] for ring in rings] == pytest.approx([0.7, 0.8])
    assert ax.get_xscale() == "log"
    ranks = [tried_result("coto", [(1e-3, [0.5], False), (2e-3, [0.6], False)], rank=rank) for rank in (2, 4)]
    table = columns([row for each in ranks for row in each.rows()])
    both = Result("tuning", table, {**lora.parameters, "options": ["learning_rate", "rank"]})
    (ax,) = plots.figure([both]).axes
    assert [container.get_label() for container in ax.containers] == ["CoTo, rank 2", "CoTo, rank 4"]
    other = Result("tuning", coto.columns, {**coto.parameters, "task": {"name": "y"}})
    with pytest.raises(OptionError, match="cannot share a figure: task is"):
        plots.figure([lora, other])


def test_captions_name_tasks_of_files_too():
    assert plot_style.task_name({"name": "digits/relabel"}) == "digits/relabel"
    assert plot_style.task_name({"kind": "clip", "data": "x/birds.csv"}) == "clip, birds"
    assert plot_style.task_name({"kind": "clip", "data": {"train": "a.csv"}}) == "clip, a"
    result = line()
    result.parameters["task"] = {"kind": "clip", "data": "x/birds.csv"}
    assert "clip, birds" in plots.figure([result]).get_supxlabel()


@pytest.mark.parametrize("make", [line, shapley_result])
def test_files_embed_truetype_and_are_the_same_again(make, tmp_path):
    paths = [tmp_path / f"x.{ending}" for ending in ("pdf", "svg")]
    plots.save(plots.figure([make()], width="single"), *paths)
    content = paths[0].read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    again = plots.figure([make()], width="single")
    again.draw_without_rendering()  # on a screen, as often as one likes
    again.savefig(tmp_path / "screen.png")
    plots.save(again, tmp_path / "again.pdf")
    assert (tmp_path / "again.pdf").read_bytes() == content


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path):
    with pytest.raises(OptionError, match="different kinds cannot share a figure: interpolate, train"):
        plots.figure([line(), run()])
    with pytest.raises(OptionError, match=r"unknown width 'singel' .did you mean 'single'"):
        plots.figure([line()], width="singel")
    with pytest.raises(OptionError, match="did you mean 'interpolate:matrix'"):
        plots.figure([line()], kind="interpolate:matrxi")
    with pytest.raises(OptionError, match="there is no figure for results of kind 'evaluate'"):
        plots.figure([Result("evaluate", {})])
    with pytest.raises(OptionError, match="no results"):
        plots.figure([])
    with pytest.raises(OptionError, match=r"x.gif: figures are written as .pdf, .png, .svg, .pgf"):
        plots.save(plots.figure([line()]), tmp_path / "x.gif")
    (tmp_path / "x.pdf").write_text("old")
    with pytest.raises(FileError, match=r"x.pdf: exists already"):
        plots.save(plots.figure([line()]), tmp_path / "y.png", tmp_path / "x.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pdf"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder for every script's figures, and what went wrong with it; all are run in one process without torch.

    They are laid out, but not written: files are tested elsewhere.
    """
    folder = tmp_path_factory.mktemp("scripts")
    code = """if True:
        import pathlib, runpy, sys, traceback
        from matplotlib.figure import Figure
        Figure.savefig = lambda figure, *_, **__: figure.draw_without_rendering()
        folder, *scripts = sys.argv[1:]
        for script in map(pathlib.Path, scripts):
            place = pathlib.Path(folder, script.stem)
            place.mkdir()
            sys.argv, failure = ["x", str(place)], ""
            try:
                runpy.run_path(str(script))
                assert "torch" not in sys.modules
            except BaseException:
                failure = traceback.format_exc()
            place.with_suffix(".txt").write_text(failure)
    """
    subprocess.run([sys.executable, "-c", code, folder, *SCRIPTS], check=True)
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_of_the_paper_draws_without_torch(script, drawn):
    failure = (drawn / f"{script.stem}.txt").read_text()
    assert not failure, failure
    written = sorted(path.suffix for path in (drawn / script.stem).iterdir())
    assert written.count(".pdf") == written.count(".png") >= 1


def test_a_heat_map_holds_the_values_by_type_and_layer_under_one_colour_bar():
    figure = plots.figure([shapley_result()])
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in panels] == ["lora-s0", "coto-s0"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["q_proj", "k_proj", "fc1"]
    table = panels[1].images[0].get_array()
    assert table[0].tolist() == pytest.approx([0.21, 0.24, 0.27])  # q_proj of the second adapter
    for ax in panels:
        assert ax.images[0].get_clim() == (0, pytest.approx(0.28))
    assert len(figure.axes) == 3


def test_negative_contributions_get_a_diverging_map_around_zero():
    result = shapley_result()
    result.columns["value"][0] = -0.4
    image = plots.figure([result]).axes[0].images[0]
    assert image.norm(0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("width", plots.WIDTHS)
def test_both_signs_share_one_scale_and_the_bar_shows_what_there_is(width):
    result = shapley_result()
    result.columns["value"][:] = [0.012, -0.0004] * 9
    first, *_, bar = plots.figure([result], width=width).axes
    norm = first.images[0].norm
    assert norm(-0.0004) == pytest.approx(0.5 - 0.5 * 0.0004 / 0.012)
    assert norm(0.012) == pytest.approx(1)
    assert (bar.get_xlim() if width == "single" else bar.get_ylim()) == pytest.approx((-0.0004, 0.012))


def test_bars_show_values_and_intervals_and_several_seeds_as_means():
    ax = plots.figure([shapley_result(players="layer")]).axes[0]
    assert [bar.get_height() for bar in ax.patches[:3]] == pytest.approx([0.08, 0.11, 0.12])
    labels = ("lora-s0", "lora-s1", "coto-s0", "coto-s1")
    figure = plots.figure([shapley_result(labels, "layer")])
    assert [bar.get_height() for bar in figure.axes[0].patches[:3]] == pytest.approx([0.13, 0.16, 0.17])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "CoTo"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]


def test_a_player_that_one_adapter_lacks_leaves_the_other_bars_their_intervals():
    result = shapley_result(players="layer")
    lacking = Result("shapley", columns(result.rows()[:5]), result.parameters, result.summary, result.provenance)
    ax = plots.figure([lacking]).axes[0]
    assert [len(lines.get_segments()) for lines in ax.collections] == [3, 2]


def test_convergence_is_that_of_the_trace_and_enumerated_values_have_none():
    line, distance, *_ = plots.figure([shapley_result()], kind="shapley:convergence").axes[0].lines
    assert line.get_ydata() == pytest.approx([0.1 / 2**k for k in range(5)])
    assert distance.get_ydata() == pytest.approx([0.1 / 2**k - 0.1 / 16 for k in range(4)])
    with pytest.raises(OptionError, match="enumerated"):
        plots.figure([shapley_result(trace=1)], kind="shapley:convergence")


def test_interactions_are_drawn_around_zero():
    figure = plots.figure([shapley_result(interactions=True)], kind="shapley:interactions", width="single")
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-0.2, 0.2)
    with pytest.raises(OptionError, match="order 2"):
        plots.figure([shapley_result()], kind="shapley:interactions")


def test_stability_curves_show_mean_band_and_worst():
    figure = plots.figure([stability_result()])
    plain, scaled = figure.axes
    assert [plain.get_title(), scaled.get_title()] == ["as they are", "updates × G/k"]
    mean, worst, *_ = plain.lines
    assert mean.get_ydata() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert worst.get_ydata() == pytest.approx([0.15, 0.35, 0.55, 0.75])
    several = plots.figure([stability_result(("lora-s0", "lora-s1", "coto-s0"))], kind="stability:p", width="single")
    assert several.axes[0].lines[0].get_ydata() == pytest.approx([0.175, 0.375, 0.575])
    alone = plots.figure([stability_result(rescaled=(False,))], kind="stability:leave-one-out")
    assert [ax.get_title() for ax in alone.axes] == ["each player left out", "each player alone"]


def test_stability_is_drawn_by_the_main_metric_of_its_results():
    figure = plots.figure([stability_result(metric="tag_f1")])
    assert figure.axes[0].get_ylabel() == "tag f1"
    assert figure.axes[0].lines[1].get_ydata() == pytest.approx([0.15, 0.35, 0.55, 0.75])
    with pytest.raises(OptionError, match="no metric is in all of them: accuracy and tag_f1"):
        plots.figure([stability_result(), stability_result(("b",), metric="tag_f1")])


def test_captions_say_whose_band_is_which():
    one, several = "95 % interval", "±1 s.d. over seeds"
    labels = ("lora-s0", "coto-s0", "coto-s1")
    for result in (shapley_result(labels, "layer"), stability_result(labels), sweep_result(labels)):
        caption = plots.figure([result], kind="shapley:bars" if result.kind == "shapley" else None).get_supxlabel()
        assert f"LoRA {one}" in caption
        assert f"CoTo {several}" in caption


@pytest.mark.parametrize("width", ["single", "double"])
def test_a_sweep_has_bars_for_patterns_and_curves_for_the_rest(width):
    bars, sparsity, rank = plots.figure([sweep_result()], width=width).axes
    names = bars.get_yticklabels() if width == "single" else bars.get_xticklabels()
    assert [text.get_text() for text in names] == ["all", "even", "random:3"]
    lengths = [patch.get_width() if width == "single" else patch.get_height() for patch in bars.patches[:3]]
    assert lengths == pytest.approx([0.9, 0.87, 0.84])
    assert sparsity.lines[0].get_xdata() == pytest.approx([0, 0.5, 0.9])
    assert sparsity.lines[0].get_ydata() == pytest.approx([0.81, 0.78, 0.75])
    assert rank.lines[0].get_xdata() == pytest.approx([1, 2])
    for kind in ("structured", "unstructured", "rank"):
        assert len(plots.figure([sweep_result()], kind=f"sweep:{kind}", width=width).axes) == 1


def test_criteria_of_which_several_draws_are_averaged_have_open_markers():
    result = sweep_result()
    rows = [
        {**row, "criterion": {"random": "mine", "svd": "random"}.get(row["criterion"], row["criterion"])}
        for row in result.rows()
    ]
    renamed = Result("sweep", columns(rows), result.parameters, {}, {"examples": 500})
    figure = plots.figure([renamed], kind="sweep:rank")
    handles = dict(
        zip((t.get_text() for t in figure.legends[0].get_texts()), figure.legends[0].legend_handles, strict=True)
    )
    assert list(handles) == ["lora-s0", "coto-s0", "mine", "random"]
    lines = figure.axes[0].lines
    assert {line.get_linestyle() for line in lines} == {handles[name].get_linestyle() for name in ("random", "mine")}
    for drawn in lines:
        mine = drawn.get_linestyle() == handles["mine"].get_linestyle()
        assert (drawn.get_markerfacecolor() == "white") == mine


def test_a_kind_that_was_not_swept_is_asked_for_by_name():
    result = sweep_result()
    only = [row for row in result.rows() if row["kind"] == "structured"]
    with pytest.raises(OptionError, match="hold no rank pruning"):
        plots.figure([Result("sweep", columns(only), result.parameters, {}, {})], kind="sweep:rank")


def test_a_method_has_its_colour_whatever_the_order():
    from matplotlib.colors import to_hex

    labels = ("coto-s0", "coto-s1", "lora-s0", "lora-s1")
    bars = plots.figure([sweep_result(labels)], kind="sweep:structured").axes[0].patches
    assert to_hex(bars[0].get_facecolor()) == "#d55e00"
    bars = plots.figure([sweep_result(labels[::-1])], kind="sweep:structured").axes[0].patches
    assert to_hex(bars[0].get_facecolor()) == "#0072b2"


@pytest.mark.parametrize("width", ["single", "double"])
def test_merges_are_bars_for_each_training_method_and_curves_over_the_coefficient(width):
    figure = plots.figure([merges()], width=width)
    bars, *curves = figure.axes
    heights = [patch.get_width() if width == "single" else patch.get_height() for patch in bars.patches]
    assert heights == pytest.approx([0.705] * 2 + [0.755] * 2)
    assert [ax.get_title() for ax in curves] == ["ties"]
    x, y = curves[0].lines[0].get_data()
    assert list(x) == [0.1, 1.0, 3.0]
    assert y == pytest.approx([0.705] * 3)
    panels = plots.figure([merges()], width=width, kind="compare-merges:coefficients").axes
    assert [ax.get_title() for ax in panels if ax.get_title()] == ["average", "ties"]


@pytest.mark.parametrize("width", ["single", "double"])
def test_what_nulls_keep_is_a_band_over_each_bar_and_classes_stand_apart(width):
    result = with_nulls(merges(names=("ties (exact)", "ties", "ensemble of logits")))
    (ax,) = plots.figure([result], kind="compare-merges:bars", width=width).axes
    names = [text.get_text() for text in (ax.get_yticklabels() if width == "single" else ax.get_xticklabels())]
    assert names == ["ensemble (logits), 123 MB", "ties", "ties (exact), 123 MB"]
    beside = [np.ptp(line.get_ydata() if width == "single" else line.get_xdata()) == 0 for line in ax.lines]
    edges = [line for line, alike in zip(ax.lines, beside, strict=True) if alike][:2]
    at = [line.get_ydata()[0] if width == "single" else line.get_xdata()[0] for line in edges]
    assert at == [0.5, 1.5]
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    for label, (low, high) in {"of the others": (0.6, 0.64), "of all": (0.1, 0.14)}.items():
        patches = [p for name, handle in handles.items() if label in name for p in handle.patches]
        assert len(patches) == 2  # of the last training method: two merges, and none of the ensemble
        for patch in patches:
            begin, length = (
                (patch.get_x(), patch.get_width()) if width == "single" else (patch.get_y(), patch.get_height())
            )
            assert (begin, begin + length) == pytest.approx((low, high))


def test_seeds_of_one_task_are_drawn_over_their_ratios():
    figure = plots.figure([merges(ratios=("0:1", "1:1"))])
    assert [ax.get_title() for ax in figure.axes] == ["average", "ties"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0:1", "1:1"]
    ax = plots.figure([merges(("lora",), seeds=1, ratios=("0:1", "1:1"))], kind="compare-merges:ratios").axes[0]
    (band,) = ax.collections
    assert sorted(set(band.get_paths()[0].vertices[:, 1])) == pytest.approx([0.68, 0.73])  # the interval of the one set
    with pytest.raises(OptionError, match="over their ratios"):
        plots.figure([merges(ratios=("0:1", "1:1"))], kind="compare-merges:bars")
    with pytest.raises(OptionError, match="ratios are for seeds of one"):
        plots.figure([merges()], kind="compare-merges:ratios")
    with pytest.raises(OptionError, match="cannot share a figure"):
        plots.figure([merges(), merges(ratios=("1:1",))])


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        ([True, True], "adapters of a set share their initial A"),
        ([False, False], "adapters of separate initial A"),
        ([True, None], "some adapters share their initial A"),
        ([None], ""),
        ([], ""),
    ],
)
def test_the_caption_of_merges_says_whether_adapters_began_alike(shared, words):
    result = merges()
    result = replace(result, summary={**result.summary, "shared_initial_A": [{"shared": each} for each in shared]})
    caption = plots.figure([result]).get_supxlabel()
    assert words in caption
    assert ("initial A" in caption) == bool(words)


def test_a_figure_has_the_same_bytes_in_whatever_order_its_files_are_written(tmp_path):
    first, second = [tmp_path / name for name in ("a.png", "a.pdf")], [tmp_path / name for name in ("b.pdf", "b.png")]
    plots.save(plots.figure([sweep_result()]), *first)
    plots.save(plots.figure([sweep_result()]), *second)
    assert first[0].read_bytes() == second[1].read_bytes()
    assert first[1].read_bytes() == second[0].read_bytes()


@pytest.mark.parametrize("width", ["single", "double"])
def test_a_caption_of_any_length_stays_within_the_figure(width):
    result = merges()
    names = [f"a-task-with-a-long-name-{i}" for i in range(9)]
    result = replace(result, parameters={**result.parameters, "task_names": names})
    result = replace(result, summary={**result.summary, "shared_initial_A": [{"shared": True}]})
    figure = plots.figure([result], width=width)
    figure.draw_without_rendering()
    inside, drawn = figure.bbox, figure._supxlabel.get_window_extent()
    assert inside.x0 <= drawn.x0 < drawn.x1 <= inside.x1
    caption = " ".join(figure.get_supxlabel().split())
    assert all(word in caption for word in [*names, "initial A"])


@given(st.text(alphabet="$\\_a", min_size=1, max_size=40), st.integers(6, 20))
def test_a_name_that_is_cut_begins_no_formula(name, most):
    (cut,) = shortened([escape.drawn(name)], most)
    assert len(cut.replace(r"\$", "$")) <= most
    assert not re.search(r"(?<!\\)\$", cut)


@pytest.mark.parametrize(
    "text", ["bands: 95 % interval over examples", r"a price of \$5, \$6 and \$7", "‖ΔW‖ of $A B$", ""]
)
def test_a_text_is_as_wide_as_it_is_drawn(text):
    from matplotlib.figure import Figure

    with plot_style.styled():
        figure = Figure(dpi=600)
        drawn = figure.text(0, 0, text, fontsize=7)
        figure.draw_without_rendering()
        assert inches(text, 7) == pytest.approx(drawn.get_window_extent().width / 600, abs=0.02)
        assert inches("中", 7) > 0.05  # that the font lacks it is told where it is drawn


def test_a_result_that_names_no_metrics_is_refused_in_one_line():
    result = sweep_result()
    result.parameters.pop("metrics")
    with pytest.raises(OptionError, match="a result of an early version, whose parameters name no metrics") as error:
        plots.figure([result])
    assert "\n" not in str(error.value)
