"""The task of `lora-lab.toml` beside adapters that record none: judged as a stranger's record is."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from making_adapters import lora, write
from tiny_models import write_bert

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import LoraLabError, LoraLabNote, MismatchError, OptionError, TrustError
from lora_lab.tasks.beside import task_beside
from lora_lab.tasks.choosing import task_of

TASK = 'kind = "text-classification"\nbase = "base"\ndata = "reviews.csv"\ntext = "text"\nlabel = "label"\n'


@pytest.fixture
def folder(tmp_path, capsys):
    """A download: two adapters, a base, data, a task file, and a file that names it."""
    folder = tmp_path / "download"
    write_bert(folder / "base", tmp_path / "vocab.txt", ["good", "bad"])
    (folder / "reviews.csv").write_text("text,label\n" + "good,yes\nbad,no\n" * 20)
    (folder / "mine.toml").write_text(TASK)
    (folder / "lora-lab.toml").write_text('task = "mine.toml"\n[defaults]\nforce = true\n')
    for name in ("a", "b"):
        write(folder / name, lora("bert.encoder.layer.0.attention.self.query"))
    capsys.readouterr()
    return folder


def load(folder, *names):
    return [Adapter.load(folder / name) for name in names]


def test_the_task_of_the_folder_is_that_of_adapters_that_record_none(folder):
    with pytest.warns(LoraLabNote, match=r"mine.toml names its task: base 'base' \(beside it\), data 'reviews.csv'"):
        task = task_of(*load(folder, "a", "b"))
    assert task.reach.folder == str(folder)
    assert not task.reach.quotes
    assert len(task.split("train")) + len(task.split("validation")) + len(task.split("test")) == 40
    shutil.copy(folder / "a/adapter_model.safetensors", folder / "lone.safetensors")
    config = json.loads((folder / "a/adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(LoraLabNote):
        assert task_of(Adapter.load(folder / "lone.safetensors")).record == task.record
    (folder / "lora-lab.toml").write_text('task = "digits/relabel"')
    assert task_of(*load(folder, "a")).record == {"name": "digits/relabel"}


def test_a_record_and_a_task_that_is_named_win(folder):
    (adapter,) = load(folder, "a")
    recorded = Adapter(
        adapter.tensors,
        adapter.config,
        adapter.sites,
        {"task": {"name": "digits/rot90"}},
        adapter.source,
        adapter.origin,
    )
    assert task_of(recorded).record == {"name": "digits/rot90"}
    assert task_of(adapter, given="digits/invert").record == {"name": "digits/invert"}


def test_adapters_of_folders_with_different_tasks_have_none_together(folder):
    (folder / "lora-lab.toml").unlink()
    for name, task in (("a", "digits/relabel"), ("b", "digits/rot90")):
        (folder / name / "lora-lab.toml").write_text(f'task = "{task}"')
    assert task_of(*load(folder, "a")).record == {"name": "digits/relabel"}
    with pytest.raises(MismatchError, match="carries no record of its task"):
        task_of(*load(folder, "a", "b"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora-lab.toml": 'task = "evil.py:task"'}, TrustError, "names the task evil.py:task, whose code runs only"),
        ({"lora-lab.toml": 'task = "../out.toml"'}, TrustError, "leads out of"),
        ({"lora-lab.toml": "task = 3"}, OptionError, "task is 3; a built-in task or a task file in quotes is needed"),
        ({"lora-lab.toml": 'task = "none.toml"'}, LoraLabError, "none.toml: no such task file"),
        ({"mine.toml": TASK.replace('"base"', '"../base"')}, TrustError, "neither a path inside its own folder"),
        ({"mine.toml": TASK.replace("reviews.csv", "/etc/passwd.csv")}, TrustError, "neither a path inside"),
        ({"mine.toml": TASK.replace('"base"', '"someone/other"')}, TrustError, "its configuration names another base"),
        ({"mine.toml": TASK + "trust_remote_code = true"}, TrustError, "asks for trust_remote_code"),
        ({"mine.toml": TASK + 'device_map = "auto"'}, TrustError, "asks for device_map"),
    ],
)
def test_it_may_do_no_more_than_a_strangers_record(folder, change, error, message):
    Path(folder.parent / "out.toml").write_text(TASK)
    for name, text in change.items():
        (folder / name).write_text(text)
    with pytest.raises(error, match=message) as caught:
        task_of(*load(folder, "a"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="Windows asks for rights first")
def test_links_that_lead_out_are_refused(folder, tmp_path):
    (tmp_path / "secret.toml").write_text('task = "digits/relabel"')
    (folder / "lora-lab.toml").unlink()
    (folder / "lora-lab.toml").symlink_to(tmp_path / "secret.toml")
    with pytest.raises(TrustError, match="leads out of"):
        task_of(*load(folder, "a"))


def test_with_consent_it_may_lead_anywhere(folder, tmp_path):
    shutil.move(folder / "reviews.csv", tmp_path / "reviews.csv")
    (folder / "mine.toml").write_text(TASK.replace("reviews.csv", "../reviews.csv"))
    (adapter,) = load(folder, "a")
    with pytest.raises(TrustError):
        task_of(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabNote)
        assert len(task_of(adapter, trust_record=True).split("train"))


def test_an_adapter_in_memory_has_no_folder(folder):
    (adapter,) = load(folder, "a")
    made = Adapter(adapter.tensors, adapter.config, adapter.sites, {}, "made")
    assert task_beside(made) is None
    assert "digits/relabel" in list(tasks.TASKS)
