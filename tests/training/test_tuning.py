import dataclasses
import json
import math

import pytest

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import FileError, OptionError, TaskError
from lora_lab.results.result import Result
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split
from lora_lab.training import tuning
from lora_lab.training.recipe import Recipe
from lora_lab.training.runs import Job
from lora_lab.training.tuning import settings_of

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")

TASK = Digits("relabel")


def recipes(seeds=(0, 1)):
    return [Recipe(method="lora", seed=seed, steps=12, batch_size=8) for seed in seeds]


def trained(recipes, settings, paths, **how):
    jobs = [Job(TASK.record, recipe, path) for recipe, path in zip(recipes, paths, strict=True)]
    return tuning.train_best(jobs, settings, **how)


def test_settings_are_all_combinations_of_what_has_several_values():
    assert settings_of({"rank": [2], "steps": [5]}) == [{}]
    found = settings_of({"rank": [2, 4], "steps": [5], "learning_rate": [0.1, 0.2]})
    assert found == [
        {"rank": 2, "learning_rate": 0.1},
        {"rank": 2, "learning_rate": 0.2},
        {"rank": 4, "learning_rate": 0.1},
        {"rank": 4, "learning_rate": 0.2},
    ]


def test_the_best_by_mean_validation_accuracy_is_kept_and_the_rest_recorded(tmp_path, monkeypatch):
    paths = [tmp_path / f"lora-s{seed}.safetensors" for seed in (0, 1)]
    settings = settings_of({"learning_rate": [1e-5, 1e-2]})
    logs, tried = trained(recipes(), settings, paths, processes=1)
    rows = tried.summary["settings"]
    assert [row["learning_rate"] for row in rows] == [1e-5, 1e-2]
    assert [row["chosen"] for row in rows] == [row["accuracy"] == max(r["accuracy"] for r in rows) for row in rows]
    kept = [Adapter.load(path) for path in paths]
    own = [score(TASK, adapter, "validation") for adapter in kept]
    best = next(row for row in rows if row["chosen"])
    assert best["accuracy"] == pytest.approx(sum(s.accuracy for s in own) / 2)
    assert best["loss"] == pytest.approx(sum(s.mean_loss for s in own) / 2, abs=1e-5)
    for row in rows:
        seeds = tried.rows(learning_rate=row["learning_rate"])
        assert [each["seed"] for each in seeds] == [0, 1]
        assert row["accuracy"] == pytest.approx(sum(each["accuracy"] for each in seeds) / 2)
        assert {each["chosen"] for each in seeds} == {row["chosen"]}
    for adapter, log in zip(kept, logs, strict=True):
        assert adapter.record["tuning"] == rows
        assert adapter.record["recipe"]["learning_rate"] == best["learning_rate"]
        assert log.summary["validation"]["accuracy"] in [s.accuracy for s in own]
    assert len(list((tmp_path / "tried").glob("*.safetensors"))) == 4

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(tuning, "train_all", never)
    before = [path.read_bytes() for path in paths]
    paths[1].with_name("lora-s1.train.png").unlink()  # as after a kill in the last moment
    _, again = trained(recipes(), settings, paths)
    assert again.columns == tried.columns
    assert [path.read_bytes() for path in paths] == before
    assert paths[1].with_name("lora-s1.train.png").exists()
    longer = [dataclasses.replace(recipe, steps=13) for recipe in recipes()]
    with pytest.raises(FileError, match="exists already"):  # what was chosen among other trainings
        trained(longer, settings, paths)
    kept[1].save(paths[0], force=True)
    with pytest.raises(FileError, match="exists already"):  # of another seed
        trained(recipes(), settings, paths)


def test_another_metric_chooses_and_one_that_is_not_measured_is_refused(tmp_path, monkeypatch):
    logs = {
        1e-3: {"accuracy": 0.9, "loss": 0.7, "examples": 80},
        1e-2: {"accuracy": 0.8, "loss": 0.5, "examples": 80},
    }
    monkeypatch.setattr(tuning, "_validated", lambda log: {n: v for n, v in log.items() if n != "examples"})
    monkeypatch.setattr(tuning, "finished", lambda job, seen: logs[job.recipe.learning_rate])
    monkeypatch.setattr(tuning, "_keep", lambda *given: None)
    paths, settings = [tmp_path / "lora-s0.safetensors"], settings_of({"learning_rate": [1e-3, 1e-2]})
    for metric, chosen in (((), 1e-3), (("accuracy",), 1e-3), (("loss",), 1e-2), (("loss", "accuracy"), 1e-2)):
        _, tried = trained(recipes([0]), settings, paths, metric=metric)
        assert [row["learning_rate"] for row in tried.summary["settings"] if row["chosen"]] == [chosen]
        assert tried.parameters["criterion"] == (metric or ("accuracy",))[0]
    with pytest.raises(
        OptionError, match=r"metric that trainings on digits/relabel are judged by: 'ece'.*accuracy, loss"
    ):
        trained(recipes([0]), settings, paths, metric=("ece",))


