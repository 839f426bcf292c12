"""What an adapter from elsewhere may do: nothing but name what is its own."""

import json
import os
import shutil
import stat
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making_adapters import lora
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import write_bert
from transformers import AutoModelForSequenceClassification

from lora_lab import files, tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.writing import RECORD_KEY, SIGNATURE_KEY
from lora_lab.adapters.models.attached import peft_config
from lora_lab.analysis.coalitions import shapley
from lora_lab.errors import FileError, LoraLabError, LoraLabNote, TaskError, TrustError, TunerError
from lora_lab.files import trust
from lora_lab.hub import base_model
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources, base_of
from lora_lab.pruning.modules import structured
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.examples import TaskSpec
from lora_lab.tasks.choosing import task_of
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

MODULES = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
CODE = """
from pathlib import Path
Path(MARKER).write_text("this code ran")
from transformers import BertConfig, BertForSequenceClassification

class EvilConfig(BertConfig):
    model_type = "evil"

class EvilModel(BertForSequenceClassification):
    config_class = EvilConfig
"""


@pytest.fixture
def download(tmp_path, capsys):
    """A folder as it is downloaded: a base with its tokenizer, and a table of reviews."""
    folder = tmp_path / "download"
    words = ["good", "bad", "film", "book"]
    write_bert(folder / "base", tmp_path / "vocab.txt", words)
    rows = [f"{words[i % 2]} {words[2 + i % 3 % 2]},{'yes' if i % 2 else 'no'}" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows, ""]))
    capsys.readouterr()  # what transformers says as it saves
    return folder


RECORD = {"kind": "text-classification", "base": "base", "data": "reviews.csv", "text": "text", "label": "label"}


def adapter(record, *, seed=0, own=False, base="base", **config):
    """An adapter of the base, its record as it is given, keys that are never written among them."""
    tensors = {}
    for i, name in enumerate(MODULES):
        tensors |= lora(name, rows=16, columns=16, seed=seed * 10 + i)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], **config}
    config = {"base_model_name_or_path": base, "task_type": "SEQ_CLS", **config}
    found = Adapter(tensors, config, {}, {"task": record, "method": "lora", "seed": seed}, "made", trust.Origin(own))
    return found


def saved(path, record, **options):
    """Such an adapter in a file, its header as somebody else's program may write it."""
    made = adapter(record, **options)
    made.save(path)
    stamp(path, record=made.record)
    return Adapter.load(path)


def stamp(path, *, record=None, signature=None):
    """Write another record or signature into a file's header."""
    header, length = files.read_header(path)
    if record is not None:
        header["__metadata__"][RECORD_KEY] = json.dumps(record)
    if signature is not None:
        header["__metadata__"][SIGNATURE_KEY] = signature
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + path.read_bytes()[8 + length :])


VERBS = {
    "evaluate": ("evaluate", "a.safetensors"),
    "interpolate": ("interpolate", "a.safetensors", "b.safetensors"),
    "plane": ("plane", "a.safetensors", "b.safetensors", "--base"),
    "curve": ("curve", "a.safetensors", "b.safetensors"),
    "sharpness": ("sharpness", "a.safetensors"),
    "stability": ("stability", "a.safetensors"),
    "shapley": ("shapley", "a.safetensors"),
    "checkpoints": ("checkpoints", "run"),
    "sweep": ("sweep", "a.safetensors"),
    "compare-merges": ("compare-merges", "a.safetensors", "b.safetensors"),
    "merge": ("merge", "a.safetensors", "b.safetensors", "--method", "fisher", "-o", "m"),
    "merge-search": ("merge", "a.safetensors", "b.safetensors", "--search", "coefficient=0.5,1", "-o", "m"),
    "prune": ("prune", "a.safetensors", "--keep", "top-shapley:1", "-o", "p"),
}


