"""Tags of words: spans as seqeval counts them, alignment by hand, training over all words, what is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_bert

from lora_lab import tasks
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import LoraLabWarning, TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.choosing import task_of
from lora_lab.tasks.kinds.texts.tagging import Keys, TokenClassification
from lora_lab.tasks.scores.metrics import METRICS
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

seqeval = pytest.importorskip("seqeval.metrics")

PIECES = ["anna", "##lena", "bob", "rome", "paris", "saw", "went", "to", "in", "the"]
TAGS = {"annalena": "B-PER", "anna": "B-PER", "bob": "B-PER", "rome": "B-LOC", "paris": "B-LOC"}
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LISTED = 'labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]'


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT without a head, and sentences whose names are persons and places; "annalena" is two tokens."""
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", PIECES, kind="Model", initializer_range=0.3)
    generator = np.random.default_rng(0)
    words = [*TAGS, "saw", "went", "to", "in", "the"]
    rows = []
    for _ in range(80):
        drawn = generator.choice(words, generator.integers(2, 7)).tolist()
        tags, before = [], "O"
        for word in drawn:
            tag = TAGS.get(word, "O")
            before = f"I-{tag[2:]}" if tag[2:] and tag[2:] == before[2:] else tag  # names beside each other are one
            tags.append(before)
        rows.append({"words": drawn, "tags": tags})
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def build(folder, *more):
    keys = ['kind = "token-classification"', 'base = "base"', 'data = "rows.jsonl"', 'words = "words"', 'tags = "tags"']
    (folder / "my.toml").write_text("\n".join([*keys, *more]) + "\n")
    return tasks.from_name(str(folder / "my.toml"))


def test_a_word_is_tagged_by_its_first_token_and_every_example_has_the_models_own_loss(folder):
    task = build(folder, LISTED)
    model, split = task.build_model(), task.split("test")
    scores = task.score(model)
    table = task.table("test")
    known = {tuple(words): tags for words, tags in zip(table["words"], table["tags"], strict=True)}
    for i in range(len(split)):
        length = int(split.inputs["attention_mask"][i].sum())
        ids, labels = (split.inputs[name][i, :length] for name in ("input_ids", "labels"))
        tokens = task.tokenizer.convert_ids_to_tokens(ids)
        words = task.tokenizer.decode(ids, skip_special_tokens=True).split()
        tags = iter(known[tuple(words)])
        for token, label in zip(tokens, labels.tolist(), strict=True):
            assert label == (-100 if token.startswith(("[", "##")) else NAMES.index(next(tags)))
        with torch.no_grad():
            own = model(
                input_ids=ids[None], attention_mask=torch.ones(1, length, dtype=torch.long), labels=labels[None]
            )
        assert scores.loss[i] == pytest.approx(own.loss.item(), rel=1e-5)
        counted = labels != -100
        assert scores["tokens"][i] == counted.sum()
        right = (own.logits[0].argmax(-1) == labels)[counted].double().mean()
        assert scores.correct[i] == pytest.approx(right.item())


def tagger():
    """A task with the tags above, of which no base is read."""
    return TokenClassification(Keys(base="none", data="none", words="words", tags="tags", labels=NAMES), "tags")


SENTENCES = st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=8), min_size=1)


@settings(deadline=None)
@given(SENTENCES)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_spans_are_those_of_seqeval(sentences):
    """Whatever the tags are, wherever words of several tokens leave gaps, and whatever is said in the gaps."""
    width = 2 * max(map(len, sentences)) + 2
    said, labels = torch.randint(5, (len(sentences), width)), torch.full((len(sentences), width), -100)
    found, right = [], []
    for i, words in enumerate(sentences):
        place = 1
        for tag, truth, gap in words:
            said[i, place], labels[i, place] = tag, truth
            place += 1 + gap
        found.append([NAMES[tag] for tag, _, _ in words])
        right.append([NAMES[truth] for _, truth, _ in words])
    counts = tagger()._counted_spans(said, labels)
    columns = {**counts, "tokens": (labels != -100).sum(1).numpy()}
    for name, reference in (("f1", "f1_score"), ("precision", "precision_score"), ("recall", "recall_score")):
        expected = getattr(seqeval, reference)(right, found, zero_division=0)
        assert METRICS[f"span_{name}"].value(columns) == pytest.approx(expected, abs=1e-12), name
    share = ((said == labels).sum(1) / (labels != -100).sum(1).clamp(min=1)).double().numpy()
    if any(right):
        expected = seqeval.accuracy_score(right, found)
        assert METRICS["tag_accuracy"].value({**columns, "correct": share}) == pytest.approx(expected, rel=1e-6)


