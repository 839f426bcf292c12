"""Stored scores are those of this very base, these data and this code, or they are computed again."""

import os
import shutil
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import Tiny, adapter, updates

from lora_lab.errors import FileError, MismatchError
from lora_lab.merging.kinds import MATRICES
from lora_lab.merging.methods import MERGES, Merge
from lora_lab.scoring.changes import LayerMask
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks import digests
from lora_lab.tasks.kinds.digits import Digits


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora-lab" / "hashes.json"


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_text(f"of {name}")
    return folder


def test_a_base_is_its_files_names_and_contents_and_nothing_else(base, tmp_path):
    whole = digests.of_folder(base)
    shutil.copytree(base, tmp_path / "elsewhere")
    assert digests.of_folder(tmp_path / "elsewhere") == whole  # other times, other inodes
    os.utime(base / "config.json", (0, 0))
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").touch()
    assert digests.of_folder(base) == whole
    seen = {whole}
    for change in (
        lambda: (base / "1_Pooling" / "config.json").write_text("of 1_Pooling/CONFIG.json"),
        lambda: (base / "config.json").rename(base / "other.json"),
        lambda: (base / "added").touch(),
        lambda: (base / "1_Pooling").rename(base / "2_Pooling"),
    ):
        change()
        seen.add(digests.of_folder(base))
    assert len(seen) == 5


@pytest.mark.parametrize("trick", ["times set back", "another file", "in its place"])
def test_a_change_that_keeps_size_and_times_is_seen(base, own_cache, monkeypatch, trick):
    path = base / "model.safetensors"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)  # so that the files count as old
    before, status = digests.of_folder(base), path.stat()
    assert own_cache.exists()
    new = path.read_text().upper()
    if trick == "another file":
        path.with_suffix(".new").write_text(new)
        os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(path.with_suffix(".new"), path)
    elif trick == "in its place":
        with path.open("r+") as file:
            file.write(new)
    else:
        path.write_text(new)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert digests.of_folder(base) != before


def test_only_old_files_are_taken_on_trust(base, monkeypatch, own_cache):
    read = []
    original = digests.hashlib.file_digest

    def counted(file, name):
        read.append(file.name)
        return original(file, name)

    monkeypatch.setattr(digests.hashlib, "file_digest", counted)
    now = time.time()
    for ahead, expected in ((0.0, 3), (0.0, 3), (-3600.0, 3), (100.0, 3), (100.0, 0), (200.0, 0)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: now + ahead)  # -3600: the files come from the future
        read.clear()
        digests.of_folder(base)
        assert len(read) == expected, ahead
    own_cache.write_text('{"damaged": ')
    read.clear()
    digests.of_folder(base)
    assert len(read) == 3