def trap(download, marker):
    """Give the base code of its own, which leaves a mark when it is run."""
    config = json.loads((download / "base" / "config.json").read_text())
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForSequenceClassification": "evil.EvilModel"}
    config |= {"model_type": "evil", "auto_map": classes}
    (download / "base" / "config.json").write_text(json.dumps(config))
    (download / "base" / "evil.py").write_text(CODE.replace("MARKER", repr(str(marker))))


@pytest.mark.parametrize("asks", [True, False], ids=["asked for", "not asked for"])
def test_no_verb_runs_code_that_comes_with_a_downloaded_adapter(lora_lab, download, tmp_path, monkeypatch, asks):
    trap(download, tmp_path / "marker")
    record = {**RECORD, "trust_remote_code": True} if asks else RECORD
    for i, name in enumerate("ab"):
        saved(download / f"{name}.safetensors", record, seed=i)
    folder = download / "run" / "checkpoint-5"
    adapter(record).save(folder)
    stamp(folder / "adapter_model.safetensors", record=adapter(record).record)
    shutil.copytree(download / "base", folder / "base")
    shutil.copy(download / "reviews.csv", folder)
    monkeypatch.chdir(download)
    before = sorted(path.name for path in download.iterdir())
    for verb in VERBS.values():
        code, out, err = lora_lab(*verb)
        *notes, error = err.strip().split("\n")
        assert (code, out) == (1, ""), verb
        assert error.startswith("error: ")
        if asks:
            assert "asks for trust_remote_code" in error
            assert "--task" in error
            assert "--trust-record" in error
            assert not notes
        else:
            assert "needs code that comes with it" in error
            assert notes
            assert all(note.startswith("note: ") and "names its task" in note for note in filter(None, notes))
        assert not (tmp_path / "marker").exists(), verb
        assert [name for name in sorted(p.name for p in download.iterdir()) if name not in before] == [], verb
    if asks:  # the trap does close on those who step into it
        lora_lab(*VERBS["evaluate"], "--trust-record")
        assert (tmp_path / "marker").exists()


def test_nobody_is_asked_whether_code_may_run(download, tmp_path, monkeypatch):
    trap(download, tmp_path / "marker")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    with pytest.raises(TaskError, match="needs code that comes with it, which is not run"):
        base_model(str(download / "base"))
    assert not (tmp_path / "marker").exists()


