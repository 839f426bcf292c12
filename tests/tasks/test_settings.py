"""Keys of task files: what is wrong with one is told in a line that names the file, the key and what would be right."""

import dataclasses
import re
import subprocess
import sys

import pytest

from lora_lab import tasks
from lora_lab.errors import OptionError
from lora_lab.tasks.kinds.registry import KINDS

SOUND = {
    "text-classification": {"text": "text", "label": "label"},
    "regression": {"text": "text", "target": "grade"},
    "token-classification": {"words": "words", "tags": "tags"},
    "question-answering": {"question": "question", "context": "context", "answers": "answers"},
    "multi-label": {"text": "text", "label": "topics"},
    "causal-lm": {"text": "text"},
    "multiple-choice": {"prompt": "{question}", "options": "choices", "label": "label"},
    "image-classification": {},
    "clip": {},
    "generation": {"prompt": "{question}", "answer": "answer"},
    "lm-eval": {"tasks": ["arc_easy"]},
    "preference": {"prompt": "{question}", "chosen": "chosen", "rejected": "rejected"},
    "seq2seq": {"source": "text", "target": "summary"},
}
WRONG = [
    (
        "text-classification",
        "limit",
        "3",
        "limit is '3'; a whole number of at least 1 or a table of such numbers by split is needed",
    ),
    (
        "text-classification",
        "limit",
        True,
        "limit is True; a whole number of at least 1 or a table of such numbers by split is needed",
    ),
    ("text-classification", "limit", {"train": 0}, "limit is {'train': 0}; a whole number of at least 1 or a table"),
    ("text-classification", "limit", {"tests": 3}, "unknown split in here.toml: 'tests'"),
    (
        "text-classification",
        "limit",
        3.0,
        "limit is 3.0; a whole number of at least 1 or a table of such numbers by split is needed",
    ),
    ("text-classification", "split_seed", -1, "split_seed is -1; a whole number of at least 0 is needed"),
    ("text-classification", "learning_rate", "1e-3", "learning_rate is '1e-3'; a number above 0 is needed"),
    ("text-classification", "learning_rate", float("inf"), "learning_rate is inf; a number above 0 is needed"),
    ("text-classification", "learning_rate", float("nan"), "learning_rate is nan; a number above 0 is needed"),
    ("text-classification", "learning_rate", False, "learning_rate is False; a number above 0 is needed"),
    ("text-classification", "trust_remote_code", 1, "trust_remote_code is 1; true or false is needed"),
    ("text-classification", "data", ["a.csv"], "data is ['a.csv']; a text or a table of texts is needed"),
    ("text-classification", "data", {"train": 1}, "data is {'train': 1}; a text or a table of texts is needed"),
    ("text-classification", "target_modules", ["q", 1], "target_modules is ['q', 1]; a text or a list of names is"),
    ("text-classification", "text_pair", 2, "text_pair is 2; the name of a column is needed"),
    ("text-classification", "splits", {"tset": "x"}, "unknown split in here.toml: 'tset' (did you mean 'test'?)"),
    ("text-classification", "dtype", "bfloat61", "unknown dtype in here.toml: 'bfloat61' (did you mean 'bfloat16'?)"),
    ("text-classification", "pool", 3, "pool is 3; one of own, mean is needed"),
    ("regression", "metric", "f1", "unknown metric in here.toml: 'f1'"),
    ("regression", "target", [], r"target is []; different columns, at least one, are needed"),
    ("regression", "target", 3, "target is 3; the name of a column or a list of names is needed"),
    ("regression", "standardise", 1, "standardise is 1; true or false is needed"),
    ("regression", "head", "probe", 'a probe needs pool = "mean"'),
    ("token-classification", "scheme", "IOBES", "scheme is 'IOBES'; one of BIO, plain is needed"),
    ("token-classification", "labels", ["O"], "labels is ['O']; different names, two or more, are needed"),
    ("question-answering", "stride", 384, "stride is 384; less than max_length, 384, is needed"),
    ("question-answering", "head", "probe", "unknown head in here.toml: 'probe'"),
    ("multi-label", "threshold", 1.0, "threshold is 1.0; a number between 0 and 1 is needed"),
    ("multi-label", "label", ["a"], "label is ['a']; different names, two or more, are needed"),
    ("multi-label", "labels", ["a", "a"], "labels is ['a', 'a']; different names, two or more, are needed"),
    ("causal-lm", "max_length", 1, "max_length is 1; a whole number of at least 2 is needed"),
    ("multiple-choice", "label_from", "1", "label_from is '1'; a whole number is needed"),
    ("multiple-choice", "options", 4, "options is 4; a text or a list of names is needed"),
    ("image-classification", "head", "prob", "unknown head in here.toml: 'prob' (did you mean 'probe'?)"),
    ("clip", "shots", 0, "shots is 0; a whole number of at least 1 is needed"),
]


