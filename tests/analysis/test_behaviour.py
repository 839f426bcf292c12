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
from lora_lab.errors import FileError, TaskError
from lora_lab.scoring.execution import Execution

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
        (
            "a.jsonl",
            b'{"text": "a", "target": "b"}\n{"text": "c"}\n',
            "1 of 2 texts have a 'target'; all or none are needed",
        ),
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


def test_a_target_of_every_text_is_what_an_encoder_with_a_decoder_is_measured_on(models, tmp_path):
    rows = [
        {"text": text, "target": target}
        for text, target in zip(TEXTS, ["blue", "green is a colour", "red", "three"], strict=True)
    ]
    t5 = build(
        models, rows, {"kind": "seq2seq", "source": "what {text}", "target": "target", "generate": False}, base="t5"
    )
    adapter = random_adapter(t5, tmp_path / "a", LoraConfig(r=2, target_modules=["q", "v"]), scale=0.5)
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = evaluated(adapter, t5, path, base=False).rows()
    both = t5.build_model(), PeftModel.from_pretrained(t5.build_model(), tmp_path / "a").eval()
    losses, divergence, tokens = np.zeros(2), 0.0, 0
    for each in rows:
        labels = t5.tokenizer(each["target"], return_tensors="pt")["input_ids"]
        outs = [model(**t5.tokenizer(each["text"], return_tensors="pt"), labels=labels) for model in both]
        losses += [float(out.loss) * labels.numel() for out in outs]
        divergence += float(kl_divergence(*(Categorical(logits=out.logits[0].double()) for out in outs)).sum())
        tokens += labels.numel()
    assert row["forgetting"] == pytest.approx((losses[1] - losses[0]) / tokens, rel=1e-4)
    assert row["kl"] == pytest.approx(divergence / tokens, rel=1e-4)
    path.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    with pytest.raises(
        TaskError, match=r"writes a target of every text; a \.jsonl or \.csv with the columns text and target"
    ):
        evaluated(adapter, t5, path)


def test_a_model_of_pairs_writes_texts_like_any_other(models, causal, texts, tmp_path):
    adapter = random_adapter(causal, tmp_path / "a", CONFIG, scale=0.5)
    (plain,) = evaluated(adapter, causal, texts, base=False).rows()
    rows = [{"question": text, "good": "red", "bad": "blue is"} for text in TEXTS] * 4
    pairs = build(models, rows, {"kind": "preference", "prompt": "question", "chosen": "good", "rejected": "bad"})
    result = evaluated(adapter, pairs, texts, base=False)
    (row,) = result.rows()
    assert {n: row[n] for n in ("forgetting", "kl", "kl_low")} == {n: plain[n] for n in ("forgetting", "kl", "kl_low")}
    assert {"brier", "ece_by_reward", "ece_by_reward_null"} < set(result.parameters["metrics"])
    assert result.parameters["not_defined"] == []


def test_what_is_not_defined_of_a_task_is_told_in_a_line_each(models, causal, texts, tmp_path, few_digits):
    digits = ll.task("digits/relabel")
    adapter = random_adapter(digits, tmp_path / "d", LoraConfig(r=2, target_modules=["q_proj"]), scale=0.1)
    result = evaluated(adapter, digits, texts)
    assert result.parameters["not_defined"] == [
        "task digits/relabel: not defined of it: forgetting and divergence (its model takes no texts alone)"
    ]
    assert {"brier", "ece", "ece_null"} < set(result.parameters["metrics"])
    assert not {"kl", "forgetting"} & set(result.parameters["metrics"])
    few = evaluated(adapter, digits, texts, examples=10)
    assert few.parameters["not_defined"][1].endswith("calibration error (10 examples, and 15 are needed)")
    adapter = random_adapter(causal, tmp_path / "c", CONFIG, scale=0.1)
    assert evaluated(adapter, causal, texts).parameters["not_defined"] == [
        "task my: not defined of it: calibration (its answers are not one of some labels)"
    ]


