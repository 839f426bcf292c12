"""Answers that are a part of a text: SQuAD's measures, windows and spans by brute force, training, what is refused."""

import itertools
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
from lora_lab.tasks.kinds.texts import squad
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

WORDS = ["who", "where", "anna", "bob", "rome", "oslo", "went", "to", "saw", "the", "then", "a", "?", "."]
PEOPLE, PLACES = ("anna", "bob"), ("rome", "oslo")


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT without a head, and questions about who went where; every third text is longer than a window."""
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", WORDS, kind="Model", initializer_range=0.3)
    generator = np.random.default_rng(0)
    rows = []
    for i in range(60):
        who, where = generator.choice(PEOPLE), generator.choice(PLACES)
        told = f"{who} went to the {where} ."
        before = " ".join(generator.choice(["then", "saw", "the", "."], 12 if i % 3 == 0 else i % 4))
        question, answer = ("who ?", who) if i % 2 else ("where ?", f"the {where}")
        rows.append({"question": question, "context": f"{before} {told}".strip(), "answers": answer})
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def build(folder, *more):
    keys = ['kind = "question-answering"', 'base = "base"', 'data = "rows.jsonl"', 'question = "question"']
    keys += ['context = "context"', 'answers = "answers"', "max_length = 14", "stride = 4", *more]
    (folder / "my.toml").write_text("\n".join(keys) + "\n")
    return tasks.from_name(str(folder / "my.toml"))


MEASURED = [  # found, right answers, exact match, F1: of SQuAD 2.0's evaluation script
    ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
    ("an Eiffel", ["Eiffel Tower"], 0, 2 / 3),
    ("tower tower", ["tower"], 0, 2 / 3),
    ("in Paris, France", ["Paris", "Paris France"], 0, 4 / 5),
    ("rome", ["oslo"], 0, 0),
    ("", [], 1, 1),
    ("rome", [], 0, 0),
    ("", ["rome"], 0, 0),
    ("", ["the"], 1, 1),  # nothing of "the" is left, so that none is right
    ("U.S.", ["US"], 1, 1),
    ("co-op", ["coop"], 1, 1),
]


@pytest.mark.parametrize(("found", "answers", "exact", "overlap"), MEASURED)
def test_answers_are_measured_as_squad_does(found, answers, exact, overlap):
    assert squad.best(squad.exact, found, answers) == exact
    assert squad.best(squad.overlap, found, answers) == pytest.approx(overlap)


def test_every_text_is_in_windows_that_overlap_and_the_answer_is_where_its_words_are(folder):
    task = build(folder)
    rows = {(r["question"], r["context"]): r["answers"] for r in map(json.loads, _lines(folder))}
    inputs = task.split("train").inputs
    assert inputs["input_ids"].shape[1] == 3
    wholly = 0
    for i in range(len(task.split("train"))):
        seen = set()
        for ids, mask, begins, ends, label in zip(
            *(inputs[n][i] for n in ("input_ids", "attention_mask", "begins", "ends", "labels")), strict=True
        ):
            if not mask.any():
                assert label.tolist() == [-100, -100]
                continue
            tokens = task.tokenizer.convert_ids_to_tokens(ids)
            question = " ".join(tokens[1:3])
            seen |= {(int(b), int(e)) for b, e in zip(begins, ends, strict=True) if b >= 0}
            context = json.loads(bytes(inputs["texts"][i].flatten().tolist()).rstrip(b"\0"))["context"]
            answer = rows[question, context]
            start, end = label.tolist()
            if start:
                assert " ".join(tokens[start : end + 1]) == answer
                wholly += 1
            else:
                assert end == 0
                assert answer not in " ".join(t for t, b in zip(tokens, begins, strict=True) if b >= 0)
        assert "".join(context[b:e] for b, e in sorted(seen)) == context.replace(" ", "")
    assert wholly >= len(task.split("train"))


def _lines(folder):
    return (folder / "rows.jsonl").read_text().splitlines()


@pytest.mark.parametrize("more", [(), ("unanswerable = true",), ("max_answer = 2",)])
def test_the_answer_is_the_best_span_of_all_windows(folder, more):
    """By trying all spans; the loss is that of transformers' own model on every window."""
    task = build(folder, *more)
    model, split = task.build_model(), task.split("validation")
    torch.nn.init.normal_(model.qa_outputs.weight, std=2.0)
    scores, answers = task.score(model, "validation"), []
    for i in range(len(split)):
        best, none, losses = (-np.inf, ""), np.inf, []
        one = {name: tensor[i] for name, tensor in split.inputs.items()}
        told = json.loads(bytes(one["texts"].flatten().tolist()).rstrip(b"\0"))
        for w in range(int(one["attention_mask"].any(-1).sum())):
            size = int(one["attention_mask"][w].sum())
            given = {n: one[n][w : w + 1, :size] for n in ("input_ids", "attention_mask", "token_type_ids")}
            start, end = one["labels"][w][:, None]
            with torch.no_grad():
                said = model(**given, start_positions=start, end_positions=end)
            losses.append(said.loss.item())
            s, e = said.start_logits[0].tolist(), said.end_logits[0].tolist()
            inside = [k for k in range(size) if one["begins"][w, k] >= 0]
            for a, b in itertools.product(inside, inside):
                if a <= b < a + task.settings.max_answer:
                    text = told["context"][one["begins"][w, a] : one["ends"][w, b]]
                    best = max(best, (s[a] + e[b], text))
            none = min(none, s[0] + e[0])
        answers.append("" if task.settings.unanswerable and none > best[0] else best[1])
        assert scores.loss[i] == pytest.approx(np.mean(losses), rel=1e-5)
        assert scores.correct[i] == squad.best(squad.exact, answers[-1], told["answers"])
        assert scores["answer_f1"][i] == pytest.approx(squad.best(squad.overlap, answers[-1], told["answers"]))
    (batch,) = split.batches(100)
    with torch.no_grad():
        logits = task.logits(model, batch)
    contexts = [json.loads(bytes(t.flatten().tolist()).rstrip(b"\0"))["context"] for t in split.inputs["texts"]]
    assert task.answered(logits, batch, contexts) == answers