def test_a_damaged_cache_of_hashes_is_none_and_a_folder_that_cannot_be_read_is_named(base, own_cache, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    whole = digests.of_folder(base)
    for content in ("", "[1]", '{"x": 1}', "\0"):
        own_cache.write_text(content)
        assert digests.of_folder(base) == whole
    shutil.rmtree(own_cache.parent)
    own_cache.parent.write_text("a file where the cache should be")
    assert digests.of_folder(base) == whole
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", str(path))))
    with pytest.raises(FileError, match=r"base: cannot be read \(denied\)"):
        digests.of_folder(base)


def test_what_lora_lab_writes_into_a_base_is_not_part_of_it(base):
    from lora_lab.results.result import Result

    before = digests.of_folder(base)
    Result("demo", {"a": [1]}).save(base / "out" / "interpolate.json")
    adapter(updates(0)).save(base / "adapter.safetensors")
    assert digests.of_folder(base) == before


# code

SOURCE = '''
from lora_lab.tasks.task import Scores
from tiny_models import Tiny

FACTOR = 1.0
SHIFTS = {"margin": 0.0}

def scaled(loss):
    return FACTOR * loss

class Own(Tiny):
    bias = 0.0

    def judge_logits(self, logits, batch, *, keep_logits=False):
        """How it was."""
        found = Scores.of(logits.float(), batch["labels"], keep_logits=keep_logits)
        return Scores.judged(scaled(found.loss) + self.bias, found.correct, found.margin + SHIFTS["margin"])
'''
EDITS = {
    "the method": ("found.correct,", "~found.correct,"),
    "a function it calls": ("FACTOR * loss", "FACTOR + loss"),
    "a number of its module": ("FACTOR = 1.0", "FACTOR = 2.0"),
    "a table of its module": ('"margin": 0.0', '"margin": 1.0'),
    "an attribute of the class": ("bias = 0.0", "bias = 1.0"),
    "a new method": (
        "    bias = 0.0",
        "    bias = 0.0\n\n    def score(self, *args):\n        return super().score(*args)",
    ),
    "a default": ("def scaled(loss)", "def scaled(loss, power=2)"),
}


def own_task(monkeypatch, source, **options):
    module = types.ModuleType("users_own")
    monkeypatch.setitem(sys.modules, "users_own", module)
    exec(compile(source, "users_own.py", "exec"), module.__dict__)
    return module.Own(0, **options)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_task_class_is_another_one(monkeypatch, edit):
    before = digests.of_code(own_task(monkeypatch, SOURCE))
    assert before == digests.of_code(own_task(monkeypatch, SOURCE)) != ""
    old, new = EDITS[edit]
    assert old in SOURCE
    assert digests.of_code(own_task(monkeypatch, SOURCE.replace(old, new))) != before


def test_comments_places_and_what_scoring_leaves_behind_are_no_edits(monkeypatch):
    task = own_task(monkeypatch, SOURCE)
    before = digests.of_code(task)
    assert digests.of_code(own_task(monkeypatch, "# how it scores\n\n\n" + SOURCE)) == before
    task.score(task.build_model(), "validation")
    assert digests.of_code(task) == before
    assert digests.of_code(own_task(monkeypatch, SOURCE, examples=30)) != before


def test_a_task_of_this_package_counts_by_its_version():
    assert digests.of_code(Digits("relabel")) == ""


def test_outcomes_of_a_task_that_was_edited_since_are_not_taken_over(monkeypatch, tmp_path):
    one = adapter(updates(0))

    def scores(source):
        task = own_task(monkeypatch, source)
        on = Execution(torch.device("cpu"), cache=tmp_path / "outcomes")
        evaluator = Evaluator([one], task, on, split="validation")
        return evaluator.scores([LayerMask((1.0, 1.0, 1.0))])[0], evaluator.evaluated

    first, _ = scores(SOURCE)
    again, evaluated = scores(SOURCE)
    assert evaluated == 0
    assert np.array_equal(again.loss, first.loss)
    edited, evaluated = scores(SOURCE.replace("bias = 0.0", "bias = 1.0"))
    assert evaluated == 1
    assert edited.loss == pytest.approx(first.loss + 1)


def test_the_number_of_examples_is_checked(tmp_path):
    from lora_lab.errors import LoraLabWarning
    from lora_lab.scoring.examples import pack, remembered, unpack
    from lora_lab.scoring.journal import Journal
    from lora_lab.tasks.task import Scores

    n = 11
    scores = Scores.judged(np.arange(n) / 4, np.arange(n) % 3 == 0, np.arange(n) / 2, np.ones((n, 3), np.float32))
    packed = pack(scores)
    assert unpack(packed).correct.tolist() == scores.correct.tolist()
    journal = Journal(tmp_path / "j", "run")
    journal.add("whole", packed)
    kind, text = packed["columns"]["margin"]
    columns = [{**packed["columns"], "loss": [kind, text[:-8]]}, {**packed["columns"], "correct": ["bits", "AA=="]}, {}]
    for name, value in {
        "examples": {**packed, "examples": 12},
        "no examples": {**packed, "examples": 0},
        "columns": {**packed, "columns": columns[0]},
        "bits": {**packed, "columns": columns[1]},
        "none": {**packed, "columns": columns[2]},
        "logits": {**packed, "logits": [kind, text[:16]]},
        "kind": {**packed, "logits": ["float16", text]},
        "other": [None],
    }.items():
        journal.add(name, value)
        with pytest.warns(LoraLabWarning, match=r"j: scores that do not fit \(.*\) are computed again"):
            assert remembered(journal, name, n) is None
    assert remembered(journal, "missing", n) is None
    assert len(remembered(journal, "whole", n)) == n
    with pytest.warns(LoraLabWarning, match="11 examples, not 10"):
        assert remembered(journal, "whole", 10) is None


def test_a_damaged_probe_is_fitted_again(own_cache):
    from lora_lab.errors import LoraLabWarning
    from lora_lab.tasks.kinds.heads import logistic, probe

    split = Tiny(0).split("train")
    calls = []

    def features():
        calls.append(1)
        return split.inputs["x"].double().numpy()

    weight, bias = probe(["key"], split, 3, features, logistic)
    assert torch.equal(probe(["key"], split, 3, features, logistic)[0], weight)
    assert len(calls) == 1
    (place,) = own_cache.parent.glob("*.safetensors")
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(bytes(content))
    with pytest.warns(LoraLabWarning, match="damaged; the probe is fitted again"):
        again = probe(["key"], split, 3, features, logistic)
    assert len(calls) == 2
    assert torch.equal(again[0], weight)
    assert torch.equal(again[1], bias)


def test_what_scores_hang_on_changes_with_the_code_of_a_registered_entry(monkeypatch):
    task, seen = Digits("relabel"), []
    bodies = ("matrices[0]", "-matrices[0]", "-matrices[0]")
    for body in bodies:
        namespace = {"__name__": "mine"}
        exec(f"def mine(matrices, weights):\n    return {body}\n", namespace)
        monkeypatch.setitem(MERGES.entries, "mine", Merge(namespace["mine"], MATRICES))
        seen.append(Evaluator([adapter(updates(0))], task, split="validation").run_of("validation"))
    assert seen[0] != seen[1] == seen[2]
    monkeypatch.delitem(MERGES.entries, "mine")
    assert digests.of_entries() == ""


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("merging/rules/elementwise.py", True),
        ("merging/deeper/new.py", True),
        ("pruning/ranks.py", True),
        ("adapters/lowrank.py", True),
        ("geometry/aligning.py", True),
        ("adapters/files/reading.py", False),
        ("plots/views/lines/line.py", False),
    ],
)
def test_the_code_of_merges_and_prunings_is_every_file_that_makes_them(tmp_path, changed, counts):
    package = Path(digests.__file__).parents[1]
    for room in ("merging", "pruning", "adapters", "geometry", "plots"):
        shutil.copytree(package / room, tmp_path / room)
    assert digests.of_transforms(tmp_path) == digests.of_transforms()
    digests.of_transforms.cache_clear()
    (tmp_path / changed).parent.mkdir(exist_ok=True)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    assert (digests.of_transforms(tmp_path) != digests.of_transforms()) == counts


def test_a_worker_with_other_code_is_refused(monkeypatch):
    workers = types.SimpleNamespace(device="cpu", map=None)
    sent = Evaluator([adapter(updates(0))], Digits("relabel"), Execution(workers=workers))._setup
    monkeypatch.setattr(digests, "of_transforms", lambda: "other")
    with pytest.raises(MismatchError, match="merges and prunes by other code in a worker than here"):
        sent()