def test_a_task_on_which_nothing_of_behaviour_is_defined_is_refused_in_a_line(texts, causal, tmp_path, monkeypatch):
    adapter = random_adapter(causal, tmp_path / "a", CONFIG, scale=0.1)
    monkeypatch.setattr(type(causal), "why_no_texts", "its model takes no texts alone")
    with pytest.raises(TaskError, match=r"^task my: its model takes no texts alone; its behaviour cannot be measured$"):
        evaluated(adapter, causal, texts)


@pytest.mark.filterwarnings("ignore:.*DoRA")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merges_and_prunings_are_adapters_like_others(causal, texts, tmp_path, dora):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=dora)
    made = [random_adapter(causal, tmp_path / f"a{seed}", config, seed=seed, scale=0.5) for seed in (0, 1)]
    written = {"pruned": ll.prune(made[0], keep="odd")}
    written["merged"] = ll.merge(made, weights=[0.7, 0.6], base=causal.base)
    for name, adapter in written.items():
        adapter.save(tmp_path / name)
        (row,) = evaluated(ll.load(tmp_path / name), causal, texts, base=False).rows()
        both = causal.build_model(), PeftModel.from_pretrained(causal.build_model(), tmp_path / name).eval()
        divergence, tokens = 0.0, 0
        for text in TEXTS:
            ids = causal.tokenizer(text, return_tensors="pt")["input_ids"]
            chances = [Categorical(logits=model(input_ids=ids).logits[0, :-1].double()) for model in both]
            divergence += float(kl_divergence(*chances).sum())
            tokens += ids.shape[1] - 1
        assert row["kl"] == pytest.approx(divergence / tokens, rel=1e-3), name
        assert row["kl"] > 1e-4


def test_lines_tell_behaviour_at_each_point_and_its_barrier(causal, texts, tmp_path):
    pair = [random_adapter(causal, tmp_path / f"a{seed}", CONFIG, seed=seed, scale=0.5) for seed in (0, 1)]
    on = Execution(cache=tmp_path / "cache")
    asked = {"points": 3, "spaces": ("delta",), "behaviour": str(texts), "progress": False, "on": on}
    result = ll.interpolate(pair, causal, **asked)
    middle = ll.merge(pair, weights=[0.5, 0.5])
    alone = [evaluated(each, causal, texts, base=False).rows()[0] for each in (pair[0], middle, pair[1])]
    found = result.rows(space="delta")
    for name in ("forgetting", "kl"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in alone], rel=1e-3)
        first, half, last = (row[name] for row in alone)
        (height,) = [
            row["value"] for row in result.summary["barriers"] if (row["metric"], row["barrier"]) == (name, "entezari")
        ]
        assert height == pytest.approx(max(0.0, half - (first + last) / 2), rel=1e-2, abs=1e-5)
    assert all(row["kl_low"] <= row["kl"] <= row["kl_high"] for row in found)
    assert list(result.parameters["metrics"]) == ["loss", "forgetting", "kl"]
    assert result.parameters["texts"]["count"] == len(TEXTS)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("lora_lab.analysis.behaviour._compared", None)
        assert ll.interpolate(pair, causal, **asked).rows() == result.rows()


def test_lines_on_classifiers_of_images_tell_calibration(tmp_path, texts, few_digits):
    digits = ll.task("digits/relabel")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    pair = [random_adapter(digits, tmp_path / str(seed), config, seed=seed, scale=0.1) for seed in (0, 1)]
    result = ll.interpolate(pair, digits, points=2, spaces=("delta",), behaviour=str(texts), progress=False)
    assert list(result.parameters["metrics"]) == ["accuracy", "loss", "brier", "ece"]
    assert len(result.parameters["not_defined"]) == 1


def test_scores_of_texts_are_kept(causal, texts, tmp_path, monkeypatch):
    adapter = random_adapter(causal, tmp_path / "a", CONFIG, scale=0.5)
    on = Execution(cache=tmp_path / "cache")
    first = evaluated(adapter, causal, texts, on=on)
    monkeypatch.setattr("lora_lab.analysis.behaviour.attach", None)
    again = evaluated(adapter, causal, texts, on=on)
    assert again.rows() == first.rows()
    texts.write_text("red is red\nblue is blue\n")
    with pytest.raises(TypeError):
        evaluated(adapter, causal, texts, on=on)