WITHOUT_DATA = ("lm-eval",)


def build(kind, folder, keys=()):
    data = {} if kind in WITHOUT_DATA else {"data": "x.csv"}
    return tasks.from_record(
        {"kind": kind, "base": "base", **data, **SOUND[kind], **dict(keys)}, base=folder, where="here.toml"
    )


@pytest.mark.parametrize("kind", SOUND)
def test_every_key_may_have_its_default(kind, tmp_path):
    settings = build(kind, tmp_path).settings
    spelt = dataclasses.asdict(settings) | {"base": "base"} | ({} if kind in WITHOUT_DATA else {"data": "x.csv"})
    assert build(kind, tmp_path, spelt).settings == settings
    assert build(kind, tmp_path, {"learning_rate": 1}).settings.learning_rate == 1  # a whole number is a number


@pytest.mark.parametrize(("kind", "key", "value", "text"), WRONG)
def test_a_value_of_another_type_or_out_of_bounds_is_named(kind, key, value, text, tmp_path):
    with pytest.raises(OptionError) as found:
        build(kind, tmp_path, {key: value})
    assert text in str(found.value)
    assert "here.toml" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_misspelt_key_is_told_before_the_one_that_is_missing_for_it(tmp_path):
    record = {"kind": "causal-lm", "bsae": "x", "data": "x.csv", "text": "text", "limit": "3"}
    with pytest.raises(OptionError, match=r"unknown key in here.toml 'bsae' \(did you mean 'base'\?\)"):
        tasks.from_record(record, base=tmp_path, where="here.toml")
    del record["bsae"]
    with pytest.raises(OptionError, match=r"here.toml: no base, which a causal-lm task needs"):
        tasks.from_record(record, base=tmp_path, where="here.toml")


def test_what_checks_task_files_is_loaded_with_the_first_of_them():
    code = (
        "import sys; from lora_lab import tasks; tasks.from_name('digits/relabel'); print('pydantic' in sys.modules)\n"
        "try: tasks.from_record({'kind': 'clip'})\nexcept ValueError as error: print('pydantic' in sys.modules, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False", "True the record: no base, which a clip task needs"], done.stderr


def test_every_kind_is_checked_here_and_its_example_file_is_one(tmp_path):
    assert set(SOUND) == set(KINDS)
    for kind in KINDS:
        lines = tasks.example(kind).splitlines()
        path = tmp_path / "example.toml"
        path.write_text("\n".join(lines))
        assert tasks.from_file(path).kind == kind
        fields = {field.name for field in dataclasses.fields(type(tasks.from_file(path).settings))}
        told = {found[1] for line in lines if (found := re.match(r"(?:# )?(\w+) = ", line))}
        unused = {"data", "data_config", "splits", "split_seed"} if kind in WITHOUT_DATA else set()
        assert told == fields - unused, kind  # each key is there, in a comment perhaps, and no other


def test_where_the_harness_is_missing_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    told = r"a task of lm-evaluation-harness needs lm_eval, which is not installed: pip install 'lora-lab\[lm-eval\]'"
    with pytest.raises(OptionError, match=told):
        _ = build("lm-eval", tmp_path).metrics
