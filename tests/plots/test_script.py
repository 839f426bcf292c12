"""Scripts of plain matplotlib draw what the views draw, from the result files, without this package."""

import json
import subprocess
import sys

import numpy as np
import pytest
from making_results import (
    checkpoints,
    compared,
    line,
    merges,
    plane,
    run,
    shapley_result,
    stability_result,
    sweep_result,
)

from lora_lab import plots
from lora_lab.errors import FileError, OptionError
from lora_lab.plots.composing import Part, compose
from lora_lab.plots.sources import script

VIEWS = {
    "interpolate": [line(), line("coto", depth=0.1)],
    "shapley:bars": [shapley_result(players="layer")],
    "shapley": [shapley_result()],
    "stability": [stability_result()],
    "compare": [compared(("a", "b", "c"))],
    "plane": [plane()],
    "train": [run()],
    "compare-merges": [merges()],
    "sweep": [sweep_result()],
    "checkpoints": [checkpoints()],
}
REPORT = """
import json, sys
sys.modules["lora_lab"] = None
import matplotlib
matplotlib.use("agg")
told = {}
for place in sys.argv[1:]:
    scope = {"__file__": place}
    exec(compile(open(place, encoding="utf-8").read(), place, "exec"), scope)
    told[place] = [
        [
            ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim(), ax.get_ylim(),
            [[list(map(float, part)) for part in line.get_data(orig=False)] for line in ax.lines],
            [patch.get_bbox().extents.tolist() for patch in ax.patches],
            [image.get_array().filled(-9).astype(float).tolist() for image in ax.images],
        ]
        for ax in scope["fig"].axes
    ]
print(json.dumps(told))
"""


def contents(figure):
    shown = [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]
    return [
        [
            ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim(), ax.get_ylim(),
            [[list(map(float, part)) for part in line.get_data(orig=False)] for line in ax.lines],
            [patch.get_bbox().extents.tolist() for patch in ax.patches],
            [np.ma.filled(np.ma.masked_invalid(image.get_array()), -9).tolist() for image in ax.images],
        ]
        for ax in shown
    ]  # fmt: skip


def flat(value):
    """All numbers within lists, and all texts."""
    if isinstance(value, list | tuple):
        return [part for each in value for part in flat(each)]
    return [value]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """View → our figure, and its script's path; and what the scripts have drawn, all in one process."""
    folder = tmp_path_factory.mktemp("scripts")
    figures = {}
    for view, results in VIEWS.items():
        name = view.replace(":", "-")
        paths = [folder / f"{name}-{i}.json" for i in range(len(results))]
        for path, result in zip(paths, results, strict=True):
            path.write_text(json.dumps(result.to_json()))
        figures[view] = plots.figure(results, kind=view), folder / f"{name}.py"
        script.save(figures[view][1], figures[view][0], results, paths, title=view)
    scripts = [str(path) for _, path in figures.values()]
    done = subprocess.run([sys.executable, "-c", REPORT, *scripts], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return figures, json.loads(done.stdout)


@pytest.mark.parametrize("view", VIEWS)
def test_a_script_draws_what_the_view_draws(drawn, view):
    figures, told = drawn
    figure, path = figures[view]
    ours, theirs = contents(figure), [panel for panel in told[str(path)] if any(panel[5:])]
    ours = [panel for panel in ours if any(panel[5:])]
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[:3] == other[:3]
        numbers, others = np.array(flat(mine[3:]), float), np.array(flat(other[3:]), float)
        np.testing.assert_allclose(others, numbers, rtol=1e-9, atol=1e-9)
    assert path.with_name(f"{path.stem}-redrawn.pdf").read_bytes().startswith(b"%PDF")


def test_columns_of_the_results_are_taken_by_name(drawn):
    text = drawn[0]["interpolate"][1].read_text()
    assert "column('accuracy', space='matched')" in text
    assert "column('accuracy_low', result=1, space='factors')" in text
    assert "lora_lab" not in text.replace("lora-lab", "")


def test_a_changed_result_changes_the_figure(tmp_path):
    result = line()
    path, target = tmp_path / "a.json", tmp_path / "a.py"
    content = result.to_json()
    path.write_text(json.dumps(content))
    script.save(target, plots.figure([result]), [result], [path], title="x")
    content["columns"]["accuracy"][2] = 0.123
    path.write_text(json.dumps(content))
    done = subprocess.run([sys.executable, "-c", REPORT, target], capture_output=True, text=True, check=True)
    assert 0.123 in flat(json.loads(done.stdout)[str(target)])


def test_a_notebook_holds_the_cells_of_the_script(tmp_path):
    result = line()
    (tmp_path / "a.json").write_text(json.dumps(result.to_json()))
    for name in ("a.py", "a.ipynb"):
        script.save(tmp_path / name, plots.figure([result]), [result], [tmp_path / "a.json"], title="x")
    notebook = json.loads((tmp_path / "a.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds == ["markdown"] + ["code"] * (len(kinds) - 1)
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    plain = [text for text in (tmp_path / "a.py").read_text().splitlines() if text and not text.startswith("#")]
    assert [text for text in code.splitlines() if text and not text.startswith("#")] == plain
    assert len({cell["id"] for cell in notebook["cells"]}) == len(kinds)


def test_scripts_replace_only_scripts_and_names_stay_in_their_quotes(tmp_path):
    result = line()
    evil = tmp_path / "a'\"\n__import__('os')#.json"
    evil.write_text(json.dumps(result.to_json()))
    target = tmp_path / "a.py"
    for _ in range(2):
        script.save(target, plots.figure([result]), [result], [evil], title="x\nimport os", force=True)
    assert "\nimport os" not in target.read_text()
    subprocess.run([sys.executable, "-c", REPORT, target], check=True, capture_output=True)
    target.write_text("print('mine')\n")
    with pytest.raises(FileError, match="not written by lora-lab"):
        script.save(target, plots.figure([result]), [result], [evil], title="x", force=True)
    with pytest.raises(OptionError, match=r"\.py or \.ipynb"):
        script.save(tmp_path / "a.R", plots.figure([result]), [result], [evil], title="x")


def test_panels_have_a_script_too(tmp_path):
    parts = [Part([line()]), Part([stability_result()])]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part.results[0].to_json()))
    made = compose(parts)
    script.save(tmp_path / "x.py", made.figure, [part.results[0] for part in parts], paths, title="x")
    done = subprocess.run([sys.executable, "-c", REPORT, tmp_path / "x.py"], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)[str(tmp_path / "x.py")]
    assert flat([panel[5] for panel in theirs]) == pytest.approx(flat([panel[5] for panel in contents(made.figure)]))
    assert "(b)" in (tmp_path / "x.py").read_text()