class Pickled:
    """Leaves a mark when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_of_a_base_are_read_as_tensors_alone(download, tmp_path):
    (download / "base" / "model.safetensors").unlink()
    torch.save({"weight": Pickled(tmp_path / "marker")}, download / "base" / "pytorch_model.bin")
    found = saved(download / "a.safetensors", RECORD)
    with pytest.warns(LoraLabNote), pytest.raises(TaskError, match="cannot be loaded"):
        task_of(found).build_model()
    assert not (tmp_path / "marker").exists()
    torch.load(download / "base" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


def test_an_adapter_from_the_hub_has_its_snapshot_for_its_own_folder(download, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--someone--adapter"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    adapter(RECORD, base="someone/bert").save(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "someone").mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(download, "someone", dirs_exist_ok=True)  # what is called like it here is not its own
    found = Adapter.load("someone/adapter")
    assert found.origin == trust.Origin(False, str(cached / "snapshots" / ("0" * 40)))
    with pytest.raises(TrustError, match="base = 'base'"):
        task_of(found)
    shutil.copytree(download, found.origin.folder, dirs_exist_ok=True)
    with pytest.warns(LoraLabNote, match=r"base 'base' \(beside it\)"):
        assert Path(task_of(found).base).resolve() == Path(found.origin.folder, "base")


def test_what_is_passed_on_asks_for_nothing(lora_lab, download, monkeypatch):
    for i, name in enumerate("ab"):
        record = {**RECORD, "trust_remote_code": True, "device_map": "auto"}
        saved(download / f"{name}.safetensors", record, seed=i)
    monkeypatch.chdir(download)
    assert lora_lab("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors")[0] == 0
    assert lora_lab("prune", "a.safetensors", "--keep", "every-other", "-o", "p.safetensors")[0] == 0
    for name in "mp":
        header = files.read_header(Path(f"{name}.safetensors"))[0]["__metadata__"]
        assert SIGNATURE_KEY not in header
        assert "trust_remote_code" not in header[RECORD_KEY]
        assert "device_map" not in header[RECORD_KEY]
        assert json.loads(header[RECORD_KEY])["task"] == RECORD


def test_a_record_may_name_what_lies_in_its_own_folder(lora_lab, download, tmp_path):
    saved(download / "a.safetensors", RECORD)
    (tmp_path / "base").mkdir()  # not the adapter's
    code, out, err = lora_lab("evaluate", "download/a.safetensors")
    assert code == 0
    assert "text-classification/reviews" in out
    assert (
        err.strip()
        == "note: download/a.safetensors names its task: base 'base' (beside it), data 'reviews.csv' (beside it)"
    )


REFUSED = {
    "absolute base": ({"base": "/SOMEWHERE"}, "base"),
    "upward base": ({"base": "../elsewhere"}, "base"),
    "upward within": ({"data": "base/../../other.csv"}, "data"),
    "home": ({"data": "~/reviews.csv"}, "data"),
    "drive": ({"data": "C:\\reviews.csv"}, "data"),
    "address": ({"data": "https://example.org/reviews.csv"}, "data"),
    "protocol": ({"data": "hf://datasets/someone/data/reviews.csv"}, "data"),
    "chained protocols": ({"data": "zip://reviews.csv::other.zip"}, "data"),
    "pattern": ({"data": "*.csv"}, "data"),
    "link to a file": ({"data": "link.csv"}, "data"),
    "link to a folder": ({"base": "linked"}, "base"),
    "link within": ({"base": "mixed"}, "base"),
    "one of several": ({"data": {"train": "reviews.csv", "test": "../other.csv"}}, "data.test"),
    "another base": ({"base": "someone/else"}, "base"),
    "folder here": ({"data": "here/private"}, "data"),
    "revision": ({"revision": "evil"}, "revision"),
    "configuration": ({"data_config": "../../other"}, "data_config"),
    "device map": ({"device_map": "auto"}, "device_map"),
    "code": ({"trust_remote_code": True}, "trust_remote_code"),
}


@pytest.fixture
def surroundings(download, tmp_path, monkeypatch):
    """What lies outside of the download, and links that lead there."""
    (tmp_path / "other.csv").write_text("text,label\nsecret,yes\n")
    shutil.copytree(download / "base", tmp_path / "elsewhere")
    (tmp_path / "here" / "private").mkdir(parents=True)
    (download / "link.csv").symlink_to(tmp_path / "other.csv")
    (download / "linked").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(download / "base", download / "mixed")
    (download / "mixed" / "model.safetensors").unlink()
    (download / "mixed" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("surroundings")
def test_a_record_may_name_nothing_else(download, tmp_path, case):
    change, key = REFUSED[case]
    change = json.loads(json.dumps(change).replace("/SOMEWHERE", str(tmp_path / "elsewhere")))
    found = saved(download / "a.safetensors", {**RECORD, **change})
    with pytest.raises(TrustError) as refused:
        task_of(found)
    text = str(refused.value)
    assert "\n" not in text
    assert key in text
    assert str(download / "a.safetensors") in text
    assert "`task`" in text
    assert "`trust_record`" in text


@pytest.mark.parametrize("case", ["absolute base", "upward base", "link to a file", "link within", "device map"])
@pytest.mark.usefixtures("surroundings")
def test_with_the_users_word_a_record_may(download, tmp_path, monkeypatch, case):
    monkeypatch.chdir(download)
    change = json.loads(json.dumps(REFUSED[case][0]).replace("/SOMEWHERE", str(tmp_path / "elsewhere")))
    found = saved(download / "a.safetensors", {**RECORD, **change})
    with pytest.warns(LoraLabNote, match="names its task"):
        built = task_of(found, trust_record=True)
    assert built.spec.get("device_map") == change.get("device_map")
    assert "device_map" not in built.record
    assert not built.reach.quotes


def test_a_record_may_name_the_adapters_own_base_and_data_on_the_hub(download):
    hub = {**RECORD, "base": "someone/bert", "data": "someone/reviews", "revision": "v1"}
    found = saved(download / "a.safetensors", hub, base="someone/bert", revision="v1")
    with pytest.warns(
        LoraLabNote, match=r"base 'someone/bert' \(from the hub\), data 'someone/reviews' \(from the hub\)"
    ):
        built = task_of(found)
    assert (built.base, built.settings.data, built.settings.revision) == ("someone/bert", "someone/reviews", "v1")


def test_a_built_in_task_needs_no_word(download, recwarn):
    built = task_of(saved(download / "a.safetensors", {"name": "digits/mod3"}))
    assert built.name == "digits/mod3"
    assert not recwarn.list


@pytest.mark.parametrize("name", ["evil.toml", "evil", 3, ["digits/mod3"], None])
def test_a_name_in_a_record_is_never_a_files(download, monkeypatch, name):
    monkeypatch.chdir(download)
    for file in ("evil", "evil.toml"):
        Path(file).write_text("\n".join(f"{key} = {value!r}" for key, value in RECORD.items()))
    with pytest.raises(LoraLabError, match="unknown task in the record of"):
        task_of(saved(download / "a.safetensors", {"name": name}))


@pytest.mark.parametrize("record", ["digits/mod3", ["x"], 3, {"kind": ["x"]}, {"kind": 1}, {"base": "base"}])
def test_records_of_other_types_are_refused(download, record):
    with pytest.raises(LoraLabError):
        task_of(saved(download / "a.safetensors", record))


@pytest.mark.parametrize("name", ["csv", "json", "pandas", "text", "arrow"])
def test_a_reader_of_datasets_is_no_dataset(download, tmp_path, monkeypatch, name):
    (tmp_path / "train.csv").write_text("text,label\n" + "secret,yes\nsecret,no\n" * 20)
    monkeypatch.chdir(tmp_path)
    found = saved(download / "a.safetensors", {**RECORD, "data": name})
    with pytest.warns(LoraLabNote):
        built = task_of(found)
    with pytest.raises(TrustError, match=f"its data '{name}': a reader of files in the current folder"):
        built.split("test")


@pytest.mark.parametrize(
    "config",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "trap"},
        {"peft_type": "XLORA", "adapters": {"0": "someone/else"}, "hidden_size": 16},
        {"peft_type": "SHADOW", "shadow_model": "someone/else"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "someone/else", "num_virtual_tokens": 2},
    ],
    ids=lambda config: config.get("peft_type", "LORA"),
)
def test_a_configuration_loads_nothing_else(config):
    made = adapter(RECORD, **config)
    with pytest.raises(TunerError, match="its configuration has PEFT load more than its file"):
        peft_config(made)


@pytest.mark.parametrize(
    ("place", "target", "expected"),
    [
        ("hub/models--a--b/snapshots/1/x", "hub/models--a--b/blobs/x", True),
        ("hub/models--a--b/snapshots/1/x", "hub/models--c--d/blobs/x", False),
        ("hub/models--a--b/snapshots/1/x", "secret", False),
        ("models--a--b/other/1/x", "models--a--b/blobs/x", False),
    ],
)
def test_a_folder_in_the_hubs_cache_has_its_files_beside_it(tmp_path, place, target, expected):
    for path in (tmp_path / place, tmp_path / target):
        path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).touch()
    (tmp_path / place).symlink_to(tmp_path / target)
    assert trust.is_inside(tmp_path / place, str((tmp_path / place).parent)) is expected


# What a folder inside the download names in its turn


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def _edit(path, **more):
    _write(path, {**json.loads(path.read_text()), **more})


CARD = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
TURNS = {
    "card upward": lambda d, out: _write(d / "set/README.md", CARD.format("../../other.csv")),
    "card absolute": lambda d, out: _write(d / "set/README.md", CARD.format(out / "other.csv")),
    "card address": lambda d, out: _write(d / "set/README.md", CARD.format("https://127.0.0.1:9/x.csv")),
    "card chained": lambda d, out: _write(d / "set/README.md", CARD.format('"zip://x.csv::../../other.zip"')),
    "yaml upward": lambda d, out: _write(d / "set/.huggingface.yaml", CARD.format("../../*.csv").split("---")[1]),
    "state upward": lambda d, out: _write(d / "set/state.json", {"_data_files": [{"filename": "../../x.arrow"}]}),
    "splits upward": lambda d, out: _write(d / "set/dataset_dict.json", {"splits": ["../../other"]}),
    "link": lambda d, out: (d / "set/more.csv").symlink_to(out / "other.csv"),
    "adapter on top": lambda d, out: _write(d / "base/adapter_config.json", {"base_model_name_or_path": "some/one"}),
    "kernel": lambda d, out: _edit(d / "base/config.json", attn_implementation="someone/kernel"),
    "kernel below": lambda d, out: _edit(d / "base/config.json", sub={"_attn_implementation": "someone/kernel:x"}),
    "backbone": lambda d, out: _edit(d / "base/config.json", backbone="someone/resnet"),
    "vocabulary": lambda d, out: _edit(d / "base/tokenizer_config.json", vocab_file=str(out / "other.csv")),
    "shards": lambda d, out: _write(
        d / "base/model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}
    ),
}


@pytest.mark.parametrize("case", TURNS)
def test_what_it_names_names_nothing_outside_in_its_turn(download, tmp_path, case):
    (tmp_path / "other.csv").write_text("text,label\nsecret,yes\n")
    shutil.copytree(download / "base", download / "set" / "base")
    shutil.move(download / "reviews.csv", download / "set" / "reviews.csv")
    shutil.rmtree(download / "set" / "base")
    found = saved(download / "a.safetensors", {**RECORD, "data": "set"})
    with pytest.warns(LoraLabNote):
        score(task_of(found), found)  # as it is, it may
    TURNS[case](download, tmp_path)
    with pytest.raises(TrustError) as refused, warnings.catch_warnings(action="ignore"):
        score(task_of(found), found)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path", ["/OUT/picture.png", "../picture.png", "link.png"])
def test_pictures_are_read_from_its_own_folder_only(download, tmp_path, path):
    from PIL import Image

    for file in (tmp_path / "picture.png", download / "own.png"):
        Image.new("RGB", (4, 4)).save(file)
    (download / "link.png").symlink_to(tmp_path / "picture.png")
    path = path.replace("/OUT", str(tmp_path))
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=4, patch_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    ViTForImageClassification(config).save_pretrained(download / "vit")
    record = {"kind": "image-classification", "base": "vit", "data": "pictures.csv"}
    for name, fits in (("own.png", True), (path, False)):
        (download / "pictures.csv").write_text("image,label\n" + f"{name},0\n{name},1\n" * 10)
        with pytest.warns(LoraLabNote):
            built = task_of(saved(download / "p.safetensors", record))
        (download / "p.safetensors").unlink()
        if fits:
            assert len(built.split("test")) == 4
            continue
        with pytest.raises(TrustError, match="image 0 of its test split lies outside of") as refused:
            built.split("test")
        assert "picture.png" not in str(refused.value)


# What errors show


BROKEN = {
    "label": (
        {"labels": ["yes", "no"]},
        "text,label\nx,yes\n" + "x,secret\n" * 20,
        "label (a str, not shown) is none of",
    ),
    "column": ({"label": "other"}, "text,secret\n" + "x,secret\n" * 20, "no column 'other'; it has 2 others"),
    "number": ({}, "text,label\n" + "x,70077\n" * 20, "label (a int, not shown) in its test split"),
    "parser": ({}, 'text,label\nx,"secret\n', "cannot be read as a table ("),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_show_nothing_of_what_a_record_names(download, case):
    change, content, expected = BROKEN[case]
    (download / "reviews.csv").write_text(content)
    foreign = saved(download / "a.safetensors", {**RECORD, **change})
    with pytest.warns(LoraLabNote):
        built = task_of(foreign)
    with pytest.raises((TaskError, FileError)) as refused:
        built.split("test")
    assert expected in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "70077" not in str(refused.value)


def test_errors_show_nothing_of_a_conversation(download):
    template = "{{ raise_exception(messages[0]['content']) }}"
    (download / "base" / "chat_template.jinja").write_text(template)
    talk = [{"role": "user", "content": "secret"}, {"role": "assistant", "content": "x"}]
    (download / "talk.jsonl").write_text((json.dumps({"text": talk}) + "\n") * 20)
    record = {"kind": "causal-lm", "base": "base", "data": "talk.jsonl", "text": "text"}
    with pytest.warns(LoraLabNote):
        built = task_of(saved(download / "a.safetensors", record))
    with pytest.raises(
        TaskError, match="column 'text' holds other conversations than its base's template takes"
    ) as told:
        built.split("test")
    assert "secret" not in str(told.value)
    with pytest.raises(TaskError, match="secret"):
        tasks.from_record(record, base=download).split("test")


def test_errors_show_what_a_task_of_the_users_own_holds(download, monkeypatch):
    monkeypatch.chdir(download)
    (download / "reviews.csv").write_text(BROKEN["label"][1])
    with pytest.raises(TaskError, match=r"label 'secret' is none of 'yes', 'no' \(row \d+ of a split"):
        tasks.from_record({**RECORD, "labels": ["yes", "no"]}).split("test")


# Signatures


def test_ones_own_adapters_need_no_word_wherever_their_files_lie(lora_lab, download, tmp_path):
    text = "\n".join(f"{key} = {value!r}" for key, value in RECORD.items())
    (download / "my.toml").write_text(text.replace("'base'", repr(str(download / "base"))))
    (tmp_path / "runs").mkdir()
    code, _, err = lora_lab(
        *("train", "--task", "download/my.toml", "--method", "lora", "--steps", "4", "--save-every", "2"),
        *("-o", "runs/a.safetensors"),
    )
    assert code == 0, err
    recorded = Adapter.load("runs/a.safetensors").record["task"]
    assert not Path(recorded["base"]).is_relative_to("runs")
    (tmp_path / "away").mkdir()
    for path in ("runs/a.safetensors", "runs/a.checkpoints/checkpoint-2"):
        code, out, err = lora_lab("evaluate", path, "--no-base")
        assert (code, err.strip()) == (0, ""), path
        assert "text-classification/reviews" in out


@pytest.fixture
def own(download, monkeypatch):
    """An adapter of the user's own, whose base and data lie elsewhere."""
    monkeypatch.chdir(download.parent)
    record = {**RECORD, "base": str(download / "base"), "data": str(download / "reviews.csv")}
    path = download.parent / "own.safetensors"
    adapter(record, own=True).save(path)
    return path


