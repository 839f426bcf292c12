"""A small run of claims from trainings to verdicts, and again, and with more seeds."""

import csv

import pytest

import lora_lab as ll
from lora_lab.results.result import Result

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")

MINE = """
[testbed.small]
about = "digits, a few steps"
tasks = ["digits/relabel"]
training_s = 3600
recipe = { steps = 8, batch_size = 8, target_modules = ["q_proj", "fc1"] }

[[claim]]
name = "more-steps"
says = "Sixteen steps are better than eight"
source = "common sense"
statistic = "task-score"
direction = "higher"
treated = { method = "lora", steps = 16 }
control = { method = "lora" }
least = 0.01

[[claim]]
name = "halfway"
says = "Halfway there is something"
source = "nobody"
statistic = "on-line"
where = { space = "delta", t = 0.5 }
options = { points = 3, spaces = ["delta"] }
direction = "higher"
treated = { method = "lora" }
against = 0.05
least = 0.0

[[claim]]
name = "quick"
says = "Eight steps take less time than sixteen"
source = "common sense"
published = [{ of = "elsewhere", control = 8.5, treated = 4.25, unit = "h" }]
statistic = "training-time"
direction = "lower"
treated = { method = "lora" }
control = { method = "lora", steps = 16 }
least = 0.0

[[claim]]
name = "twins"
says = "Eight steps end nearer to sixteen of the same seed than to eight of another"
source = "common sense"
statistic = "twins-cosine"
direction = "higher"
treated = { method = "lora" }
control = { method = "lora", steps = 16 }
least = 0.1

[[claim]]
name = "nothing"
says = "A family that there is none of"
source = "nobody"
statistic = "with-layers"
where = { family = "none", label = "x", rescaled = false }
options = { samples = 2, every = false, examples = 10 }
direction = "higher"
treated = { method = "lora" }
least = 0.0
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_from_trainings_to_verdicts_and_nothing_is_computed_twice(mine, lora_lab, tmp_path):
    asked = {"testbed": "small", "file": mine, "seeds": 3, "processes": 1, "progress": False}
    result = ll.reproduce(tmp_path / "lab", **asked)
    rows = {row["claim"]: row for row in result.rows()}
    assert list(rows) == ["more-steps", "halfway", "quick", "twins", "nothing"]
    adapters = sorted(path.name for path in (tmp_path / "lab" / "runs" / "digits-relabel").glob("*.safetensors"))
    assert len(adapters) == 6
    scores = {}
    for name in adapters:
        row = ll.evaluate(tmp_path / "lab" / "runs" / "digits-relabel" / name, base=False, progress=False).rows()[0]
        scores.setdefault(name.rpartition("-s")[0], []).append(row["accuracy"])
    groups = {key: sum(values) / 3 for key, values in scores.items()}
    assert sorted(groups.values()) == pytest.approx(
        sorted([rows["more-steps"]["of_treated"], rows["more-steps"]["of_control"]])
    )
    assert rows["more-steps"]["difference"] == pytest.approx(
        rows["more-steps"]["of_treated"] - rows["more-steps"]["of_control"]
    )
    assert rows["halfway"]["units"] == 3
    assert rows["halfway"]["of_control"] is None
    assert rows["halfway"]["difference"] == pytest.approx(rows["halfway"]["of_treated"] - 0.05)
    runs = tmp_path / "lab" / "runs" / "digits-relabel"
    steps = {way: Result.load(runs / f"{way}-s0.train.json").parameters["record"]["recipe"]["steps"] for way in groups}
    eight, sixteen = sorted(groups, key=steps.get)
    pairs = ll.compare([runs / f"{way}-s{seed}.safetensors" for way in (eight, sixteen) for seed in range(3)])
    found = {tuple(row["indices"]): row["cosine"] for row in pairs.rows(level="total")}
    twins = sum(found[seed, seed + 3] for seed in range(3)) / 3
    strangers = sum(found[pair] for pair in ((0, 1), (0, 2), (1, 2))) / 3
    assert (rows["twins"]["of_treated"], rows["twins"]["of_control"]) == pytest.approx((twins, strangers))
    assert (rows["twins"]["units"], rows["twins"]["verdict"]) == (3, "holds")
    assert rows["quick"]["unit"] == "s"
    assert rows["quick"]["difference"] < 0
    assert rows["nothing"]["verdict"] == "cannot be told"
    assert rows["nothing"]["why"] == "the question has no such number of these adapters"
    assert result.parameters["seeds"] == 3
    saved = Result.load(result.save(tmp_path / "r.json"))
    assert saved.columns == result.columns

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "lab").rglob("*") if path.is_file()}
    again = ll.reproduce(tmp_path / "lab", **(asked | {"processes": 2}))
    assert again.columns == result.columns
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "lab").rglob("*") if path.is_file()}
    assert rows["halfway"]["paired"] is True
    assert [rows[name]["paired"] for name in ("quick", "nothing")] == [None, None]

    words = ("reproduce", "--claims", mine, "--testbed", "small", "--seeds", 3, "--jobs", 1, "-o", tmp_path / "lab")
    code, out, err = lora_lab(*words, "--latex", "--csv")
    assert code == 0, err
    assert "published" not in out + (tmp_path / "lab" / "reproduce.tex").read_text()
    with (tmp_path / "lab" / "reproduce.csv").open() as file:
        table = {row["claim"]: row for row in csv.DictReader(file)}
    assert table["quick"]["published_difference"] == "-4.25"
    assert (table["halfway"]["published_control"], table["halfway"]["paired"]) == ("", "True")
    code, out, err = lora_lab(*words, "--latex", "--published")
    assert code == 0, err
    for text in (" ".join(out.split()), (tmp_path / "lab" / "reproduce.tex").read_text()):
        for word in ("published", "elsewhere", "8.5", "4.25", "-4.25"):
            assert word in text.replace("−", "-"), word


def test_the_verb_says_what_it_would_do(mine, lora_lab, tmp_path):
    mine.write_text(
        MINE + '[[claim]]\nname = "merged"\nsays = "Of tasks that there are none of"\nsource = "nobody"\n'
        'statistic = "after-merging"\nwhere = { merge = "ties" }\noptions = { methods = ["ties"] }\n'
        'direction = "higher"\ntreated = { method = "lora" }\nleast = 0.0\n'
    )
    code, out, err = lora_lab("reproduce", "--claims", mine, "--testbed", "small", "--dry-run")
    assert code == 0, err
    assert "5 claims on small" in err
    assert "Of tasks that there are none of" not in out
    assert "Sixteen steps are better than eight" in out
    assert "10 trainings" in err
    assert "about 10.0 h of a core" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
    code, _, err = lora_lab("reproduce", "haldway", "--claims", mine, "--testbed", "small")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: unknown claim 'haldway'")
    assert "did you mean 'halfway'" in err


def test_a_run_cut_off_in_its_trainings_or_its_questions_goes_on_to_the_same_end(mine, tmp_path, monkeypatch):
    from lora_lab.claims import reproduce
    from lora_lab.training import fit

    asked = {"testbed": "small", "file": mine, "seeds": 2, "processes": 1, "progress": False}
    asked["claims"] = ("halfway",)
    whole = ll.reproduce(tmp_path / "whole", **asked)
    train, answer, left = fit.train, reproduce.answer, {"trainings": 1, "answers": 0}

    def cut(what, function):
        def called(*given, **more):
            left[what] -= 1
            if left[what] < 0:
                raise KeyboardInterrupt
            return function(*given, **more)

        return called

    monkeypatch.setattr(fit, "train", cut("trainings", train))
    with pytest.raises(KeyboardInterrupt):
        ll.reproduce(tmp_path / "lab", **asked)
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "lab").rglob("*.safetensors")}
    assert len(runs) == 1
    monkeypatch.setattr(fit, "train", train)
    monkeypatch.setattr(reproduce, "answer", cut("answers", answer))
    with pytest.raises(KeyboardInterrupt):
        ll.reproduce(tmp_path / "lab", **asked)
    monkeypatch.setattr(reproduce, "answer", answer)
    assert ll.reproduce(tmp_path / "lab", **asked).columns == whole.columns
    for path, stamp in runs.items():
        assert path.stat().st_mtime_ns == stamp
