"""A killed run goes on from its newest whole checkpoint, and says which ones it passes over."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab.errors import LoraLabWarning
from lora_lab.files.disk import file_hash
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.checkpoints import _sealed
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("few_digits")

task = Digits("relabel")
RECIPE = Recipe(method="coto", steps=8, batch_size=4, save_every=2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The adapter of an uninterrupted run, and the folder that the same run leaves when it is killed at step 7."""
    folder = tmp_path_factory.mktemp("runs")
    whole, _ = train(task, RECIPE, checkpoints=folder / "whole")

    def kill(step, steps):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task, RECIPE, checkpoints=folder / "cut", progress=kill)
    return whole, folder / "cut"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(name):
    return lambda last, before: shutil.copy(before / name, last / name)


def renamed(last, before):
    shutil.rmtree(last)
    shutil.copytree(before, last)


DAMAGES = {
    "optimizer.pt is missing": lambda last, before: (last / "optimizer.pt").unlink(),
    "scheduler.pt is missing": lambda last, before: (last / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda last, before: (last / "rng_state.pth").unlink(),
    "trainer_state.json is missing": lambda last, before: (last / "trainer_state.json").unlink(),
    "adapter_model.safetensors is not as it was written": swap("adapter_model.safetensors"),
    "trainer_state.json is not as it was written": swap("trainer_state.json"),
    "scheduler.pt is not as it was written": swap("scheduler.pt"),
    "optimizer.pt is not as it was written": lambda last, before: cut(last / "optimizer.pt"),
    "it is of step 4": renamed,
    "it has no seal.json that can be read": lambda last, before: (last / "seal.json").unlink(),
    "it has no seal.json that can be read, so": lambda last, before: cut(last / "seal.json"),
    "its seal.json lists no optimizer.pt, scheduler.pt": lambda last, before: (last / "seal.json").write_text(
        '{"step": 6, "files": {"adapter_model.safetensors": "", "trainer_state.json": ""}}'
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_told_and_the_one_before_is_taken(said, killed, tmp_path):
    whole, left = killed
    shutil.copytree(left, tmp_path / "cut")
    last, before = (tmp_path / "cut" / f"checkpoint-{step}" for step in (6, 4))
    DAMAGES[said](last, before)
    steps = []
    pattern = rf"checkpoint-6: not used, {re.escape(said)}.*; checkpoint-4 is tried"
    with pytest.warns(LoraLabWarning, match=pattern):
        again, _ = train(task, RECIPE, checkpoints=tmp_path / "cut", progress=lambda step, _: steps.append(step))
    assert steps == [5, 6, 7, 8]
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in whole.tensors)


def test_without_a_whole_checkpoint_training_starts_again(killed, tmp_path):
    whole, left = killed
    shutil.copytree(left, tmp_path / "cut")
    for step in (2, 4, 6):
        (tmp_path / "cut" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    steps = []
    with pytest.warns(LoraLabWarning) as told:
        again, _ = train(task, RECIPE, checkpoints=tmp_path / "cut", progress=lambda step, _: steps.append(step))
    assert [str(each.message).rpartition("; ")[2] for each in told] == [
        "checkpoint-4 is tried",
        "checkpoint-2 is tried",
        "training starts again",
    ]
    assert steps == list(range(1, 9))
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in whole.tensors)


def test_a_whole_checkpoint_is_taken_without_a_word(killed, tmp_path):
    whole, left = killed
    shutil.copytree(left, tmp_path / "cut")
    steps = []
    again, _ = train(task, RECIPE, checkpoints=tmp_path / "cut", progress=lambda step, _: steps.append(step))
    assert steps == [7, 8]
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in whole.tensors)


def sealed_by_another(folder, monkeypatch, tmp_path):
    """The same checkpoints, all of them stamped and sealed again with another user's key."""
    with monkeypatch.context() as other:
        other.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
        for checkpoint in folder.glob("checkpoint-*"):
            content = json.loads((checkpoint / "seal.json").read_text())
            (checkpoint / "seal.json").write_text(json.dumps(_sealed({k: content[k] for k in ("step", "files")})))


@pytest.mark.parametrize("seal", ["another user's", "none"])
def test_somebody_elses_checkpoint_is_not_gone_on_from_and_signed(seal, killed, tmp_path, monkeypatch):
    whole, left = killed
    folder = tmp_path / "cut"
    shutil.copytree(left, folder)
    for checkpoint in folder.glob("checkpoint-*"):  # other weights, of which the list of files knows
        weights = checkpoint / "adapter_model.safetensors"
        save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
        content = json.loads((checkpoint / "seal.json").read_text())
        content["files"][weights.name] = file_hash(weights)
        (checkpoint / "seal.json").write_text(json.dumps({k: content[k] for k in ("step", "files")}))
    if seal != "none":
        sealed_by_another(folder, monkeypatch, tmp_path)
    steps = []
    with pytest.warns(LoraLabWarning, match="its seal.json is not by this user's key"):
        again, _ = train(task, RECIPE, checkpoints=folder, progress=lambda step, _: steps.append(step))
    assert steps == list(range(1, 9))
    assert all(torch.equal(again.tensors[key], whole.tensors[key]) for key in whole.tensors)
