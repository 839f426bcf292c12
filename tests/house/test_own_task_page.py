"""The tasks of docs/your-own-task.md, word for word, on a tiny model."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_bert

from lora_lab import tasks
from lora_lab.analysis.questions import Evaluate
from lora_lab.scoring.evaluate import score
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs/your-own-task.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
WORDS = ["the", "red", "sky", "in", "rome", "where", "is"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the page's file runs: a base, and tables of each kind."""
    from transformers import BertForSequenceClassification

    write_bert(tmp_path / "base", tmp_path / "words.txt", WORDS)
    BertForSequenceClassification.from_pretrained(tmp_path / "base").bert.save_pretrained(tmp_path / "base")
    graded = [("the red sky", 3), ("the sky", 2), ("rome", 1), ("the sky in rome", 4)]
    tagged = [("red sky in rome", ["O", "O", "O", "B-LOC"]), ("the red sky", ["O", "B-PER", "I-PER"])]
    asked = [("where is the sky", "the red sky in rome", "rome"), ("where is rome", "in the sky", "sky")]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,grade\n" + "".join(f"{text},{n}\n" for text, n in graded))
        (tmp_path / f"{split}.tsv").write_text("".join(f"{text}\t{n % 2}\n" for text, n in graded))
    monkeypatch.chdir(tmp_path)

    def named(number, rows=()):
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "mine.py").write_text(BLOCKS[number].replace("path/to/model", str(tmp_path / "base")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tasks.from_name("mine.py:task")

    named.tagged = [{"words": text.split(), "tags": tags} for text, tags in tagged]
    named.asked = [dict(zip(("question", "text", "answer"), each, strict=True)) for each in asked]
    return named


def test_a_task_of_fifteen_lines_is_trained_and_scored(folder):
    code = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) <= 15
    task = folder(0)
    adapter, log = train(task, Recipe("lora", steps=2, batch_size=2, target_modules="all-linear"))
    assert set(log.summary["validation"]) == {"correct", "examples"}
    result = Evaluate().run([adapter], task)
    assert result.columns["examples"] == [4, 4]
    assert all(4 * value in range(5) for value in result.columns["correct"])


def test_a_regression_is_trained_and_scored(folder):
    task = folder(1)
    adapter, log = train(task, Recipe("lora", steps=2, batch_size=2, target_modules=["query"]))
    assert list(log.summary["validation"]) == ["spearman", "pearson", "rmse", "loss", "examples"]
    result = Evaluate(base=False).run([adapter], task)
    scores = score(task, adapter)
    assert scores["target"].tolist() == [3, 2, 1, 4]
    assert result.columns["rmse"] == [pytest.approx(np.sqrt(scores["loss"].mean()), rel=1e-5)]


def test_named_entities_have_f1_over_spans(folder):
    task = folder(2, folder.tagged)
    found = score(task, None)
    assert (found["hits"] + found["missed"]).tolist() == [1, 1]  # the entities that there are
    assert 0 <= task.metric("span_f1").value(found.columns) <= 1
    spans = task.score_batch.__globals__["spans"]
    assert spans(["B-PER", "I-PER", "B-PER", "I-LOC", "O"]) == {("PER", 0, 1), ("PER", 2, 2), ("LOC", 3, 3)}
    assert spans(["O", "B-LOC"]) == {("LOC", 1, 1)}


def test_answers_are_spans_of_their_texts(folder):
    task = folder(3, folder.asked)
    found = score(task, None)
    assert set(found.columns) == {"exact_match", "word_f1"}
    answer, places = (task.score_batch.__globals__[name] for name in ("answer", "TOKENS"))
    inside = [k for k, kind in enumerate(places.sequence_ids(0)) if kind == 1]
    assert answer(0, inside[1], inside[2]) == "red sky"
    overlap = task.score_batch.__globals__["overlap"]
    assert overlap("red sky", "the red sky") == pytest.approx(4 / 5)


def test_the_page_names_metrics_that_there_are():
    from lora_lab.tasks.scores.metrics import METRICS

    listed = PAGE.partition("`loss`, `accuracy`")[2].partition("are there")[0]
    assert set(re.findall(r"`(\w+)`", listed)) - {"correct", "loss", "tokens", "prediction", "target"} <= set(METRICS)
