"""Panels of one figure, captions for LaTeX, and figures that are read in grey."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from making_results import compared, line, merges, of_real_size, run, shapley_result
from matplotlib.text import Text
from test_sizes import faults

from lora_lab import plots
from lora_lab.errors import OptionError
from lora_lab.plots import style as plot_style
from lora_lab.plots.captions import caption
from lora_lab.plots.composing import Part, compose
from lora_lab.plots.panels import PAGE
from lora_lab.plots.registry import figure_and_caption


def parts():
    return [Part([line(), line("coto")]), Part([shapley_result(players="layer")], "shapley:bars"), Part([run()])]


def test_panels_have_letters_and_all_text_has_seven_points():
    made = compose(parts())
    figure = made.figure
    assert figure.get_figwidth() == plots.WIDTHS["double"]
    letters = figure.findobj(lambda each: isinstance(each, Text) and re.fullmatch(r"\(.\)", each.get_text()))
    assert [text.get_text() for text in letters] == ["(a)", "(b)", "(c)"]
    texts = [text for text in figure.findobj(lambda each: hasattr(each, "get_fontsize")) if text.get_text()]
    assert {text.get_fontsize() for text in texts} == {7.0}
    places = [text.get_window_extent().extents[:2] for text in letters]
    assert abs(places[0][1] - places[1][1]) < 1  # (a) and (b) side by side, (c) below (a)
    assert abs(places[0][0] - places[2][0]) < 1 < places[0][1] - places[2][1]
    assert "layer" in {ax.get_xlabel() for ax in figure.axes}  # a panel has no caption that would say it
    assert not faults(figure)


@pytest.mark.parametrize("width", plots.WIDTHS)
def test_panels_of_real_sizes_keep_their_texts_apart(width):
    views = ("shapley:bars", "stability", "layerwise")
    made = compose([Part(of_real_size(view, 9, 80), view) for view in views], width=width)
    assert not faults(made.figure)


def test_panels_that_are_a_little_too_high_for_a_page_are_made_lower():
    views = ("interpolate", "shapley:bars", "stability", "sweep:rank", "compare:groups")
    made = compose([Part(of_real_size(view, 9, 80), view) for view in views])
    assert made.figure.get_figheight() == pytest.approx(PAGE)
    assert made.fitting == 5
    assert not faults(made.figure)


def test_panels_far_too_high_for_a_page_stay_readable_and_it_is_known_how_many_fit():
    high = Part([merges(names=[f"merge {i}" for i in range(10)])], "compare-merges:bars")
    alone = compose([high], width="single").figure.get_figheight()
    assert PAGE / 3 < alone < PAGE / 2.5
    made = compose([high] * 4, width="single")
    assert made.figure.get_figheight() == pytest.approx(4 * alone)
    assert made.fitting == 3
    assert compose([high] * 7).fitting == 6  # three lines of two


def test_panels_show_what_the_views_show_alone():
    axes = iter(compose(parts()).figure.axes)
    for part in parts():
        alone = plots.figure(part.results, kind=part.view, width="single")
        for other in alone.axes:
            ax = next(axes)
            heights = [[list(map(float, drawn.get_ydata())) for drawn in each.lines] for each in (ax, other)]
            np.testing.assert_equal(*heights)


def test_a_low_panel_beside_a_high_one_stays_as_low_as_it_is_alone():
    high, low = Part([merges(names=[f"merge {i}" for i in range(30)])], "compare-merges:bars"), Part([line()])
    tall, *flat = (inches_high(ax) for ax in compose([high, low]).figure.axes)
    assert tall > 4
    assert max(flat) < 1.3 * max(inches_high(ax) for ax in plots.figure([line()], width="single").axes)


def inches_high(ax):
    return ax.bbox.height / ax.get_figure(root=True).dpi


def test_equal_panels_give_equal_bytes_and_are_known_as_ours(tmp_path):
    for name in ("a.svg", "b.svg"):
        plots.save(compose(parts()[:2]).figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plots.save(compose(parts()[:1]).figure, tmp_path / "a.svg", force=True)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="0 panels"):
        compose([])
    with pytest.raises(OptionError, match="on the width single there is room for 1 or 2"):
        compose(parts(), width="single", columns=2)
    with pytest.raises(OptionError, match="width"):
        compose(parts(), width="triple")


def test_a_caption_says_what_is_drawn_on_what_and_what_bands_are():
    figure, said = figure_and_caption([line()], captioned=False)
    assert not figure.get_supxlabel()
    assert caption([said]) == (
        "% lora-lab caption\n"
        r"\caption{The main metric along lines, and $\|\Delta$W$\|$. digits/relabel, test split, n = 500; "
        r"bands: 95 \% interval over examples.}"
        "\n"
    )
    result = line()
    result.parameters["task"]["name"] = r"50%_{of} $x$ \input"
    text = caption(compose([Part([result]), Part([compared(("a", "b", "c"))])]).captions)
    assert text.count(r"\textbf{(") == 2
    assert r"50\%\_\{of\} \$x\$ \textbackslash{}input" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_a_dollar_beside_a_symbol_stays_a_dollar():
    assert caption([("x", r"\$Δ‖ cost")]) == "% lora-lab caption\n\\caption{X. \\$$\\Delta\\|$ cost.}\n"


def test_lines_of_like_dashes_differ_in_grey():
    with plot_style.styled():
        looks = [plot_style.look(place) for place in range(plot_style.FEW)]
    for one, other in itertools.combinations(looks, 2):
        assert one["marker"] != other["marker"]
        if one["linestyle"] == other["linestyle"]:
            assert abs(lightness(one["color"]) - lightness(other["color"])) > 15


def lightness(colour):
    """CIE L* of a colour."""
    linear = [int(part, 16) / 255 for part in re.findall("..", colour.removeprefix("#"))]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in linear]
    return 116 * sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) ** (1 / 3) - 16


def test_the_command_writes_panels_with_caption_and_script(lora_lab, tmp_path):
    results = Path(__file__).parents[2] / "figures" / "results"
    given = [results / "shapley.json", results / "train_coto.json"]
    asked = ["figure", *given, "--panel", "--kind", "shapley:bars", "--kind", "train", "--width", "single"]
    code, _, err = lora_lab(*asked, "-o", "x.pdf", "--caption", "x.tex", "--notebook", "x.ipynb")
    assert (code, err) == (0, "wrote x.pdf, x.tex, x.ipynb\n")
    assert (tmp_path / "x.tex").read_text().count("textbf") == 2
    for wrong, told in [
        (["--kind", "shapley", "--kind", "train", "--kind", "train"], "--kind is given 3 times for 2 panels"),
        (["--kind", "stability"], "figure of shapley results"),
    ]:
        code, _, err = lora_lab("figure", *given, "--panel", *wrong, "-o", "y.pdf")
        assert (code, err.count("\n")) == (1, 1)
        assert told in err
    code, _, err = lora_lab("figure", *[given[1]] * 5, "--panel", "--width", "single", "-o", "z.pdf")
    assert code == 0
    told = r"The figure is \d+\.\d inches high, and a page 9: the first \d of its panels fit one, and more on --width"
    assert re.match(told, err)
    code, _, err = lora_lab("figure", given[0], "--columns", 2, "-o", "y.pdf")
    assert code == 1
    assert "with --panel" in err
    code, _, err = lora_lab("figure", given[0], "-o", "y.pdf", "--caption", "y.txt")
    assert (code, "is written as .tex" in err) == (1, True)
    assert not list(tmp_path.glob("y.*"))
