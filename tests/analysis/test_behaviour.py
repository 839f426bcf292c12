"""Behaviour beside the task: divergences of torch, losses of transformers, and files of texts that are none."""

import json

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig, PeftModel
from tiny_language import WORDS, build, write_causal, write_t5
from tiny_models import write_bert
from torch.distributions import Categorical, kl_divergence

import lora_lab as ll
from lora_lab.analysis.behaviour import OF_TOKENS, Texts
from lora_lab.errors import FileError, OptionError, TaskError

TEXTS = ["the sky is blue", "grass", "what is the colour of blood ?", "one plus two equals three and red is a colour"]
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_causal(folder)
    write_t5(folder)
    return folder


@pytest.fixture
def causal(models):
    return build(models, [{"text": text} for text in TEXTS], {"kind": "causal-lm", "text": "text"})


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def evaluated(adapter, task, path, **options):
    return ll.evaluate([adapter], task, behaviour=str(path), progress=False, **options)


def test_forgetting_and_divergence_are_those_of_transformers_and_torch(causal, texts, tmp_path):
    adapter = random_adapter(causal, tmp_path / "a", CONFIG, scale=0.5)
    base = causal.build_model()
    both = base, PeftModel.from_pretrained(causal.build_model(), tmp_path / "a").eval()
    loss, divergence, count = np.zeros(2), 0.0, 0
    for text in TEXTS:
        ids = causal.tokenizer(text, return_tensors="pt")["input_ids"]
        outs = [model(input_ids=ids, labels=ids) for model in both]
        tokens = ids.shape[1] - 1
        loss += [float(out.loss) * tokens for out in outs]
        chances = [Categorical(logits=out.logits[0, :-1].double()) for out in outs]
        divergence += float(kl_divergence(*chances).sum())
        count += tokens
    own, alone = sorted(evaluated(adapter, causal, texts).rows(), key=lambda row: row["kl"] is None)
    assert own["forgetting"] == pytest.approx((loss[1] - loss[0]) / count, rel=1e-4)
    assert own["kl"] == pytest.approx(divergence / count, rel=1e-4)
    assert own["kl_low"] <= own["kl"] <= own["kl_high"]
    assert alone["forgetting"] is None


@pytest.mark.filterwarnings("ignore:.*zero delta")
def test_an_adapter_that_changes_nothing_forgets_exactly_nothing(causal, texts, tmp_path):
    adapter = random_adapter(causal, tmp_path / "a", CONFIG, scale=0.0)
    result = evaluated(adapter, causal, texts, base=False)
    (row,) = result.rows()
    assert [row[f"{name}{end}"] for name in ("forgetting", "kl") for end in ("", "_low", "_high")] == [0.0] * 6
    assert result.parameters["texts"]["count"] == len(TEXTS)
    assert {"forgetting", "kl"} < set(result.parameters["metrics"])


def test_long_texts_count_by_their_tokens():
    scores = {"loss": [2.0, 1.0], "base_loss": [1.0, 1.0], "tokens": [1, 3], "kl": [4.0, 0.0]}
    columns = {name: np.array(values) for name, values in scores.items()}
    assert OF_TOKENS["forgetting"].value(columns) == 0.25
    assert OF_TOKENS["kl"].value(columns) == 1.0


@pytest.mark.parametrize("kind", ["text-classification", "multi-label"])
def test_divergence_of_classifiers_is_over_their_labels(models, texts, tmp_path, kind):
    write_bert(models / "bert", tmp_path / "vocabulary.txt", WORDS, vocab_size=30)
    label = {"label": ["red", "blue"]} if kind == "multi-label" else {"label": "label"}
    rows = [{"text": text, "label": i % 2, "red": i % 2, "blue": 1} for i, text in enumerate(TEXTS)]
    task = build(models, rows, {"kind": kind, "text": "text", **label}, base="bert")
    adapter = random_adapter(task, tmp_path / "a", LoraConfig(r=2, target_modules=["query"]), scale=0.5)
    (row,) = evaluated(adapter, task, texts, base=False).rows()
    assert "forgetting" not in row
    both = task.build_model(), PeftModel.from_pretrained(task.build_model(), tmp_path / "a").eval()
    found = []
    for text in TEXTS:
        given = task.tokenizer(text, return_tensors="pt")
        before, after = (model(**given).logits[0].double() for model in both)
        if kind == "multi-label":
            pairs = (torch.distributions.Bernoulli(logits=each) for each in (before, after))
        else:
            pairs = (Categorical(logits=each) for each in (before, after))
        found.append(float(kl_divergence(*pairs).sum()))
    assert row["kl"] == pytest.approx(np.mean(found), rel=1e-3)


def test_texts_in_tables_are_those_in_lines(texts, tmp_path):
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text("n,text\n" + "".join(f'1,"{text}"\n' for text in TEXTS))
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert Texts.read(texts) == Texts.read(table) == Texts.read(lines)
    assert Texts.read(texts).texts == tuple(TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "0 texts; an interval needs 2 or more"),
        ("a.txt", b"one\n", "1 texts; an interval needs 2 or more"),
        ("a.txt", b"\xff\xfe\n", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no text in a column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n[', "line 2 is no JSON"),
        ("a.csv", b"words\na\nb\n", "line 2 has no text in a column 'text'"),
        ("a.pdf", b"", ".txt, .jsonl, .csv can be read as texts"),
    ],
)
def test_files_that_are_no_texts_are_refused_in_a_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=told) as caught:
        Texts.read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_tasks_whose_models_take_no_texts_are_refused_in_a_line(models, texts, tmp_path, few_digits):
    digits = ll.task("digits/relabel")
    rows = [{"text": text, "target": "red"} for text in TEXTS]
    t5 = build(models, rows, {"kind": "seq2seq", "source": "text", "target": "target"}, base="t5")
    for task, modules in ((digits, ["q_proj"]), (t5, ["q"])):
        adapter = random_adapter(task, tmp_path / task.base[-3:], LoraConfig(r=2, target_modules=modules), scale=0.1)
        with pytest.raises((TaskError, OptionError), match="behaviour on texts"):
            evaluated(adapter, task, texts)


def test_scores_of_texts_are_kept(causal, texts, tmp_path, monkeypatch):
    from lora_lab.scoring.execution import Execution

    adapter = random_adapter(causal, tmp_path / "a", CONFIG, scale=0.5)
    on = Execution(cache=tmp_path / "cache")
    first = evaluated(adapter, causal, texts, on=on)
    monkeypatch.setattr("lora_lab.analysis.behaviour.attach", None)
    again = evaluated(adapter, causal, texts, on=on)
    assert again.rows() == first.rows()
    texts.write_text("red is red\nblue is blue\n")
    with pytest.raises(TypeError):
        evaluated(adapter, causal, texts, on=on)
