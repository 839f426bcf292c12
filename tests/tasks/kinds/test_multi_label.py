"""Any number of labels a text: losses of transformers' own models, F1 of scikit-learn, what is refused."""

import json

import numpy as np
import pytest
import torch
from tiny_models import write_bert

from lora_lab import tasks
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.choosing import task_of
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

sklearn = pytest.importorskip("sklearn.metrics")

WORDS = ["good", "fine", "bad", "poor", "film", "book", "the", "a"]
TOPICS = {"film": "cinema", "book": "letters", "good": "praise", "fine": "praise"}


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT without a head, and posts whose words decide their topics; one of them never occurs."""
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", WORDS, kind="Model", initializer_range=0.3)
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        words = generator.choice(WORDS, generator.integers(2, 8)).tolist()
        topics = sorted({TOPICS[word] for word in words if word in TOPICS})
        rows.append({"text": " ".join(words), "topics": topics, **{t: int(t in topics) for t in set(TOPICS.values())}})
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def build(folder, *more, label='"topics"'):
    keys = ['kind = "multi-label"', 'base = "base"', 'data = "rows.jsonl"', 'text = "text"', f"label = {label}", *more]
    (folder / "my.toml").write_text("\n".join(keys) + "\n")
    return tasks.from_name(str(folder / "my.toml"))


NAMES = 'labels = ["praise", "sport", "letters", "cinema"]'


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_the_loss_is_the_models_own_and_metrics_are_those_of_scikit_learn(folder, threshold):
    task = build(folder, NAMES, f"threshold = {threshold}", "limit = 20")
    model = task.build_model()
    scores = task.score(model)
    (batch,) = task.split("test").batches(100)
    assert model(**batch).loss.item() == pytest.approx(scores.mean_loss, rel=1e-5)
    logits = model(**{n: t for n, t in batch.items() if n != "labels"}).logits
    said, right = (logits.sigmoid() > threshold).numpy(), batch["labels"].bool().numpy()
    assert 0 < said.mean() < 1
    expected = {
        "micro_f1": sklearn.f1_score(right, said, average="micro", zero_division=0.0),
        "macro_f1": sklearn.f1_score(right, said, average="macro", zero_division=0.0),
        "subset_accuracy": sklearn.accuracy_score(right, said),
        "loss": scores.mean_loss,
        "brier": np.square(logits.double().sigmoid().numpy() - right).mean(),
    }
    columns = task.columns(scores, task.split("test"))
    for name in task.metrics:
        assert task.metric(name).value(columns) == pytest.approx(
            expected[name], abs=1e-7 if name == "brier" else 1e-12
        ), name
        value, low, high = task.metric(name).estimate(columns, seed=0)
        assert low <= value <= high
    assert ((scores.margin > 0) == scores.correct).all()


def test_lists_and_columns_of_zeros_and_ones_are_the_same_labels(folder):
    lists = build(folder)
    columns = build(folder, label='["cinema", "letters", "praise"]')
    assert lists.names == columns.names == ["cinema", "letters", "praise"]
    for split in tasks.task.SPLITS:
        assert torch.equal(lists.split(split).inputs["labels"], columns.split(split).inputs["labels"])
    row = next(row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()) if row["topics"])
    write(folder, [{**row, "topics": [0, 2]}, {**row, "topics": [3]}] * 20)
    assert build(folder).names == ["0", "1", "2", "3"]
    assert build(folder).split("train").inputs["labels"].unique(dim=0).tolist() == [[0, 0, 0, 1], [1, 0, 1, 0]]


def test_numbers_with_names_go_by_these_and_a_finished_model_knows_their_order(folder):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    names = ["praise", "cinema", "letters"]
    table = {"text": ["good", "film", "book"] * 8, "topics": [[0], [1], [2, 0]] * 8}
    features = Features({"text": Value("string"), "topics": Sequence(ClassLabel(names=names))})
    DatasetDict({"train": Dataset.from_dict(table, features=features)}).save_to_disk(folder / "disk")
    task = build(folder)
    (folder / "my.toml").write_text((folder / "my.toml").read_text().replace('"rows.jsonl"', '"disk"'))

    def of_book():
        task = tasks.from_name(str(folder / "my.toml"))
        books = [i for i, text in enumerate(task.table("train")["text"]) if text == "book"]
        labels = task._labels(task.table("train"))[books[0]]
        return {task.names[i] for i in labels.nonzero().flatten().tolist()}, task.names

    assert of_book() == ({"praise", "letters"}, names)
    model = task.build_model()
    model.config.id2label = dict(enumerate(["letters", "cinema", "praise"]))
    model.save_pretrained(folder / "base")
    assert of_book() == ({"praise", "letters"}, ["letters", "cinema", "praise"])


def test_it_trains_is_scored_with_shared_prefixes_and_remembered_by_the_adapter(folder):
    task = build(folder, 'head = "trained"')
    adapter, _ = train(task, Recipe(method="lora", steps=100, learning_rate=1e-2))
    base, trained = score(task, None), score(task, adapter)
    f1 = task.metric("micro_f1")
    assert trained.mean_loss < 0.8 * base.mean_loss
    assert f1.value(trained.columns) > max(0.7, f1.value(base.columns))
    again = task_of(adapter)
    assert (score(again, adapter).loss == trained.loss).all()
    found = Shapley(worth="subset_accuracy").run([adapter], task)
    summary = found.summary["adapters"][0]
    assert summary["full"] == trained.accuracy
    assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
    assert summary["engine"]["why_not_shared"] is None
    table = Evaluate(base=False).run([adapter], task)
    assert table.columns["macro_f1"] == [task.metric("macro_f1").value(trained.columns)]
    for method, options in (("fisher", {"examples": 4}), ("adamerging", {"steps": 2})):
        merged = merge(Sources([adapter, adapter], tasks=[task, task]), method, options=options, heads="first").adapter
        assert np.isfinite(score(task, merged).loss).all()


def test_a_probe_is_one_logistic_regression_a_label(folder):
    from sklearn.linear_model import LogisticRegression

    task = build(folder, NAMES, 'head = "probe"', 'pool = "mean"')
    labels, features = task.split("train").inputs["labels"].numpy(), task._features()
    logits = task.logits(task.build_model(), task.split("train").batches(1000)[0]).detach()
    for i, name in enumerate(task.names):
        if name == "sport":  # which never occurs
            assert (logits[:, i] < -20).all()
            continue
        fitted = LogisticRegression(max_iter=2000).fit(features, labels[:, i])
        assert logits[:, i].numpy() == pytest.approx(fitted.decision_function(features), abs=1e-2)


ROW = {"text": "the film", "topics": ["a", "b"], "a": 1, "b": 0}
WRONG = [
    (
        {**ROW, "topics": "a b"},
        '"topics"',
        "a str in 'topics' .row 0 .*a list of labels is needed, or label = the names",
    ),
    ({**ROW, "topics": [1.5]}, '"topics"', "a label of the type float in 'topics' .row 0"),
    ({**ROW, "topics": ["a"]}, '"topics"', "'a' alone in 'topics' of its train split; two labels or more are needed"),
    ({**ROW, "topics": []}, '"topics"', "no label alone in 'topics'|a label of the type"),
    ({**ROW, "a": 2}, '["a", "b"]', "2 in 'a' .row 0 of a split. is neither 0 nor 1"),
    ({**ROW, "a": None}, '["a", "b"]', "an example without a number in 'a' .row 0"),
    (ROW, '["a", "c"]', "no column 'c'; there are: text, topics, a, b"),
]


@pytest.mark.parametrize(("row", "label", "text"), WRONG)
def test_what_is_no_list_of_labels_is_named_with_its_row(folder, row, label, text):
    write(folder, [row] * 10)
    with pytest.raises(TaskError, match=text):
        build(folder, label=label).split("train")


def test_a_label_that_training_does_not_know_is_named(folder):
    write(folder, [ROW] * 10)
    (folder / "test.jsonl").write_text(json.dumps({**ROW, "topics": ["a", "x"]}) + "\n")
    build(folder)
    text = (folder / "my.toml").read_text().replace('"rows.jsonl"', '{train = "rows.jsonl", test = "test.jsonl"}')
    (folder / "my.toml").write_text(text)
    with pytest.raises(TaskError, match=r"label 'x' \(row 0 of a split, counted from 0\) is none of a, b"):
        tasks.from_name(str(folder / "my.toml")).check_split("test")
