import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel
from tiny_models import write_bert
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from lora_lab import tasks
from lora_lab.analysis.questions import Evaluate
from lora_lab.errors import FileError, LoraLabError, LoraLabWarning, MismatchError, OptionError, TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.examples import examples_of
from lora_lab.tasks import task
from lora_lab.tasks.choosing import task_of
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "book", "the", "a"]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with its tokenizer, and a table of 200 reviews in which one word decides."""
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", WORDS, initializer_range=0.3)
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


def test_a_base_from_the_hub_is_the_commit_that_its_branch_points_to(folder, monkeypatch):
    cache, commits = folder / "hub", {"main": "0" * 40, "newer": "1" * 40}
    cached = cache / "models--someone--bert"
    (cached / "refs").mkdir(parents=True)
    for branch, commit in commits.items():
        shutil.copytree(folder / "base", cached / "snapshots" / commit)
        (cached / "refs" / branch).write_text(commit)
    newer = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    newer.classifier.bias.data[0] += 1  # all of them alike would change no loss
    newer.save_pretrained(cached / "snapshots" / commits["newer"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def built(revision):
        path = write(folder, f'revision = "{revision}"\n')
        path.write_text(path.read_text().replace('base = "base"', 'base = "someone/bert"'))
        return tasks.from_name(str(path))

    first, second = built("main"), built("newer")
    assert (first.base_digest, second.base_digest) == (f"someone/bert@{'0' * 40}", f"someone/bert@{'1' * 40}")
    assert score(first, None).mean_loss == score(tasks.from_name(str(write(folder, ""))), None).mean_loss
    assert score(first, None).mean_loss != score(second, None).mean_loss
    adapter, _ = train(second, Recipe(method="lora", steps=3))
    again = task_of(adapter)
    assert (adapter.base_model, again.settings.revision) == ("someone/bert", "newer")
    assert (score(again, adapter).loss == score(second, adapter).loss).all()
    known = examples_of(second, "test")
    (cached / "refs" / "newer").write_text(commits["main"])
    assert examples_of(built("newer"), "test") != known  # nothing that is kept of the old base is used
    with pytest.raises(TaskError, match=r"'someone/bert' cannot be loaded .*give a folder"):
        score(built("gone"), None)


def test_tasks_that_share_a_name_are_scored_apart(folder):
    first = tasks.from_name(str(folder / "my.toml"))
    adapter, _ = train(first, Recipe(method="lora", steps=30, learning_rate=1e-2))
    flipped = (folder / "reviews.csv").read_text().replace("positive", "x").replace("negative", "positive")
    (folder / "flipped.csv").write_text(flipped.replace(",x", ",negative"))
    (folder / "two.toml").write_text((folder / "my.toml").read_text().replace("reviews.csv", "flipped.csv"))
    second = tasks.from_name(str(folder / "two.toml"))
    other = dataclasses.replace(adapter, record={**adapter.record, "task": second.record})
    found = Evaluate(base=False).run([adapter, other])
    assert found.columns["loss"] == [score(first, adapter).mean_loss, score(second, adapter).mean_loss]
    assert found.columns["loss"][0] != found.columns["loss"][1]


def test_a_finished_classifier_keeps_the_order_of_its_labels(folder):
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


def test_an_adapter_is_refused_on_a_base_of_another_configuration(folder):
    built = tasks.from_name(str(folder / "my.toml"))
    adapter, _ = train(built, Recipe(method="lora", steps=2))
    path = folder / "base" / "config.json"
    path.write_text(path.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    with pytest.raises(MismatchError, match=r"trained on a base whose configuration has the hash .* another model"):
        score(built, adapter)
    known = {**adapter.record["base_config"], "transformers": "4.0"}  # its defaults may have been others
    older = dataclasses.replace(adapter, record={**adapter.record, "base_config": known})
    with pytest.warns(LoraLabWarning, match=r"read by transformers 4\.0 and .*, or another model"):
        score(built, older)
    merged = merge(Sources([adapter, adapter]), "average").adapter
    assert merged.record["base_config"] == adapter.record["base_config"]


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
    write(folder, "limit = {validation = 20}\n", data='{train = "reviews.csv", validation = "reviews.csv"}')
    of_one = tasks.from_name(str(folder / "my.toml"))
    assert len(of_one.split("validation")) == 20
    assert len(of_one.split("train")) + len(of_one.split("test")) == len(rows)
    assert of_one.record["limit"] == {"validation": 20}


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


def labelled(folder, splits, *, order=("negative", "positive")):
    """The reviews as a dataset on disk whose labels are numbers with names."""
    from datasets import ClassLabel, Dataset, DatasetDict

    table = Dataset.from_csv(str(folder / "reviews.csv")).cast_column("label", ClassLabel(names=list(order)))
    DatasetDict({name: table.select(range(*rows)) for name, rows in splits.items()}).save_to_disk(folder / "disk")


def test_a_split_that_is_named_serves_no_other_purpose(folder):
    labelled(folder, {"train": (0, 100), "validation": (100, 150), "test": (150, 200)})
    path = write(folder, 'splits = {train = "train", test = "validation"}\n', data='"disk"')
    built = tasks.from_name(str(path))
    test, validation = built.table("test"), built.table("validation")
    assert len(test["text"]) == 50
    assert len(validation["text"]) == 10  # drawn from the training data
    with pytest.raises(OptionError, match="two of its splits are the same one in the data"):
        tasks.from_name(str(write(folder, 'splits = {validation = "test", test = "test"}\n', data='"disk"')))
    with pytest.raises(OptionError, match="splits is of datasets with several; for files, data ="):
        tasks.from_name(str(write(folder, 'splits = {test = "test"}\n')))


@pytest.mark.parametrize("more", ["", 'labels = ["positive", "negative"]\n'])
def test_numbers_with_names_go_by_their_names(folder, more):
    if not more:  # the classifier's order is the other way round
        config = json.loads((folder / "base" / "config.json").read_text())
        config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
        (folder / "base" / "config.json").write_text(json.dumps(config))
    named = tasks.from_name(str(write(folder, more))).split("test")
    labelled(folder, {"train": (0, 100), "validation": (100, 150), "test": (150, 200)})
    numbered = tasks.from_name(str(write(folder, more, data='"disk"')))
    table = numbered.table("test")
    assert table["label"][0] in (0, 1)
    expected = [1 - label for label in table["label"]]  # all texts are as long
    assert numbered.split("test").inputs["labels"].tolist() == expected
    assert set(named.inputs["labels"].tolist()) == {0, 1}


def test_cells_that_look_like_nothing_are_texts(folder):
    rows = "\n".join(f"{text},{label}" for text, label in [("NA", "positive"), ("", "negative")] * 20)
    (folder / "reviews.csv").write_text("text,label\n" + rows + "\n")
    table = tasks.from_name(str(folder / "my.toml")).table("train")
    assert set(table["text"]) == {"NA", ""}
    (folder / "dev.csv").write_text("text,label\nthe film,\n")
    built = tasks.from_name(str(write(folder, "", data='{train = "reviews.csv", test = "dev.csv"}')))
    with pytest.raises(TaskError, match="an example without a label"):
        built.split("test")


@pytest.mark.parametrize("more", ["", 'pool = "mean"\nhead = "probe"\n'])
def test_small_batches_that_are_accumulated_give_the_loss_of_a_large_one(folder, more):
    config = json.loads((folder / "base/config.json").read_text())  # without dropout, which is drawn batch by batch
    (folder / "base/config.json").write_text(
        json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    built = tasks.from_name(str(write(folder, more)))
    options = {"method": "lora", "steps": 3, "learning_rate": 1e-2}
    whole, log = train(built, Recipe(batch_size=8, **options))
    parts, log2 = train(built, Recipe(batch_size=4, accumulate=2, **options))
    assert log2.columns["loss"] == pytest.approx(log.columns["loss"], rel=1e-4)
    for name, update in whole.updates.items():
        assert (parts.updates[name] - update).norm() <= 1e-2 * max(update.norm(), 1e-3)


def test_memory_is_saved_under_a_mean_of_tokens_too(folder):
    built = tasks.from_name(str(write(folder, 'pool = "mean"\nhead = "probe"\n')))
    plain, saved = (train(built, Recipe(method="coto", steps=3, checkpointing=on))[0] for on in (False, True))
    assert all(torch.allclose(tensor, saved.tensors[key], atol=1e-6) for key, tensor in plain.tensors.items())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **TINY),
        GPT2Config(n_embd=16, n_layer=2, n_head=2, **{**TINY, "pad_token_id": 7}),
    ],
    ids=["llama", "gpt2"],
)
@pytest.mark.parametrize("pool", ["own", "mean"])
def test_a_text_is_scored_as_if_it_were_alone_whatever_the_tokenizer_pads(folder, config, pool):
    config.initializer_range = 0.3
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "base")
    words = BertTokenizerFast(vocab=str(folder / "vocab.txt"), padding_side="left", pad_token="[SEP]")
    words.save_pretrained(folder / "base")
    lines = [f"{' '.join(WORDS[: 1 + i % 7])},{'positive' if i % 2 else 'negative'}" for i in range(60)]
    (folder / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    built = tasks.from_name(str(write(folder, f'pool = "{pool}"\n')))
    model, split = built.build_model(), built.split("test")
    (batch,) = split.batches(100)
    together = built.logits(model, batch)
    for i, length in enumerate(split.inputs["attention_mask"].sum(1).tolist()):
        one = {name: tensor[i : i + 1, :length] for name, tensor in split.inputs.items() if name != "labels"}
        assert torch.allclose(model(**one).logits[0], together[i], atol=1e-5)


def test_heads_compute_in_float32_on_any_base(folder):
    for more in ('head = "trained"\n', 'pool = "mean"\nhead = "probe"\n'):
        built = tasks.from_name(str(write(folder, f'dtype = "bfloat16"\n{more}')))
        model = built.build_model()
        assert {str(p.dtype) for name, p in model.named_parameters() if "classifier" in name} == {"torch.float32"}
        assert model.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
        adapter, _ = train(built, Recipe(method="coto", steps=2))
        assert all(tensor.dtype == torch.float32 for key, tensor in adapter.tensors.items() if "classifier" in key)
        assert score(built, adapter).loss.shape == (40,)


def test_what_a_probe_is_fitted_to_counts_where_scores_are_kept(folder):
    def run():
        built = tasks.from_name(str(write(folder, 'pool = "mean"\nhead = "probe"\n', data=files)))
        return examples_of(built, "test")

    files = '{train = "reviews.csv", validation = "dev.csv", test = "dev.csv"}'
    table = (folder / "reviews.csv").read_text()
    (folder / "dev.csv").write_text(table)
    before = run()
    assert run() == before
    (folder / "reviews.csv").write_text(
        table.replace("negative", "x").replace("positive", "negative").replace(",x", ",positive")
    )
    assert run() != before


def test_a_trained_head_has_an_output_for_every_number(folder):
    rows = "\n".join(f"the film,{i % 4}" for i in range(40))
    (folder / "reviews.csv").write_text("text,label\n" + rows + "\n")
    BertModel(BertConfig.from_pretrained(folder / "base")).save_pretrained(folder / "base")
    built = tasks.from_name(str(write(folder, 'head = "trained"\n')))
    assert built.labels == 4
    assert built.build_model().classifier.out_features == 4


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

    for kind, text in ((kind, entry.example) for kind, entry in tasks.KINDS.items()):
        assert tomllib.loads(text)["kind"] == kind
        uncommented = "\n".join(line.removeprefix("# ") for line in text.splitlines()[1:] if "data = {" not in line)
        keys = tasks.KINDS[kind].build.__self__.Keys
        known = {field.name for field in fields(keys)}
        if "include" in known:  # whose data are the harness' own
            known -= {"data", "data_config", "splits", "split_seed"}
        assert set(tomllib.loads(uncommented)) == known
    with pytest.raises(OptionError, match="did you mean"):
        tasks.example("text-clasification")


def test_coalitions_and_pruning_work_on_texts_too(folder):
    from lora_lab.analysis.questions import Shapley, Stability, Sweep

    built = tasks.from_name(str(folder / "my.toml"))
    adapter, _ = train(built, Recipe(method="lora", steps=60, learning_rate=1e-2, rank=2))
    for by in ("layer", "type", "rank"):
        found = Shapley(players=by, estimator="regression" if by == "rank" else None, samples=3).run([adapter], built)
        summary = found.summary["adapters"][0]
        assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
        assert summary["full"] == pytest.approx(score(built, adapter).accuracy)
        assert summary["engine"]["why_not_shared"] is None
    found = Stability().run([adapter, adapter], built)
    assert len({row["adapter"] for row in found.rows()}) == 2
    (row,) = found.rows(family="k-of-G", label="0", rescaled=False, adapter=found.columns["adapter"][0])
    assert row["loss"] == pytest.approx(score(built, None).mean_loss, abs=1e-6)
    found = Sweep(sparsities=(0.0, 1.0), draws=2).run([adapter], built)
    assert found.rows(label="1", criterion="magnitude")[0]["loss"] == pytest.approx(
        score(built, None).mean_loss, abs=1e-6
    )
    assert {row["label"] for row in found.rows(kind="structured")} >= {"even", "odd", "type:query"}


def test_a_test_split_that_cannot_be_scored_is_told_before_training(folder, lora_lab):
    (folder / "unlabelled.csv").write_text("text\nthe film good\n")
    path = write(folder, "", data='{train = "reviews.csv", test = "unlabelled.csv"}')
    code, _, err = lora_lab("train", "--task", path, "--steps", 2, "-o", folder / "a.safetensors")
    assert code == 0
    assert "warning: its test split cannot be scored later: task my: no column 'label'; there are: text" in err
    code, _, err = lora_lab("evaluate", folder / "a.safetensors")
    assert code == 1
    assert "no column 'label'" in err


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "reviews.csv: cannot be read as a table (No columns"), ("text,label\n", "(it has no rows)")],
    ids=["empty", "header"],
)
def test_a_table_without_rows_is_one_line(folder, lora_lab, content, text):
    (folder / "reviews.csv").write_text(content)
    code, out, err = lora_lab("train", "--task", write(folder, ""), "-o", folder / "a.safetensors")
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert text in err


def test_a_truncated_or_missing_base_is_one_line(folder, lora_lab):
    whole = (folder / "base" / "model.safetensors").read_bytes()
    (folder / "base" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    code, _, err = lora_lab("train", "--task", write(folder, ""), "-o", folder / "a.safetensors")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "cannot be loaded (" in err
    path = write(folder, "")
    path.write_text(path.read_text().replace('base = "base"', 'base = "./gone/model"'))
    code, _, err = lora_lab("train", "--task", path, "-o", folder / "a.safetensors")
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert "its base './gone/model' is missing; a folder with a model, or a hub id, is needed" in err


def test_tasks_of_adapters_differ_by_a_key(folder):
    first = tasks.from_name(str(write(folder, "")))
    adapter, _ = train(first, Recipe(method="lora", steps=1))
    other = dataclasses.replace(adapter, record={**adapter.record, "task": {**first.record, "max_length": 8}})
    with pytest.raises(
        MismatchError, match=r"on different tasks, whose max_length is None and 8; `task` names one for both"
    ):
        task_of(adapter, other)


def test_an_adapter_finds_its_task_beside_itself_from_another_folder(folder, lora_lab, monkeypatch):
    monkeypatch.chdir(folder)
    assert lora_lab("train", "--task", "my.toml", "--steps", 2, "-o", "a.safetensors")[0] == 0
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    code, out, _ = lora_lab("evaluate", "../a.safetensors")
    assert (code, "text-classification/reviews" in out) == (0, True)
