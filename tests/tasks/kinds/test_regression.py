"""Numbers for texts: losses of transformers' own models, metrics of scikit-learn and scipy, units, what is refused."""

import json

import numpy as np
import pytest
import torch
from tiny_models import write_bert
from transformers import AutoModelForSequenceClassification

from lora_lab import tasks
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import OptionError, TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.examples import examples_of
from lora_lab.tasks.choosing import task_of
from lora_lab.tasks.splits import trimmed
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

WORDS = ["good", "fine", "bad", "poor", "film", "book", "the", "a"]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT without a head, and grades that words decide: good counts 1, bad −1, on a scale from 100."""
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", WORDS, kind="Model", initializer_range=0.3)
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        words = generator.choice(WORDS, generator.integers(2, 8)).tolist()
        grade = sum((w in WORDS[:2]) - (w in WORDS[2:4]) for w in words)
        rows.append({"text": " ".join(words), "grade": 100.0 + 10 * grade, "length": len(words)})
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def build(folder, *more, target='"grade"'):
    keys = ['kind = "regression"', 'base = "base"', 'data = "rows.jsonl"', 'text = "text"', f"target = {target}", *more]
    (folder / "my.toml").write_text("\n".join(keys) + "\n")
    return tasks.from_name(str(folder / "my.toml"))


@pytest.mark.parametrize("target", ['"grade"', '["grade", "length"]'])
def test_the_loss_is_the_models_own_and_metrics_are_those_of_the_libraries(folder, target):
    task = build(folder, target=target)
    model, scores = task.build_model(), task.score(task.build_model())
    (batch,) = task.split("test").batches(100)
    assert model(**batch).loss.item() == pytest.approx(scores.mean_loss, rel=1e-5)
    table = task.table("test")
    order = task.split("test").inputs["labels"]
    said = model(**{n: t for n, t in batch.items() if n != "labels"}).logits.double().numpy()
    names = task.settings.targets
    assert sorted(table[names[0]]) == sorted(order[:, 0].tolist())
    expected = {
        "spearman": [stats.spearmanr(said[:, i], order[:, i]).statistic for i in range(len(names))],
        "pearson": [stats.pearsonr(said[:, i], order[:, i]).statistic for i in range(len(names))],
        "rmse": sklearn.root_mean_squared_error(order, said),
        "r2": sklearn.r2_score(order, said),
        "loss": sklearn.mean_squared_error(order, said),
    }
    columns = task.columns(scores, task.split("test"))
    for name in task.metrics:
        assert task.metric(name).value(columns) == pytest.approx(np.mean(expected[name]), rel=1e-5), name
        value, low, high = task.metric(name).estimate(columns, seed=0)
        assert low < value < high


def test_it_trains_in_standard_deviations_and_is_scored_in_the_datas_own_unit(folder):
    task = build(folder, "standardise = true", 'head = "trained"', 'pool = "mean"', 'metric = "rmse"')
    adapter, _ = train(task, Recipe(method="coto", steps=80, learning_rate=1e-2, seed=1))
    base, trained = score(task, None), score(task, adapter)
    assert trained.mean_loss < 0.5 * base.mean_loss
    assert sorted(trained["target"]) == pytest.approx(sorted(task.table("test")["grade"]))
    spread = np.std(task.table("train")["grade"])
    assert trained.loss == pytest.approx((trained["prediction"] - trained["target"]) ** 2 / spread**2, rel=1e-4)
    rmse = task.metric("rmse").value(task.columns(trained, task.split("test")))
    assert rmse < spread
    assert next(iter(adapter.record["metrics"]["validation"])) == "rmse"
    again = task_of(adapter)
    assert again.settings.standardise
    assert (score(again, adapter).loss == trained.loss).all()


def test_what_targets_are_standardised_by_counts_where_scores_are_kept(folder):
    before, plain = (examples_of(build(folder, *more), "train") for more in (("standardise = true",), ()))
    digest = [tensor.tolist() for tensor in build(folder, "standardise = true").digest]
    numbers = build(folder).table("train")["grade"]
    assert digest == [[pytest.approx(np.mean(numbers))], [pytest.approx(np.std(numbers))]]
    assert before != plain


def test_a_probe_is_ridge_regression_on_the_mean_of_tokens(folder):
    from sklearn.linear_model import Ridge

    task = build(folder, 'head = "probe"', 'pool = "mean"', target='["grade", "length"]')
    fitted = Ridge().fit(task._features(), task.split("train").inputs["labels"].double().numpy())
    weight, bias = task._probe
    assert weight.numpy() == pytest.approx(fitted.coef_, rel=1e-4, abs=1e-4)
    assert bias.numpy() == pytest.approx(fitted.intercept_, rel=1e-4)
    assert task.score(task.build_model()).mean_loss < task.score(build(folder, 'pool = "mean"').build_model()).mean_loss


def test_questions_by_the_loss_are_answered_and_by_the_accuracy_refused(folder):
    task = build(folder, "standardise = true")
    adapters = [train(task, Recipe(method="lora", steps=10, learning_rate=1e-2, seed=seed))[0] for seed in (0, 1)]
    found = Shapley(worth="loss").run(adapters[:1], task)
    summary = found.summary["adapters"][0]
    assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
    assert summary["engine"]["why_not_shared"] is None
    table = Evaluate().run(adapters, task)
    assert table.columns["loss"] == pytest.approx([score(task, a).mean_loss for a in (None, *adapters)], abs=1e-6)
    merged = merge(Sources(adapters, tasks=[task, task]), "regmean").adapter
    assert np.isfinite(score(task, merged).loss).all()
    with pytest.raises(OptionError, match="unknown worth of task my: 'accuracy'; there are: spearman"):
        Shapley(worth="accuracy").run(adapters[:1], task)
    with pytest.raises(TaskError, match="a regression gives numbers, not chances of labels"):
        merge(Sources(adapters, tasks=[task, task]), "fisher", options={"examples": 2})


def test_as_many_numbers_as_tokens_are_not_cut_with_the_padding(folder):
    labels = torch.rand(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    batch = trimmed({"input_ids": mask, "attention_mask": mask, "labels": labels})
    assert batch["input_ids"].shape == (2, 2)
    assert torch.equal(batch["labels"], labels)


ROW = {"text": "the film", "grade": 1.5, "length": 2}
WRONG = [
    ({**ROW, "grade": None}, "an example without a number in 'grade' .row 3 of a split"),
    ({**ROW, "grade": float("nan")}, "an example without a number in 'grade' .row 3"),
    ({**ROW, "grade": float("inf")}, "inf in 'grade' is no finite number .row 3"),
]


@pytest.mark.parametrize(("row", "text"), WRONG)
def test_what_is_no_number_is_named_with_its_row(folder, row, text):
    write(folder, [ROW, ROW, ROW, row])
    (folder / "split.jsonl").write_text((folder / "rows.jsonl").read_text())
    task = build(folder)
    (folder / "my.toml").write_text(
        (folder / "my.toml").read_text().replace('"rows.jsonl"', '{train = "rows.jsonl", test = "split.jsonl"}')
    )
    task = tasks.from_name(str(folder / "my.toml"))
    for check in (task.check_split, task.split):
        with pytest.raises(TaskError, match=text):
            check("test")


def test_words_truths_and_missing_columns_are_no_numbers(folder):
    write(folder, [{**ROW, "grade": "high"}] * 10)
    with pytest.raises(TaskError, match="'high' in 'grade' is no finite number"):
        build(folder).split("train")
    write(folder, [{**ROW, "grade": True}] * 10)
    with pytest.raises(TaskError, match="True in 'grade' is no finite number"):
        build(folder).split("train")
    write(folder, [{**ROW, "grade": "2.5"}] * 10)  # as a table with an empty cell gives its numbers
    assert build(folder).split("train").inputs["labels"][0].item() == 2.5
    with pytest.raises(TaskError, match="no column 'mark'; there are: text, grade, length"):
        build(folder, target='"mark"').split("train")
    with pytest.raises(TaskError, match="all 7 training targets in 'grade' are one number, which cannot be standard"):
        build(folder, "standardise = true").split("train")


def test_a_finished_head_of_another_size_is_refused_or_replaced(folder):
    task = build(folder)
    AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3).save_pretrained(folder / "base")
    with pytest.raises(TaskError, match=r"has 3 outputs and the data 1 labels; head = .trained. or .probe."):
        build(folder).build_model()
    task = build(folder, 'head = "trained"')
    assert task.build_model().classifier.out_features == 1
