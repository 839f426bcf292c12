"""Trainings called again after a kill: what is finished is kept, what is not goes on, nothing else is replaced."""

import dataclasses
import functools
import importlib
import json

import pytest
import torch

from lora_lab import plots
from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis import questions
from lora_lab.errors import AdapterError, FileError, LoraLabNote
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training import runs as parallel
from lora_lab.training.recipe import Recipe
from lora_lab.training.runs import Job, train_all

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")

task = Digits("relabel")
RECIPE = Recipe(method="coto", steps=4, batch_size=4)


def job(folder, seed=0, **changes):
    return Job(task.record, dataclasses.replace(RECIPE, seed=seed, **changes), folder / f"{seed}.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bytes of all files of the jobs with the seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("made")
    train_all([job(folder, seed) for seed in (0, 1)], processes=1)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path, made):
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The seeds that are trained, as the test goes on."""
    seeds, run = [], parallel._trained
    monkeypatch.setattr(parallel, "_trained", lambda job, progress: seeds.append(job.recipe.seed) or run(job, progress))
    return seeds


def contents(folder, seed):
    found = Adapter.load(folder / f"{seed}.safetensors")
    return {key: tensor.numpy().tobytes() for key, tensor in found.tensors.items()}, found.record


@pytest.mark.parametrize("missing", [[], [".train.pdf"], [".train.pdf", ".train.png"]])
def test_a_finished_training_is_kept_and_its_figure_drawn_if_it_is_missing(folder, made, trained, missing):
    for ending in missing:
        (folder / f"0{ending}").unlink()
    with pytest.warns(LoraLabNote, match=r"0.safetensors: this very training is there already, and kept"):
        (log,) = train_all([job(folder)])
    assert trained == []
    assert log.summary == json.loads(made["0.train.json"])["summary"]
    assert (folder / "0.safetensors").read_bytes() == made["0.safetensors"]
    assert all((folder / f"0.train.{ending}").stat().st_size > 1000 for ending in ("pdf", "png"))


@pytest.mark.parametrize("workers", [1, 2])
def test_only_what_is_left_is_trained_and_the_logs_come_in_the_order_of_the_jobs(folder, trained, workers):
    for path in folder.glob("0.*"):
        path.unlink()
    with pytest.warns(LoraLabNote, match=r"1.safetensors: this very training"):
        logs = train_all([job(folder, seed) for seed in (0, 1)], processes=workers)
    assert trained == [0]
    assert [log.provenance["seeds"] for log in logs] == [[0], [1]]


def test_a_log_without_its_adapter_is_of_a_killed_training_and_replaced(folder, made, trained):
    """A kill between any two of the files leaves what the next call completes."""
    for path in folder.glob("0.*"):
        if path.name != "0.train.json":
            path.unlink()
    train_all([job(folder)])
    assert trained == [0]
    assert (folder / "0.safetensors").exists()
    again = contents(folder, 0)
    (folder / "0.safetensors").write_bytes(made["0.safetensors"])
    assert again == contents(folder, 0)


def test_the_adapter_is_written_after_its_log(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Adapter, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_all([job(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["0.train.json"]
    monkeypatch.undo()
    monkeypatch.setattr(plots, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train_all([job(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "0.train.json"]


def other_record(folder):
    adapter = Adapter.load(folder / "0.safetensors")
    dataclasses.replace(adapter, record={**adapter.record, "pruned": {}}).save(folder / "0.safetensors", force=True)


def other_weights(folder):
    path = folder / "0.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # no longer what was signed
    path.write_bytes(content)


def other_data(folder):
    log = json.loads((folder / "0.train.json").read_text())
    log["provenance"]["data"] = "0" * 16
    (folder / "0.train.json").write_text(json.dumps(log))


DAMAGES = {
    "another record": other_record,
    "another weight": other_weights,
    "other data": other_data,
    "no log": lambda folder: (folder / "0.train.json").unlink(),
    "a cut log": lambda folder: (folder / "0.train.json").write_text("{"),
    "a text": lambda folder: (folder / "0.safetensors").write_text("mine"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_this_very_training_is_neither_kept_nor_replaced(folder, trained, damage):
    DAMAGES[damage](folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileError, match=r"0.safetensors: exists already"):
        train_all([job(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert trained == []


@pytest.mark.parametrize("changes", [{"steps": 5}, {"learning_rate": 1e-4}, {"method": "lora"}, {"rank": 2}])
def test_another_recipe_is_not_taken_for_this_one(folder, trained, changes):
    with pytest.raises(FileError, match=r"0.safetensors: exists already"):
        train_all([job(folder, **changes)])
    assert trained == []


def test_an_adapter_is_written_in_the_format_that_is_asked_for(folder, trained):
    plain = Adapter.load(folder / "0.safetensors")
    with pytest.raises(FileError, match=r"0.safetensors: exists already"):
        train_all([dataclasses.replace(job(folder), format="mlx")])
    asked = Job(task.record, job(folder).recipe, folder / "c.safetensors", format="mlx")
    train_all([asked])
    made = Adapter.load(asked.path)
    assert made.layout.format == "mlx"
    assert made.updates.keys() == plain.updates.keys()
    for name, update in plain.updates.items():
        assert float((made.updates[name] - update).norm()) <= 1e-6 * update.bound()
    with pytest.warns(LoraLabNote, match=r"c.safetensors: this very training is there already, and kept"):
        train_all([asked])
    assert trained == [0]


def test_a_format_that_cannot_carry_the_adapter_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lab.training.fit._optimise", None)
    for format_name, tuner, told in (("mlx", "oft", "OFT updates are no"), ("kohya", "lora", "no name that is known")):
        asked = Job(
            task.record, dataclasses.replace(RECIPE, peft=tuner), tmp_path / "a.safetensors", format=format_name
        )
        with pytest.raises(AdapterError, match=told):
            train_all([asked])
    assert list(tmp_path.iterdir()) == []


def test_force_trains_again(folder, trained):
    train_all([job(folder)], force=True)
    assert trained == [0]


def test_quickstart_called_again_trains_only_what_is_missing_and_draws(lora_lab, monkeypatch, tmp_path):
    importlib.import_module("lora_lab.cli.lines.interpolate")  # or it would keep the stand-in
    monkeypatch.setattr(Digits, "steps", 4)
    monkeypatch.setattr(
        questions, "Interpolate", functools.partial(questions.Interpolate, points=3, spaces=("factors",))
    )
    code, _, err = lora_lab("quickstart", "-o", "q", "--jobs", 1)
    assert code == 0, err
    assert "line.png" in err
    assert (tmp_path / "q" / "line.pdf").stat().st_size > 5000
    kept = {path.name: path.read_bytes() for path in (tmp_path / "q").glob("*.safetensors")}
    assert set(kept) == {f"{method}-s{seed}.safetensors" for method in ("lora", "coto") for seed in (0, 1)}
    for name in ("line.pdf", "line.png", "coto-s1.safetensors", "lora-s0.train.png"):
        (tmp_path / "q" / name).unlink()
    seeds, run = [], parallel._trained
    monkeypatch.setattr(
        parallel,
        "_trained",
        lambda job, progress: seeds.append((job.recipe.method, job.recipe.seed)) or run(job, progress),
    )
    code, _, err = lora_lab("quickstart", "-o", "q", "--jobs", 1)
    assert code == 0, err
    assert seeds == [("coto", 1)]
    assert err.count("this very training is there already, and kept") == 3
    assert all((tmp_path / "q" / name).exists() for name in ("line.pdf", "line.png", "lora-s0.train.png"))
    again = {path.name: Adapter.load(path).tensors for path in (tmp_path / "q").glob("*.safetensors")}
    for name, content in kept.items():
        (tmp_path / "then.safetensors").write_bytes(content)
        before = Adapter.load(tmp_path / "then.safetensors").tensors
        assert all(torch.equal(before[key], again[name][key]) for key in before)