def test_a_killed_run_trains_only_what_is_left(tmp_path, monkeypatch):
    paths = [tmp_path / "lora-s0.safetensors"]
    settings = settings_of({"learning_rate": [1e-3, 1e-2]})
    trained(recipes([0]), settings, paths, processes=1)
    for file in (tmp_path / "tried").glob("*0.01*"):
        file.unlink()
    left = []
    true = tuning.train_all
    monkeypatch.setattr(tuning, "train_all", lambda jobs, **k: left.extend(jobs) or true(jobs, **k))
    trained(recipes([0]), settings, paths, processes=1, force=True)
    assert [job.recipe.learning_rate for job in left] == [1e-2]
    left.clear()
    longer = [Recipe(method="lora", seed=0, steps=13, batch_size=8)]
    trained(longer, settings, paths, processes=1, force=True)
    assert len(left) == 2  # other trainings of the same name


def test_a_setting_that_diverges_is_a_row_and_never_chosen(tmp_path):
    paths = [tmp_path / "lora-s0.safetensors"]
    diverging = [Recipe(method="lora", seed=0, steps=12, batch_size=8, max_grad_norm=1e30)]
    _, tried = trained(diverging, settings_of({"learning_rate": [1e-3, 1e25]}), paths, processes=1)
    rows = tried.summary["settings"]
    assert rows[1] == {"learning_rate": 1e25, "accuracy": None, "loss": None, "chosen": False}
    assert rows[0]["chosen"]
    with pytest.raises(TaskError, match="diverged at every setting"):
        trained(
            diverging,
            settings_of({"learning_rate": [1e24, 1e25]}),
            [tmp_path / "b.safetensors"],
            processes=1,
        )
    assert not (tmp_path / "b.safetensors").exists()


def test_only_the_very_same_training_is_taken_over(tmp_path, monkeypatch):
    paths = [tmp_path / "lora-s0.safetensors"]
    settings = settings_of({"learning_rate": [1e-3, 1e-2]})
    first = [dataclasses.replace(recipe, rank=2, lora_plus=16.0) for recipe in recipes([0])]
    trained(first, settings, paths, processes=1)
    logs, _ = trained(recipes([0]), settings, paths, processes=1, force=True)
    recipe = logs[0].parameters["record"]["recipe"]
    assert (recipe["rank"], recipe["lora_plus"]) == (TASK.rank, None)  # the task's own, and none

    other = Digits("relabel").split("train").inputs["labels"].roll(1)
    true = Digits._load

    def changed_labels(self, name):
        inputs = true(self, name).inputs
        return Split({**inputs, "labels": other} if name == "train" else inputs)

    monkeypatch.setattr(Digits, "_load", changed_labels)
    _, changed = trained(recipes([0]), settings, paths, processes=1, force=True)
    _, again = trained(recipes([0]), settings, paths, processes=1, force=True)
    assert again.columns == changed.columns
    assert min(changed.columns["loss"]) > logs[0].summary["validation"]["loss"] + 0.05


def test_a_training_that_diverges_in_its_last_step_is_a_row_too(tmp_path):
    diverging = [Recipe(method="lora", seed=0, steps=1, batch_size=8, max_grad_norm=1e30)]
    paths, settings = [tmp_path / "lora-s0.safetensors"], settings_of({"learning_rate": [1e-3, 1e30]})
    _, tried = trained(diverging, settings, paths, processes=1)
    assert tried.columns["accuracy"][1] is None
    assert tried.columns["chosen"] == [True, False]


def test_records_stay_strict_json(tmp_path):
    paths = [tmp_path / "lora-s0.safetensors"]
    trained(recipes([0]), settings_of({"rank": [1, 2]}), paths, processes=1)
    record = Adapter.load(paths[0]).record
    assert json.loads(json.dumps(record, allow_nan=False))["tuning"][0]["rank"] == 1
    assert all(math.isfinite(row["loss"]) for row in record["tuning"])


def test_of_a_language_model_the_lowest_loss_is_best(tmp_path, monkeypatch):
    scored = {1e-3: (0.5, 1.0), 1e-2: (0.4, 0.9)}  # the better loss goes with the worse accuracy

    def scores(jobs, **_):
        found = [scored[job.recipe.learning_rate] for job in jobs]
        return [Result("train", {}, {}, {"validation": {"accuracy": a, "loss": loss}}) for a, loss in found]

    monkeypatch.setattr(tuning, "train_all", scores)
    monkeypatch.setattr(tuning, "_keep", lambda *_: None)
    for metrics, best in ((("accuracy", "loss"), 1e-3), (("loss", "accuracy"), 1e-2)):
        monkeypatch.setattr(Digits, "metrics", metrics)
        _, tried = trained(recipes([0]), settings_of({"learning_rate": [1e-3, 1e-2]}), [tmp_path / "a.safetensors"])
        assert [row["learning_rate"] for row in tried.rows(chosen=True)] == [best]
        assert tried.parameters["criterion"] == metrics[0]


def test_the_command_writes_what_every_setting_gave(lora_lab, tmp_path):
    code, out, err = lora_lab("train", "--lr", "1e-3,1e-2", "--steps", "4", "--seeds", "0-1", "--jobs", 1, "-o", "runs")
    assert code == 0
    assert "Tried, means over the seeds" in out
    assert "wrote runs/coto.tuning.json, runs/coto.tuning.pdf, runs/coto.tuning.png" in err
    tried = Result.load(tmp_path / "runs" / "coto.tuning.json")
    assert tried.columns["learning_rate"] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert (tmp_path / "runs" / "coto.tuning.pdf").read_bytes().startswith(b"%PDF")