def test_a_signature_holds_for_this_record_these_tensors_and_this_user(own, monkeypatch, tmp_path):
    found = Adapter.load(own)
    assert found.origin.own
    assert task_of(found).base == str(Path("download/base"))
    signature = files.read_header(own)[0]["__metadata__"][SIGNATURE_KEY]
    path = Path("other.safetensors")

    def as_read(made, **header):
        made.save(path, force=True)
        stamp(path, signature=signature, **header)
        return Adapter.load(path)

    foreign = replace(found, origin=trust.FOREIGN)
    assert as_read(foreign).origin.own
    assert not as_read(foreign, record={**found.record, "seed": 1}).origin.own
    name = next(iter(found.tensors))
    assert not as_read(replace(foreign, tensors={**found.tensors, name: found.tensors[name] * 1.001})).origin.own
    assert not as_read(replace(foreign, tensors={**found.tensors, name: found.tensors[name].double()})).origin.own
    assert not as_read(replace(foreign, config={**found.config, "lora_alpha": 80})).origin.own
    patterns = {"query": 8, "layer.0.attention.self.query": 2}
    for each, expected in ((patterns, True), (dict(reversed(patterns.items())), False)):  # the first match counts
        mine = replace(found, config={**found.config, "alpha_pattern": patterns})
        mine.save(path, force=True)
        signature = files.read_header(path)[0]["__metadata__"][SIGNATURE_KEY]
        assert as_read(replace(foreign, config={**found.config, "alpha_pattern": each})).origin.own is expected
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    assert not Adapter.load(own).origin.own
    with pytest.raises(TrustError, match="base = "):
        task_of(Adapter.load(own))
    for odd in ("", "é", "0" * 64):
        stamp(own, signature=odd)
        assert not Adapter.load(own).origin.own


