import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_lab import plot, plot_line, plot_train
from lora_lab.errors import FileError, OptionError
from lora_lab.result import Result, columns
from lora_lab.schedule import Schedule

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "figures").glob("*.py"))


def line(method="lora", pairs=((0, 1),), spaces=("factors", "matched", "delta"), depth=0.3, ratios=()):
    grid = np.linspace(0, 1, 5)
    rows, barriers = [], []
    for k, (i, j) in enumerate(pairs):
        who = {"members": [f"{method}{i}", f"{method}{j}"], "indices": [i, j], "method": method}
        for space in spaces:
            dip = {"factors": depth + 0.1 * k, "matched": 0.02}.get(space, 0.0)
            for t in grid:
                rows.append(
                    {**who, "space": space, "t": float(t), "ratio": None, **cells(0.9 - dip * 4 * t * (1 - t), t)}
                )
            barriers.append({**who, "space": space, "metric": "error", "barrier": "entezari", "value": dip})
        for ratio in ratios:
            rows.append({**who, "space": "delta", "t": None, "ratio": ratio, **cells(0.8 + 0.01 * k, 0.5)})
    count = 1 + max(max(pair) for pair in pairs)
    adapters = [{"label": f"{method}{i}", "method": method} for i in range(count)]
    parameters = {"spaces": list(spaces), "adapters": adapters, "task": {"name": "digits/relabel"}, "split": "test"}
    return Result("interpolate", columns(rows), parameters, {"barriers": barriers}, {"examples": 500})


def cells(accuracy, t):
    return {
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.02,
        "accuracy_high": accuracy + 0.02,
        "loss": 1 - accuracy,
        "loss_low": 0.9 - accuracy,
        "loss_high": 1.1 - accuracy,
        "norm": 10 * (1 - 2 * t * (1 - t)),
    }


def run(method="coto", steps=40):
    schedule = Schedule()
    log = {
        "step": list(range(steps)),
        "p": [schedule.probability(t, steps) if method == "coto" else 1.0 for t in range(steps)],
        "mask": [
            "".join("01"[int(on)] for on in schedule.mask(t, steps, 4, 0)) if method == "coto" else None
            for t in range(steps)
        ],
        "loss": [1 / (t + 1) for t in range(steps)],
        "learning_rate": [1e-3] * steps,
    }
    groups = {f"layers.{i}": [f"layers.{i}.q"] for i in range(4)}
    return Result("train", log, {"record": {"method": method, "seed": 0}, "groups": groups})


def test_curves_are_the_columns_with_their_intervals():
    t, value, low, high = plot_line.curves([line()], "accuracy")["LoRA"]["factors"]
    assert t == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert value == pytest.approx([0.9, 0.675, 0.6, 0.675, 0.9])
    assert value - low == pytest.approx([0.02] * 5)
    assert high - value == pytest.approx([0.02] * 5)


def test_several_pairs_give_mean_and_standard_deviation_also_over_results():
    one = plot_line.curves([line(pairs=((0, 1), (0, 2)))], "accuracy")["LoRA"]["factors"]
    two = plot_line.curves([line(depth=0.3), line(depth=0.4)], "accuracy")["LoRA"]["factors"]
    for _, value, low, high in (one, two):
        assert value[2] == pytest.approx(0.55)
        assert high[2] - value[2] == pytest.approx(np.std([0.6, 0.5], ddof=1))
        assert value[2] - low[2] == pytest.approx(high[2] - value[2])


def test_a_line_figure_draws_every_curve_and_says_what_its_bands_are():
    figure = plot.figure([line("lora"), line("coto", depth=0.1)])
    lora, coto, norm = figure.axes
    assert [ax.get_title() for ax in (lora, coto)] == ["LoRA", "CoTo"]
    assert "LoRA solid, CoTo dashed" in norm.get_title()
    assert lora.lines[0].get_ydata() == pytest.approx([0.9, 0.675, 0.6, 0.675, 0.9])
    assert coto.lines[0].get_ydata()[2] == pytest.approx(0.8)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["factors A, B averaged", "factors, ‖ΔW‖ matched", "ΔW averaged"]
    assert figure.get_supxlabel() == "digits/relabel, test split, n = 500; bands: 95 % interval over examples"
    several = plot.figure([line(pairs=((0, 1), (1, 2)))])
    assert several.get_supxlabel().endswith("bands: ±1 s.d. over pairs")


def test_results_of_different_tasks_or_splits_do_not_share_a_figure():
    one = line()
    for name, value in (("task", {"name": "digits/mod3"}), ("split", "validation")):
        other = Result(one.kind, one.columns, {**one.parameters, name: value}, one.summary, one.provenance)
        with pytest.raises(OptionError, match=f"cannot share a figure: {name} is"):
            plot.figure([one, other])


