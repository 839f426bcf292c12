import dataclasses

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DistilBertConfig,
    RobertaConfig,
)

from lora_lab import task, tasks
from lora_lab.errors import FileError, LoraLabError, OptionError, TaskError
from lora_lab.evaluate import evaluate, score, task_of
from lora_lab.recipe import Recipe
from lora_lab.train import train

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "book", "the", "a"]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with its tokenizer, and a table of 200 reviews in which one word decides."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=2,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    lines = ["text,label"]
    for i in range(200):
        lines.append(f"the {WORDS[6 + i % 2]} {WORDS[i % 6]},{'positive' if i % 6 < 3 else 'negative'}")
    (tmp_path / "reviews.csv").write_text("\n".join(lines) + "\n")
    write(tmp_path, "")
    return tmp_path


def write(folder, more, data='"reviews.csv"', label="label"):
    keys = f'kind = "text-classification"\nbase = "base"\ndata = {data}\ntext = "text"\nlabel = "{label}"\n'
    (folder / "my.toml").write_text(keys + more)
    return folder / "my.toml"


def test_a_task_file_trains_scores_and_is_remembered_by_the_adapter(folder):
    built = tasks.from_name(str(folder / "my.toml"))
    assert built.labels == 2
    assert {split: len(built.split(split)) for split in task.SPLITS} == {"train": 140, "validation": 20, "test": 40}
    adapter, _ = train(built, Recipe(method="lora", steps=60, learning_rate=1e-2))
    base, trained = score(built, None), score(built, adapter)
    assert trained.mean_loss < base.mean_loss - 0.1
    assert trained.accuracy > 0.9
    again = task_of(adapter)
    assert (score(again, adapter).loss == trained.loss).all()
    assert adapter.base_model == built.base


def test_tasks_that_share_a_name_are_scored_apart(folder):
    first = tasks.from_name(str(folder / "my.toml"))
    adapter, _ = train(first, Recipe(method="lora", steps=30, learning_rate=1e-2))
    flipped = (folder / "reviews.csv").read_text().replace("positive", "x").replace("negative", "positive")
    (folder / "flipped.csv").write_text(flipped.replace(",x", ",negative"))
    (folder / "two.toml").write_text((folder / "my.toml").read_text().replace("reviews.csv", "flipped.csv"))
    second = tasks.from_name(str(folder / "two.toml"))
    other = dataclasses.replace(adapter, record={**adapter.record, "task": second.record})
    found = evaluate([adapter, other], base=False)
    assert found.columns["loss"] == [score(first, adapter).mean_loss, score(second, adapter).mean_loss]
    assert found.columns["loss"][0] != found.columns["loss"][1]


def test_a_finished_classifier_keeps_the_order_of_its_labels(folder):
    import json

    config = json.loads((folder / "base" / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "negative"}
    config["label2id"] = {"positive": 0, "negative": 1}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    built = tasks.from_name(str(folder / "my.toml"))
    table = built.table("test")
    expected = [0 if label == "positive" else 1 for label in table["label"]]
    assert built.split("test").inputs["labels"].tolist() == expected  # all texts are as long


def test_another_base_is_another_run(folder):
    built = tasks.from_name(str(folder / "my.toml"))
    before = built.base_digest
    (folder / "base" / "config.json").write_text((folder / "base" / "config.json").read_text() + " ")
    assert built.base_digest != before


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ('max_length = "abc"', "max_length is 'abc'; a whole number"),
        ("limit = -5", "limit is -5; a whole number of at least 1"),
        ('learning_rate = "1e-3"', "learning_rate is '1e-3'; a number"),
        ("split_seed = -1", "split_seed is -1"),
        ("labels = [0, 1]", "labels is"),
    ],
)
def test_values_of_the_wrong_type_are_named(folder, more, text):
    with pytest.raises(OptionError, match=text):
        tasks.from_name(str(write(folder, more + "\n")))


def test_a_limit_draws_from_all_of_a_sorted_table(folder):
    head, *rows = (folder / "reviews.csv").read_text().splitlines()
    (folder / "reviews.csv").write_text("\n".join([head, *sorted(rows, key=lambda row: row[-8:])]) + "\n")
    write(folder, "limit = 20\n", data='{train = "reviews.csv", validation = "reviews.csv", test = "reviews.csv"}')
    built = tasks.from_name(str(folder / "my.toml"))
    labels = built.split("test").inputs["labels"]
    assert len(labels) == 20
    assert 3 < labels.sum() < 17
    again = tasks.from_name(str(folder / "my.toml"))
    assert (again.split("test").inputs["input_ids"] == built.split("test").inputs["input_ids"]).all()


