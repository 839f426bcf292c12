"""Encoders with decoders as tasks, on a tiny random T5: its own losses and answers, ROUGE, both sides adapted."""

import importlib.util

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig
from tiny_language import build, tokenizer, write_causal, write_t5
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from lora_lab.adapters.groups import group, players
from lora_lab.analysis.questions import Shapley
from lora_lab.errors import OptionError, TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

ROWS = [
    {"long": "the colour of the sky is", "short": "blue"},
    {"long": "red and green", "short": "a colour and a colour and one"},
    {"long": "one plus one", "short": "two"},
    {"long": "what is the colour of grass and of the sky and of blood", "short": "green blue red"},
]
KEYS = {"kind": "seq2seq", "source": "what {long}", "target": "short", "max_new_tokens": 8}


@pytest.fixture
def folder(tmp_path):
    write_t5(tmp_path)
    return tmp_path


def encoded(*texts):
    return [torch.tensor([tokenizer(end=True)(text)["input_ids"]]) for text in texts]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_losses_and_answers_are_the_models_own_one_by_one(folder, size):
    task = build(folder, ROWS, KEYS, "t5")
    task.batch_size = size
    scores = task.score(task.build_model())
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5").eval()
    config = GenerationConfig(max_new_tokens=8, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0)
    places = task.split("test").inputs["index"].tolist()
    assert places == [1, 2, 0, 3]  # the shortest source first
    found = {}
    for batch in task.batches("test", torch.device("cpu")):
        told = task._generated(model, batch)
        found |= {int(place): task._text(tokens) for place, (tokens, _) in zip(batch["index"], told, strict=True)}
    for i, place in enumerate(places):
        ids, labels = encoded(f"what {ROWS[place]['long']}", ROWS[place]["short"])
        assert scores.loss[i] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
        alone = model.generate(ids, generation_config=config)[0]
        assert found[place] == tokenizer(end=True).decode(alone, skip_special_tokens=True)
    assert len(set(found.values())) > 1
    tokens = [len(encoded(ROWS[place]["short"])[0][0]) for place in places]
    assert task.columns(scores, task.split("test"))["tokens"].tolist() == tokens


@pytest.mark.parametrize("words", range(1, 14))
def test_targets_are_not_cut_to_the_length_of_sources(folder, words):
    rows = [{"long": "one", "short": "red"}, {"long": " ".join(["one"] * 7), "short": " ".join(["red"] * words)}]
    task = build(folder, rows, {**KEYS, "max_new_tokens": 20, "generate": False}, "t5")
    task.batch_size = 1
    split = task.split("test")
    model = task.build_model()
    texts = [encoded(f"what {row['long']}", row["short"]) for row in rows]
    own = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in texts]
    assert task.score(model).loss == pytest.approx(own, rel=1e-5)
    (first, second) = task.training_split().batches(1)
    assert (second["labels"] >= 0).sum() == words + 1
    assert first["input_ids"].shape == (1, 3)
    assert (first["labels"] >= 0).sum() == 2
    assert len(split) == 2


def test_it_is_learnt_in_encoder_and_decoder_and_played_by_layer(folder):
    rows = [{"long": "one", "short": "red"}, {"long": "two", "short": "blue sky"}, {"long": "four", "short": "green"}]
    task = build(folder, rows, KEYS, "t5")
    adapter, result = train(task, Recipe(steps=100, learning_rate=1e-2, rank=8, batch_size=3))
    assert result.summary["validation"]["exact_match"] == 1
    assert list(result.summary["validation"])[:2] == ["loss", "exact_match"]
    assert not any("lm_head" in name for name in adapter.sites)
    blocks = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)]
    assert set(players(adapter, "layer").names) == set(blocks) == set(group(list(adapter.sites)))
    by_type = players(adapter, "encoder-type-layer")
    assert {place.encoder for place in by_type.places.values()} == {"encoder", "decoder"}
    found = Shapley(players="layer", worth="loss", samples=8).run([adapter], task)
    base, full = score(task, None).loss.mean(), score(task, adapter).loss.mean()
    assert base > full
    assert sum(row["value"] for row in found.rows()) == pytest.approx(base - full, abs=1e-4)