def test_in_a_folder_a_changed_configuration_is_nobodys(own):
    Adapter.load(own).save("folder")
    assert Adapter.load("folder").origin.own
    config = Path("folder/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 80}))
    assert not Adapter.load("folder").origin.own


@pytest.mark.parametrize("depth", [101, 500, *range(960, 1000, 2), *range(961, 1000, 2), 5000])
def test_a_record_or_configuration_that_nests_deep_is_none(own, depth):
    Adapter.load(own).save("folder")
    deep = "[" * depth + "]" * depth
    header, length = files.read_header(own)
    header["__metadata__"][RECORD_KEY] = '{"deep": ' + deep + "}"
    text = json.dumps(header).encode()
    own.write_bytes(struct.pack("<Q", len(text)) + text + own.read_bytes()[8 + length :])
    assert Adapter.load(own).record == {}
    config = Path("folder/adapter_config.json")
    config.write_text(config.read_text().rstrip()[:-1] + ', "deep": ' + deep + "}")
    with pytest.raises(FileError, match=r"adapter_config\.json: not valid JSON \(nested deeper than 100 levels\)"):
        Adapter.load("folder")


def test_a_signature_of_an_earlier_version_holds(own):
    found = Adapter.load(own)
    header, tensors = files.read_header(own)[0], files.read_safetensors(own)[0]
    old = trust._signature(trust._key(make=False), json.loads(header["__metadata__"][RECORD_KEY]), tensors, None)
    assert old != header["__metadata__"][SIGNATURE_KEY]
    stamp(own, signature=old)
    assert Adapter.load(own).origin.own
    assert found.origin.own


def test_peft_reads_what_is_signed_and_equal_files_are_equal(download, own):
    adapter(RECORD, own=True, task_type=None).save(own, force=True)
    Adapter.load(own).save("folder")
    again = Adapter.load("folder")
    assert again.origin.own
    again.save("again.safetensors")
    assert Path("again.safetensors").read_bytes() == own.read_bytes()
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(download / "base"), "folder")
    state = load_file("folder/adapter_model.safetensors")
    names = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    assert names == set(state)