def test_a_mixed_figure_says_whose_bands_are_what():
    caption = plot.figure([line("lora", pairs=((0, 1), (0, 2))), line("coto")]).get_supxlabel()
    assert caption.endswith("bands: LoRA ±1 s.d. over pairs, CoTo 95 % interval over examples")


def test_a_line_without_norms_has_no_norm_panel():
    bare = line("coto", spaces=("factors",))
    rows = [{**row, "norm": None} for row in bare.rows()]
    figure = plot.figure([Result("interpolate", columns(rows), bare.parameters, bare.summary, bare.provenance)])
    assert len(figure.axes) == 1


def test_the_matrix_shows_every_barrier_twice_on_one_scale():
    figure = plot.figure([line(pairs=((0, 1), (0, 2), (1, 2))), line("coto")], kind="interpolate:matrix")
    first, second = figure.axes[:2]
    assert sorted(text.get_text() for text in first.texts) == ["0.30", "0.30", "0.40", "0.40", "0.50", "0.50"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 0.5)


def test_mixtures_show_each_combination_and_the_mean():
    figure = plot.figure([line(pairs=((0, 1), (0, 2)), ratios=("0:1", "1:1"))], kind="interpolate:ratios")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0:1", "1:1"]
    assert ax.lines[-1].get_ydata() == pytest.approx([0.805, 0.805])
    with pytest.raises(OptionError, match="no mixtures; compute them with"):
        plot.figure([line()], kind="interpolate:ratios")


def test_a_training_figure_shows_the_masks_that_were_drawn():
    result = run()
    drawn = plot_train.masks(result)
    assert drawn.shape == (4, 40)
    assert (drawn[:, 7] == Schedule().mask(7, 40, 4, 0)).all()
    assert plot_train.full_from(result) == 30
    figure = plot.figure([result, run("lora")])
    top, _, middle, lora, *_ = figure.axes
    assert (middle.images[0].get_array() == drawn).all()
    assert lora.images[0].get_array().all()
    assert [text.get_text() for text in top.texts] == ["all on"]


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_runs_of_any_length_are_drawn(steps):
    figure = plot.figure([run(steps=steps)])
    assert len(figure.axes[2].lines[1].get_ydata()) == steps


@pytest.mark.parametrize("width", plot.WIDTHS)
@pytest.mark.parametrize("kind", plot.PLOTS)
def test_every_figure_has_its_column_width_and_embeds_truetype(kind, width, tmp_path):
    results = [run()] if kind == "train" else [line(pairs=((0, 1), (0, 2)), ratios=("1:1",))]
    figure = plot.figure(results, kind=kind, width=width)
    assert figure.get_figwidth() == {"single": 3.25, "double": 6.75}[width]
    paths = [tmp_path / f"x.{ending}" for ending in ("pdf", "png", "svg")]
    plot.save(figure, *paths)
    content = paths[0].read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    again = tmp_path / "again.pdf"
    plot.save(plot.figure(results, kind=kind, width=width), again)
    assert again.read_bytes() == content


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path):
    with pytest.raises(OptionError, match="different kinds cannot share a figure: interpolate, train"):
        plot.figure([line(), run()])
    with pytest.raises(OptionError, match=r"unknown width 'singel' .did you mean 'single'"):
        plot.figure([line()], width="singel")
    with pytest.raises(OptionError, match="did you mean 'interpolate:matrix'"):
        plot.figure([line()], kind="interpolate:matrxi")
    with pytest.raises(OptionError, match="there is no figure for results of kind 'evaluate'"):
        plot.figure([Result("evaluate", {})])
    with pytest.raises(OptionError, match="no results"):
        plot.figure([])
    with pytest.raises(OptionError, match=r"x.gif: figures are written as .pdf, .png, .svg"):
        plot.save(plot.figure([line()]), tmp_path / "x.gif")
    (tmp_path / "x.pdf").write_text("old")
    with pytest.raises(FileError, match=r"x.pdf: exists already"):
        plot.save(plot.figure([line()]), tmp_path / "y.png", tmp_path / "x.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pdf"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_of_the_paper_draws_without_torch(script, tmp_path):
    code = f"sys.argv = ['x', {str(tmp_path)!r}]; runpy.run_path({str(script)!r}); assert 'torch' not in sys.modules"
    check = f"import sys, runpy; {code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = sorted(path.suffix for path in tmp_path.iterdir())
    assert written.count(".pdf") == written.count(".png") >= 1
