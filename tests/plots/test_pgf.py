"""PGF, with an engine of TeX that only knows how to measure: a letter is five points wide."""

import os
import sys

import pytest
from making_results import line, sweep_result
from matplotlib.backends.backend_pgf import LatexManager

from lora_lab import plots
from lora_lab.errors import FileError, OptionError

ENGINE = """#!{python}
import re, sys
for line in sys.stdin:
    if "pgf_backend_query_start" in line:
        print("*pgf_backend_query_start", flush=True)
        print("*", end="", flush=True)
    elif "sbox0" in line:
        letters = len(re.sub(r".*selectfont ?|}}.*", "", line))
        print(f"{{5.0 * letters}}pt,5.0pt,1.0pt", flush=True)
        print("", flush=True)
        print("*", end="", flush=True)
    elif "end{{document}}" in line:
        break
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    place = tmp_path / "bin"
    place.mkdir()
    (place / "lualatex").write_text(ENGINE.format(python=sys.executable))
    (place / "lualatex").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    LatexManager._get_cached_or_new_impl.cache_clear()
    yield
    LatexManager._get_cached_or_new_impl.cache_clear()


def test_a_figure_is_pgf_at_its_final_size_and_its_texts_are_texts(engine, tmp_path):
    figure = plots.figure([line()], width="single")
    plots.save(figure, tmp_path / "line.pgf")
    text = (tmp_path / "line.pgf").read_text()
    assert text.startswith("% lora-lab figure\n% lora-lab ")
    assert text.count("\\begin{pgfpicture}") == text.count("\\end{pgfpicture}") == 1
    assert f"{{3.250000in}}{{{figure.get_figheight():.6f}in}}" in text
    assert "accuracy" in text
    assert "factors A, B averaged" in text
    assert plots.shows(tmp_path / "line.pgf", [line()], width="single")
    plots.save(figure, tmp_path / "line.pgf", force=True)  # its own
    assert (tmp_path / "line.pgf").read_text() == text
    (tmp_path / "other.pgf").write_text("% somebody's\n")
    with pytest.raises(FileError, match=r"other.pgf: not written by lora-lab"):
        plots.save(figure, tmp_path / "other.pgf", force=True)


def test_what_pgf_cannot_hold_is_said_in_one_line_and_nothing_is_written(engine, tmp_path, monkeypatch):
    matrix = plots.figure([line(pairs=((0, 1), (0, 2)))], kind="interpolate:matrix")
    with pytest.raises(OptionError, match=r"m.pgf: a matrix of colours would be a file of its own beside PGF"):
        plots.save(matrix, tmp_path / "m.pdf", tmp_path / "m.pgf")
    named = plots.figure([sweep_result(("a&b", "coto-s0"))])
    with pytest.raises(OptionError, match=r"n.pgf: TeX takes & in 'a&b' for its own"):
        plots.save(named, tmp_path / "n.pgf")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        OptionError, match=r"l.pgf: PGF needs TeX \(lualatex or xelatex\), .* and there is none"
    ) as error:
        plots.save(plots.figure([line()]), tmp_path / "l.pgf")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