def test_the_key_is_the_users_alone_and_none_is_no_failure(download, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = adapter(RECORD, own=True)
    assert trust.is_own("0" * 64, {}, {}, {}) is False
    assert not (tmp_path / "config").exists()  # nothing is made for reading
    made.save(download / "a.safetensors")
    key = tmp_path / "config" / "lora-lab" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(bytes.fromhex(key.read_text())) == 32
    before = key.read_bytes()
    made.save(download / "b.safetensors")
    assert key.read_bytes() == before
    assert os.listdir(key.parent) == ["key"]
    for place, broken in enumerate(("", "abc", "00" * 8, "x" * 64)):
        key.write_text(broken)
        made.save(download / f"{place}.safetensors")
        assert not Adapter.load(download / f"{place}.safetensors").origin.own
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))  # no folder can be made there
    made.save(download / "c.safetensors")
    assert not Adapter.load(download / "c.safetensors").origin.own


def test_a_foreign_record_does_not_come_out_signed(own, tmp_path):
    mine = Adapter.load(own)
    foreign = saved(tmp_path / "f.safetensors", mine.record["task"], seed=1)
    bare = replace(foreign, record={})
    for pair, expected in (((mine, mine), True), ((mine, foreign), False), ((foreign, mine), False)):
        made = merge(Sources(pair)).adapter
        assert made.record["task"] == mine.record["task"]
        assert made.origin.own is expected
        made.save(tmp_path / "m.safetensors", force=True)
        assert Adapter.load(tmp_path / "m.safetensors").origin.own is expected
    assert merge(Sources((mine, bare))).adapter.origin.own
    keep = list(foreign.sites)[:1]
    assert structured(mine, keep, pattern="x").adapter.origin.own
    assert not structured(foreign, keep, pattern="x").adapter.origin.own


