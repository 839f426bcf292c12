"""Where a verb's result and figure go: found again, drawn again, or refused before any work is done."""

import pytest

from lora_lab import plots
from lora_lab.cli import terminal
from lora_lab.cli.outputs import Outputs
from lora_lab.errors import FileError, LoraLabWarning
from lora_lab.results.result import Result

LOG = {"step": [1, 2], "loss": [2.0, 1.0], "p": [1.0, 1.0], "mask": ["1", "1"], "learning_rate": [0.1, 0.1]}
SAID = {"record": {"method": "lora", "seed": 0}, "groups": ["a"]}


def trained(run="this", loss=1.0):
    return Result("train", {**LOG, "loss": [2.0, loss]}, SAID, {}, {"run": run})


@pytest.fixture
def outputs(tmp_path):
    return Outputs(tmp_path / "out", "train")


def test_a_result_is_found_again_and_its_figure_left_alone(outputs):
    assert outputs.earlier("this", force=False) is None
    outputs.save(trained())
    times = [path.stat().st_mtime_ns for path in (outputs.pdf, outputs.png)]
    assert outputs.earlier("this", force=False) == trained()
    assert [path.stat().st_mtime_ns for path in (outputs.pdf, outputs.png)] == times
    assert outputs.earlier("this", force=True) is None
    with pytest.raises(FileError, match=r"train\.json: exists already; `force` replaces it"):
        outputs.earlier("other", force=False)


def test_a_figure_that_is_missing_or_of_other_numbers_is_drawn(outputs):
    outputs.save(trained())
    drawn = outputs.pdf.read_bytes(), outputs.png.read_bytes()
    outputs.png.unlink()
    plots.save(plots.figure([trained(loss=1.5)]), outputs.pdf, force=True)
    outputs.earlier("this", force=False)
    assert (outputs.pdf.read_bytes(), outputs.png.read_bytes()) == drawn
    assert sorted(path.name for path in outputs.folder.iterdir()) == ["train.json", "train.pdf", "train.png"]


def test_a_damaged_result_is_computed_again_and_that_is_told(outputs):
    outputs.save(trained())
    outputs.json.write_text(outputs.json.read_text().replace("2.0", "3.0"))
    with pytest.warns(LoraLabWarning, match=r"train\.json: a damaged result \(.* checksum\); computed again"):
        assert outputs.earlier("this", force=False) is None
    outputs.save(trained())
    assert outputs.earlier("this", force=False) == trained()


@pytest.mark.parametrize("name", ["train.json", "train.pdf", "train.png"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_somebody_elses_is_refused_before_the_work(outputs, name, force):
    outputs.folder.mkdir()
    (outputs.folder / name).write_text("mine")
    with pytest.raises(FileError, match=rf"{name}: .*not written by lora-lab"):
        outputs.earlier("this", force=force)
    assert (outputs.folder / name).read_text() == "mine"


def test_long_names_lose_their_middle_once_and_stay_apart_in_a_table_that_is_too_wide(monkeypatch, capsys):
    names = [f"an-adapter-of-{'a-name-' * 6}that-is-long-{end}" for end in ("one", "two")]
    rows = [[names[0], names[1], 0.5, "a sentence that says what is the matter"], ["short", names[0], 1.5, "–"]]
    for width, whole in ((400, True), (80, False)):
        monkeypatch.setattr(terminal, "console", terminal.Plain(width=width))
        terminal.table("Pairs", ("first", "second", "number", "why"), rows, texts=2)
        out = capsys.readouterr().out
        assert (names[0] in out) == whole
        assert out.count("…") == (0 if whole else 3)
    cut = terminal.told_apart(names, 40)
    assert len(set(cut)) == 2
    assert all(len(name) == 40 for name in cut)
