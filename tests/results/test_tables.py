"""Tables of results as frames, CSV, LaTeX and HTML: the same content, harmless where it goes."""

import csv
import io
import sys
from pathlib import Path

import pytest

from lora_lab.errors import FileError, OptionError
from lora_lab.results import tables
from lora_lab.results.result import Result

RESULTS = Path(__file__).parents[2] / "figures" / "results"
ODD = "50 % & <b>_x_</b> $1^2$ \\ #{}~\x1b[31m"


def evaluated(*labels):
    cells = {"loss": 0.5, "loss_low": 0.25, "loss_high": 1e-05, "accuracy": 0.9, "accuracy_low": 0.875}
    columns = {name: [value] * len(labels) for name, value in (cells | {"accuracy_high": None}).items()}
    columns |= {"adapter": list(labels), "task": ["t"] * len(labels), "method": [None] * len(labels)}
    columns |= {"seed": [0] * len(labels), "examples": [500] * len(labels)}
    return Result("evaluate", columns, {"tasks": [{"name": "t"}], "split": "test"}, {}, {"date": "2026-01-02T03:04"})


def load(name):
    return Result.load(RESULTS / f"{name}.json")


@pytest.mark.parametrize("name", ["shapley_type_layer", "stability", "merges", "minilm_rates_coto", "train_coto"])
def test_a_frame_holds_every_table_as_it_is(name):
    pytest.importorskip("pandas")
    result = load(name)
    for table in result.tables:
        frame, rows = result.frame(table), result.table(table)
        assert len(frame) == len(rows)
        assert list(frame.columns) == list(rows[0]) if rows else len(frame.columns)
        for key in rows[0] if rows else ():
            if isinstance(rows[0][key], float):
                assert frame[key].tolist()[0] == rows[0][key]
    assert result.table() == result.rows()


def test_a_table_within_a_table_knows_whose_it_is():
    result = load("stability")
    rows = result.table("adapters.epsilon")
    assert len(rows) == sum(len(each["epsilon"]) for each in result.summary["adapters"])
    assert rows[0] | {"adapter": "lora-s0", "rescaled": False} == rows[0]
    with pytest.raises(OptionError, match=r"unknown table of stability results 'adapter' .did you mean 'adapters'"):
        result.frame("adapter")


def test_a_frame_without_pandas_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptionError, match="a frame needs pandas, which is not installed"):
        load("train_lora").frame()


def test_csv_gives_the_numbers_in_full_and_says_what_wrote_it():
    result = load("sweep")
    names, *lines = csv.reader(io.StringIO(result.to_csv()))
    assert names == [*result.columns, "lora-lab"]
    assert [float(line[names.index("accuracy")]) for line in lines] == result.columns["accuracy"]
    assert {line[-1] for line in lines} == {"sweep 1"}
    (line,) = list(csv.DictReader(io.StringIO(evaluated("=1+1").to_csv())))
    assert (line["adapter"], line["method"], line["accuracy_high"]) == ("'=1+1", "", "")
    names, *lines = csv.reader(io.StringIO(load("interpolation_lora").to_csv()))
    assert lines[0][names.index("weights")] == "[1.0, 0.0, 0.0, 0.0, 0.0]"


def body(text):
    lines = text.splitlines()
    return lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]


def test_latex_has_intervals_beside_their_numbers_and_texts_escaped():
    result = evaluated(ODD)
    (line,) = body(result.to_latex())
    assert line == (
        r"50 \% \& <b>\_x\_</b> \$1\textasciicircum{}2\$ \textbackslash{} \#\{\}\textasciitilde{}"
        r"\textbackslash{}x1b[31m & t & $0.500\,[0.250, 0.000]$ & $0.900$ \\"
    )
    whole = evaluated("a").to_latex("rows", ["adapter", "seed", "method", "accuracy"])
    assert whole.splitlines()[0] == r"\begin{tabular}{lllr}"
    assert body(whole) == [r"a & $0$ & -- & $0.900$ \\"]
    with pytest.raises(OptionError, match="did you mean 'accuracy'"):
        result.to_latex("rows", ["acuracy"])


def test_small_numbers_are_powers_of_ten():
    line = body(load("shapley_type_layer").to_latex("adapters", ["adapter", "efficiency_gap"]))[0]
    assert r"\cdot10^{" in line
    assert "e-" not in line


def test_spreads_stand_beside_means_over_several_only():
    result = load("merges")
    row = next(r for r in result.summary["by_method"] if r["merge"] == "ties" and r["method"] == "lora")
    line = next(each for each in body(result.to_latex()) if each.startswith("ties &"))
    assert rf"${row['accuracy']:.3f} \pm {row['accuracy_spread']:.3f}$" in line
    single = [{**each, "sets": 1} for each in result.summary["by_method"]]
    alone = Result(result.kind, result.columns, result.parameters, {**result.summary, "by_method": single})
    assert r"\pm" not in alone.to_latex()
    over = load("interpolation_lora").to_latex("over_pairs")
    assert r"\pm" in body(over)[0]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_line_of_every_table_has_as_many_cells_as_its_head(path):
    result = Result.load(path)
    for table in (None, *result.tables):
        head, *rest = (line for line in result.to_latex(table).splitlines() if line.endswith(r"\\"))
        if "multicolumn" in head:
            head, *rest = rest
        assert {line.count(" & ") for line in rest} <= {head.count(" & ")}
        assert result.to_csv(table or "rows")


def test_a_table_beside_a_result_replaces_only_what_is_ours(tmp_path):
    result = evaluated("a")
    paths = [tmp_path / "evaluate.tex", tmp_path / "evaluate.csv"]
    assert tables.save(result, *paths) == paths
    assert paths[0].read_text().endswith("\\end{tabular}\n% lora-lab evaluate\n")
    tables.save(evaluated("b"), *paths)
    assert all("b" in path.read_text() for path in paths)
    for path in paths:
        path.write_text("mine\n")
        with pytest.raises(FileError, match=f"{path.name}: exists already .not written by lora-lab"):
            tables.save(result, path)
        with pytest.raises(FileError, match="not replaced"):
            tables.save(result, path, force=True)
        assert path.read_text() == "mine\n"
    with pytest.raises(OptionError, match=r"x.txt: tables are written as .tex, .csv"):
        tables.save(result, tmp_path / "x.txt")


def test_a_result_shows_itself_in_one_line_and_in_a_notebook():
    result = evaluated(ODD, *"bcdefghijkl")
    assert repr(result) == "Result(evaluate: 12 rows, t test, 2026-01-02)"
    shown = result._repr_html_()
    assert "&lt;b&gt;_x_&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert "\x1b" not in shown
    assert "… 2 more rows" in shown
    assert "accuracy_low" not in shown
    assert repr(load("shapley")).startswith("Result(shapley: 60 rows, 10 adapters, digits/relabel test, 20")
    assert repr(Result("demo", {})) == "Result(demo: 0 rows)"