TINY = {"vocab_size": 20, "num_labels": 2, "max_position_embeddings": 20, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (RobertaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **TINY), 2),
        (DistilBertConfig(dim=16, hidden_dim=32, n_layers=2, n_heads=2, **TINY), 2),
    ],
    ids=["roberta", "distilbert"],
)
def test_no_layer_of_a_head_is_adapted_and_all_of_them_are_trained_along(folder, config, heads):
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "base")
    frozen, _ = train(tasks.from_name(str(folder / "my.toml")), Recipe(method="lora", steps=2))
    assert len(frozen.sites) == 12
    assert not [name for name in frozen.sites if "classifier" in name]
    trained, _ = train(tasks.from_name(str(write(folder, 'head = "trained"\n'))), Recipe(method="lora", steps=2))
    assert set(trained.sites) == set(frozen.sites)
    assert len(trained.others) == 2 * heads
    trained.save(folder / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    loaded = PeftModel.from_pretrained(model, str(folder / "adapter"))
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 12


def test_splits_may_be_files_of_their_own(folder):
    table = (folder / "reviews.csv").read_text().splitlines()
    (folder / "dev.csv").write_text("\n".join([table[0], *table[1:9]]) + "\n")
    path = write(folder, "limit = 50\n", data='{train = "reviews.csv", validation = "dev.csv"}')
    built = tasks.from_name(str(path))
    assert len(built.split("train")) == 50
    assert len(built.split("validation")) == 8
    assert len(built.split("test")) == 40  # drawn from the training data, which has them no more
    train_texts = {tuple(row) for row in built.split("train").inputs["input_ids"].tolist()}
    assert len(train_texts) > 0


@pytest.mark.parametrize(
    ("more", "label", "error", "text"),
    [
        ("", "lable", TaskError, "no column 'lable'; there are: text, label"),
        ('labels = ["positive"]\n', "label", TaskError, "label 'negative' is none of 'positive'"),
        ("max_length = 3\nkinds = 1\n", "label", OptionError, "unknown key in"),
    ],
)
def test_what_does_not_fit_is_named(folder, more, label, error, text):
    path = write(folder, more, label=label)
    with pytest.raises(error, match=text):
        tasks.from_name(str(path)).split("train")


def test_numbers_beyond_the_models_outputs_are_out_of_range(folder):
    rows = "\n".join(f"the film,{i % 4}" for i in range(40))
    (folder / "reviews.csv").write_text("text,label\n" + rows + "\n")
    with pytest.raises(TaskError, match="labels go from 0 to 1"):
        tasks.from_name(str(folder / "my.toml")).split("train")


def test_labels_that_are_fractions_are_refused(folder):
    (folder / "reviews.csv").write_text("text,label\nthe film,0.5\nthe book,1.5\n")
    with pytest.raises(TaskError, match=r"label 0\.5 is a float|label 1\.5 is a float"):
        tasks.from_name(str(folder / "my.toml")).split("train")


def test_missing_data_and_missing_bases_are_named(folder):
    path = folder / "my.toml"
    text = path.read_text()
    path.write_text(text.replace('"base"', '"bsae/model"'))
    with pytest.raises(LoraLabError, match="its base 'bsae/model' cannot be loaded"):
        tasks.from_name(str(path)).build_model()
    path.write_text(text)
    (folder / "reviews.csv").unlink()
    with pytest.raises(FileError, match=r"its data .*reviews.csv is missing"):
        tasks.from_name(str(path)).split("train")


def test_the_example_file_is_valid_and_names_every_key(tmp_path):
    import tomllib
    from dataclasses import fields

    for kind, text in tasks.EXAMPLES.items():
        assert tomllib.loads(text)["kind"] == kind
        uncommented = "\n".join(line.removeprefix("# ") for line in text.splitlines()[1:] if "data = {" not in line)
        keys = tasks.KINDS[kind].__self__.Keys
        assert set(tomllib.loads(uncommented)) == {field.name for field in fields(keys)}
    with pytest.raises(OptionError, match="did you mean"):
        tasks.example("text-clasification")


def test_coalitions_and_pruning_work_on_texts_too(folder):
    from lora_lab.shapley import shapley
    from lora_lab.stability import stability
    from lora_lab.sweep import sweep

    built = tasks.from_name(str(folder / "my.toml"))
    adapter, _ = train(built, Recipe(method="lora", steps=60, learning_rate=1e-2, rank=2))
    for by in ("layer", "type", "rank"):
        found = shapley([adapter], built, by=by, estimator="regression" if by == "rank" else None, samples=3)
        summary = found.summary["adapters"][0]
        assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
        assert summary["full"] == pytest.approx(score(built, adapter).accuracy)
        assert summary["engine"]["why_not_shared"] is None
    found = stability([adapter, adapter], built)
    assert len({row["adapter"] for row in found.rows()}) == 2
    (row,) = found.rows(family="k-of-G", label="0", rescaled=False, adapter=found.columns["adapter"][0])
    assert row["loss"] == pytest.approx(score(built, None).mean_loss, abs=1e-6)
    found = sweep([adapter], built, sparsities=(0.0, 1.0), draws=2)
    assert found.rows(label="1", criterion="magnitude")[0]["loss"] == pytest.approx(
        score(built, None).mean_loss, abs=1e-6
    )
    assert {row["label"] for row in found.rows(kind="structured")} >= {"even", "odd", "type:query"}