def test_it_trains_is_scored_with_shared_prefixes_and_remembered_by_the_adapter(folder):
    task = build(folder, 'head = "trained"')
    adapter, _ = train(task, Recipe(method="lora", steps=150, learning_rate=1e-2))
    base, trained = score(task, None), score(task, adapter)
    assert trained.mean_loss < 0.7 * base.mean_loss
    assert trained["answer_f1"].mean() > base["answer_f1"].mean() + 0.2
    assert (score(task_of(adapter), adapter).loss == trained.loss).all()
    found = Shapley(worth="loss").run([adapter], task)
    summary = found.summary["adapters"][0]
    assert sum(row["value"] for row in found.rows()) == pytest.approx(summary["full"] - summary["empty"])
    assert summary["engine"]["why_not_shared"] is None
    row = Evaluate(base=False).run([adapter], task).rows()[0]
    assert row["exact_match"] == trained.accuracy
    assert row["answer_f1_low"] <= row["answer_f1"] == pytest.approx(trained["answer_f1"].mean())
    for method, options in (("fisher", {"examples": 2}), ("adamerging", {"steps": 2}), ("regmean", {"examples": 8})):
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


def test_answers_may_be_texts_lists_and_squads_tables_and_all_of_them_count(folder):
    text = "anna saw rome then anna went"
    shapes = {
        "one": ("anna", 0),
        "several": (["anna", "rome"], 0),
        "squad": ({"text": ["anna", "rome"], "answer_start": [19, 9]}, 19),
    }
    for cell, begin in shapes.values():
        write(folder, [{"question": "who ?", "context": text, "answers": cell}] * 10)
        task = build(folder, "limit = 2")
        inputs = task.split("test").inputs
        start, end = inputs["labels"][0, 0].tolist()
        assert inputs["begins"][0, 0, start] == begin
        assert inputs["ends"][0, 0, end] == begin + 4
        known = json.loads(bytes(inputs["texts"][0].flatten().tolist()).rstrip(b"\0"))["answers"]
        assert known == (["anna"] if cell == "anna" else ["anna", "rome"])
    write(folder, [{"question": "who ?", "context": text, "answers": "anna", "at": 19}] * 10)
    inputs = build(folder, 'answer_start = "at"').split("test").inputs
    assert inputs["begins"][0, 0, inputs["labels"][0, 0, 0]] == 19


def test_another_right_answer_or_text_is_another_run(folder):
    from lora_lab.scoring.examples import examples_of

    rows = [json.loads(line) for line in _lines(folder)]
    keys = []
    for extra in ("rome", "oslo"):
        write(folder, [{**row, "answers": [row["answers"], extra]} for row in rows])
        keys.append(examples_of(build(folder), "test"))
    assert keys[0] != keys[1]


ROW = {"question": "who ?", "context": "anna saw rome", "answers": "anna", "at": 0}
AT = 'answer_start = "at"'
WRONG = [
    ({**ROW, "answers": "bob"}, (), r"the answer 'bob' is not in its text \(row 0 of a split, counted from 0\)"),
    ({**ROW, "at": 3}, (AT,), r"the answer 'anna' is not in its text at character 3 \(row 0"),
    ({**ROW, "at": 1.5}, (AT,), "begins at no whole number of characters"),
    ({**ROW, "answers": {"text": ["anna"], "answer_start": [-5]}}, (), "not in its text at character -5"),
    ({**ROW, "answers": []}, (), r"no answer in 'answers' \(row 0 .*unanswerable = true takes such questions"),
    ({**ROW, "answers": 3}, (), "a int in 'answers' .row 0 .*a text, a list of texts, or a table of text and"),
    ({**ROW, "context": None}, (), "an example without a text in 'context'"),
    (
        {**ROW, "question": "who " * 9},
        (),
        r"a question of 9 tokens .* leaves 2 of max_length, 14, for its text; more than",
    ),
    ({"question": "who ?", "context": "anna"}, (), "no column 'answers'; there are: question, context"),
]


@pytest.mark.parametrize(("row", "more", "text"), WRONG)
def test_what_does_not_fit_is_named_with_its_row(folder, row, more, text):
    write(folder, [row] * 10)
    with pytest.raises(TaskError, match=text):
        build(folder, *more).split("train")