def test_it_trains_is_scored_with_shared_prefixes_and_remembered_by_the_adapter(folder):
    task = build(folder, 'head = "trained"')
    adapter, _ = train(task, Recipe(method="coto", steps=120, learning_rate=1e-2))
    base, trained = score(task, None), score(task, adapter)
    f1 = METRICS["span_f1"]
    assert trained.mean_loss < 0.7 * base.mean_loss
    assert f1.value(trained.columns) > f1.value(base.columns) + 0.2
    assert (score(task_of(adapter), adapter).loss == trained.loss).all()
    found = Shapley(worth="loss").run([adapter], task)
    summary = found.summary["adapters"][0]
    assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
    assert summary["engine"]["why_not_shared"] is None
    row = Evaluate(base=False).run([adapter], task).rows()[0]
    assert row["span_f1_low"] <= row["span_f1"] == f1.value(trained.columns) <= row["span_f1_high"]
    for method, options in (("fisher", {"examples": 4}), ("adamerging", {"steps": 2}), ("regmean", {"examples": 8})):
        merged = merge(Sources([adapter, adapter], tasks=[task, task]), method, options=options, heads="first").adapter
        assert np.isfinite(score(task, merged).loss).all()


def test_small_batches_that_are_accumulated_give_the_loss_of_a_large_one(folder):
    config = json.loads((folder / "base/config.json").read_text())  # without dropout, which is drawn batch by batch
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "base/config.json").write_text(json.dumps(config))
    task = build(folder)
    options = {"method": "lora", "steps": 3, "learning_rate": 1e-2}
    whole, parts = (train(task, Recipe(**size, **options))[1] for size in ({"batch_size": 8}, _TWO))
    assert parts.columns["loss"] == pytest.approx(whole.columns["loss"], rel=1e-4)


_TWO = {"batch_size": 4, "accumulate": 2}


def test_a_probe_is_logistic_regression_of_all_words(folder):
    from sklearn.linear_model import LogisticRegression

    task = build(folder, 'head = "probe"', LISTED)
    features, labels = task._features(), task.split("train").inputs["labels"]
    fitted = LogisticRegression(max_iter=2000).fit(features, labels[labels != -100].numpy())
    assert task._probe[0].numpy() == pytest.approx(fitted.coef_, abs=1e-3)
    assert task.score(task.build_model()).accuracy > fitted.score(features, labels[labels != -100].numpy()) - 0.2


def test_plain_tags_have_no_spans(folder):
    rows = [{"words": ["anna", "saw", "bob"], "tags": ["NOUN", "VERB", "NOUN"]}] * 10
    write(folder, rows)
    task = build(folder)
    assert list(task.metrics) == ["tag_accuracy", "tag_loss", "loss"]
    assert "spans_true" not in task.score(task.build_model()).columns
    with pytest.raises(TaskError, match="the tag 'NOUN' is neither O nor B-… nor I-…, which scheme BIO needs"):
        build(folder, 'scheme = "BIO"').score(task.build_model())
    write(folder, [{"words": ["anna", "saw", "bob"], "tags": [1, 0, 1]}] * 10)
    assert build(folder).names == ["0", "1"]


def test_words_beyond_the_window_are_told_and_not_scored(folder):
    task = build(folder, "max_length = 4")  # two words at most beside [CLS] and [SEP]
    with pytest.warns(LoraLabWarning, match=r"\d+ of \d+ words of its test split are beyond max_length"):
        split = task.split("test")
    assert (split.inputs["labels"] != -100).sum(1).max() <= 2


ROW = {"words": ["anna", "saw", "bob"], "tags": ["B-PER", "O", "B-PER"]}
WRONG = [
    ({**ROW, "tags": ["O", "B-PER"]}, r"3 words and 2 tags \(row 0 of a split, counted from 0\); one a word is needed"),
    ({**ROW, "words": "anna saw bob"}, r"a str in 'words' \(row 0 .*a list of words is needed"),
    ({**ROW, "tags": "O O O"}, r"a str in 'tags' \(row 0 .*a list of labels is needed"),
    ({**ROW, "tags": ["O", "O", None]}, "a label of the type NoneType in 'tags' .row 0"),
    ({**ROW, "words": ["anna", None, "bob"]}, "an example without a text in 'words'"),
    ({**ROW, "tags": ["O", "O", "O"]}, "'O' alone in 'tags' of its train split; two labels or more are needed"),
    ({"words": ROW["words"]}, "no column 'tags'; there are: words"),
]


@pytest.mark.parametrize(("row", "text"), WRONG)
def test_what_does_not_fit_is_named_with_its_row(folder, row, text):
    write(folder, [row] * 10)
    with pytest.raises(TaskError, match=text):
        build(folder).split("train")


def test_a_tag_that_training_does_not_know_is_named(folder):
    with pytest.raises(
        TaskError, match=r"label '[BI]-(LOC|PER)' \(row \d+ of a split, counted from 0\) is none of O, B-PER"
    ):
        build(folder, 'labels = ["O", "B-PER"]').check_split("test")