def test_without_answers_prefixes_are_shared(folder):
    rows = ROWS * 3
    task = build(folder, rows, {**KEYS, "generate": False}, "t5")
    assert task.metrics == ("loss", "perplexity")
    adapter = random_adapter(task, folder / "a", LoraConfig(r=2, target_modules=["q", "wo"]), seed=0, scale=1.0)
    evaluator = Evaluator([adapter], task)
    names = evaluator.names
    masks = [evaluator.keeping(names[:k]) for k in range(len(names) + 1)]
    found = evaluator.scores(masks)
    assert evaluator.effort.why_not is None
    assert evaluator.effort.computed < evaluator.layout.blocks * len(masks)
    assert np.allclose(found[-1].loss, score(task, adapter).loss, atol=1e-6)
    assert list(found[0].columns) == ["loss", "correct", "margin"]


@pytest.mark.skipif(not importlib.util.find_spec("rouge_score"), reason="rouge-score is not installed")
def test_rouge_is_rouge_scores_own(folder):
    from rouge_score.rouge_scorer import RougeScorer

    task = build(folder, ROWS, {**KEYS, "rouge": True}, "t5")
    said = ["blue", "a colour and one", "red two", "blue green"]
    task._generated = lambda model, batch: [
        (tokenizer()(said[int(place)])["input_ids"], True) for place in batch["index"]
    ]
    scores = task.score(task.build_model())
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for i, place in enumerate(task.split("test").inputs["index"].tolist()):
        wanted = scorer.score(ROWS[place]["short"], said[place])
        assert {name: scores[name][i] for name in wanted} == {name: each.fmeasure for name, each in wanted.items()}
    # by hand: 4 of 7 words, all 4 of the said ones
    place = task.split("test").inputs["index"].tolist().index(1)
    assert scores["rouge1"][place] == pytest.approx(2 * (4 / 4) * (4 / 7) / (4 / 4 + 4 / 7))
    assert task.metrics == (
        "loss",
        "exact_match",
        "rouge1",
        "rouge2",
        "rougeL",
        "unextracted",
        "unfinished",
        "perplexity",
    )


def test_rouge_where_it_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    task = build(folder, ROWS, {**KEYS, "rouge": True}, "t5")
    with pytest.raises(
        OptionError, match=r"ROUGE needs rouge_score, which is not installed: pip install 'lora-lab\[rouge"
    ):
        task.score(task.build_model())


def test_what_is_refused(folder):
    write_causal(folder)
    with pytest.raises(TaskError, match='is a llama, no encoder with a decoder; kind = "generation" is for those'):
        build(folder, ROWS, KEYS, "llama").build_model()
    with pytest.raises(OptionError, match="rouge is of generated texts; generate = true is needed"):
        build(folder, ROWS, {**KEYS, "rouge": True, "generate": False}, "t5")
    with pytest.raises(TaskError, match="an example with an empty text in 'short'"):
        build(folder, [{"long": "one", "short": ""}], KEYS, "t5").split("test")
    with pytest.raises(TaskError, match="column 'long' holds lists; texts are needed"):
        build(folder, [{"long": ["one"], "short": "two"}], {**KEYS, "source": "long"}, "t5").split("test")


def test_several_at_once_give_what_single_ones_do(folder):
    task = build(folder, ROWS, KEYS, "t5")
    adapter = random_adapter(task, folder / "a", LoraConfig(r=2, target_modules=["q", "wo"]), seed=0, scale=1.0)
    alone, together = (Evaluator([adapter], task, Execution(coalitions_at_once=k)) for k in (0, 4))
    names = alone.names
    masks = [alone.keeping(names[i:]) for i in range(len(names) + 1)]
    found = [evaluator.scores(masks) for evaluator in (alone, together)]
    for one, other in zip(*found, strict=True):
        for name, values in one.columns.items():
            assert np.allclose(values, other[name], atol=1e-4), name
    assert any(not np.array_equal(found[0][0]["loss"], one["loss"]) for one in found[0])


def test_merges_that_look_at_data_take_it(folder):
    task = build(folder, ROWS, KEYS, "t5")
    config = LoraConfig(r=2, target_modules=["q", "wo"])
    adapters = [random_adapter(task, folder / f"s{i}", config, seed=i, scale=0.5) for i in (0, 1)]
    for method in ("fisher", "regmean"):
        merged = merge(Sources(adapters, tasks=[task, task]), method, options={"examples": 4}).adapter
        assert score(task, merged).loss.mean() != pytest.approx(score(task, None).loss.mean(), abs=1e-4)
