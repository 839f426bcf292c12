"""Task files: any bytes, any keys, any values, and tables of any cells."""

import dataclasses
import gc
import json
import warnings

import hypothesis.strategies as st
import pytest
from strategies import attack, changed, dumps, scalars, texts, values

from lora_lab import tasks

# datasets leaves a table open that it could not read
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

KEYS = sorted({field.name for kind in tasks.KINDS.values() for field in dataclasses.fields(kind.build.__self__.Keys)})
EXAMPLES = [  # but lm-evaluation-harness', which reads the list of all of its tasks, whatever the file says
    kind.example for kind in tasks.KINDS.values() if not hasattr(kind.build.__self__.Keys, "include")
]
SOUND = 'kind = "text-classification"\nbase = "base"\ndata = "table.jsonl"\ntext = "text"\nlabel = "label"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "table.jsonl").write_text('{"text": "a b", "label": 0}\n{"text": "c", "label": 1}\n' * 8)
    yield folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # of the tables that datasets left open


def build(path, survived):
    with survived(path.stat().st_size):
        task = tasks.from_file(path)
        task.split("train")


@attack(data=st.one_of(st.binary(max_size=120), *[changed(text.encode()) for text in EXAMPLES]))
def test_any_bytes_are_a_task_or_refused(place, survived, data):
    path = place / "bytes.toml"
    path.write_bytes(data)
    build(path, survived)


@attack(kind=st.sampled_from(sorted(tasks.KINDS)), keys=st.dictionaries(st.sampled_from(KEYS), values, max_size=8))
def test_any_values_of_the_keys_are_a_task_or_refused(place, survived, kind, keys):
    path = place / "keys.toml"
    whole = {"kind": kind, "base": "base", "data": "table.jsonl", "text": "text", "label": "label", **keys}
    path.write_text(f"# {dumps(whole)[:20]!r}\n", errors="replace")
    with survived():
        tasks.from_record(whole, base=place, where=str(path)).split("train")


@attack(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["text", "label", "x"]), st.one_of(scalars, values), max_size=3), max_size=4
    )
)
def test_any_table_is_read_or_refused(place, survived, rows):
    (place / "odd.jsonl").write_text("\n".join(json.dumps(row) for row in rows), errors="replace")
    path = place / "odd.toml"
    path.write_text(SOUND.replace("table.jsonl", "odd.jsonl"))
    build(path, survived)


@attack(text=texts)
def test_any_csv_is_read_or_refused(place, survived, text):
    (place / "odd.csv").write_text(text, errors="replace")
    path = place / "csv.toml"
    path.write_text(SOUND.replace("table.jsonl", "odd.csv"))
    build(path, survived)