def test_a_base_for_merging_dora_is_named_by_the_same_rule(download, tmp_path):
    record = {**RECORD, "base": str(tmp_path / "base")}
    found = saved(download / "a.safetensors", record)
    needy = replace(found, config={**found.config, "use_dora": True})
    with pytest.raises(TrustError, match="base = "):
        base_of([needy], None)


def test_of_equal_records_ones_own_speaks(own, tmp_path):
    mine = Adapter.load(own)
    foreign = saved(tmp_path / "f.safetensors", mine.record["task"], seed=1)
    assert task_of(foreign, mine).reach == trust.ANYWHERE
    with pytest.raises(TrustError):
        task_of(foreign)


def test_workers_get_a_task_as_it_was_judged(download, monkeypatch):
    monkeypatch.chdir(download)
    found = saved(download / "a.safetensors", RECORD)
    with pytest.warns(LoraLabNote):
        built = task_of(found)
    again = TaskSpec.of(built).task()
    assert again.reach == built.reach == trust.Reach(str(download), quotes=False)
    assert (score(again, found).loss == score(built, found).loss).all()
    named = tasks.from_record({**RECORD, "trust_remote_code": True})
    assert TaskSpec.of(named).task().settings.trust_remote_code
    assert "trust_remote_code" not in named.record


def test_training_writes_no_such_key(download, monkeypatch):
    monkeypatch.chdir(download)
    made, log = train(tasks.from_record({**RECORD, "trust_remote_code": True}), Recipe(method="lora", steps=2))
    assert made.record["task"] == RECORD
    assert made.origin.own
    assert log.parameters["record"]["task"] == RECORD


def test_shapley_without_arguments_takes_ones_own_newest(lora_lab, download, own, monkeypatch):
    newer = saved(download / "newer.safetensors", RECORD)
    Adapter.load(own).save("older")
    os.utime("older/adapter_model.safetensors", (1, 1))
    os.utime(own, (2, 2))
    os.utime(newer.source, (3, 3))
    assert shapley.newest_adapter(Path()) == Path("own.safetensors")
    code, out, err = lora_lab("shapley", "--samples", "1", "--examples", "8", "--yes")
    assert code == 0, err
    assert "the newest of your own below this folder is own.safetensors" in err
    assert "Shapley values of own" in out
    own.unlink()
    assert shapley.newest_adapter(Path()) == Path("older")
    shutil.rmtree("older")
    assert shapley.newest_adapter(Path()) is None
