"""Pairs of answers on tiny random models: log-likelihoods one by one, DPO's loss and rewards, and training on them."""

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig
from tiny_language import build, tokenizer, write_causal
from transformers import AutoModelForCausalLM

from lora_lab.adapters.models.attached import put_on
from lora_lab.analysis.questions import Evaluate, Shapley
from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import TaskSpec
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.language import preference
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

BASES = ("llama", "gpt2")
ROWS = [
    {"question": "what is one plus one", "good": "two", "bad": "three and four"},
    {"question": "the colour of grass is", "good": "green and a blue sky", "bad": "red"},
    {"question": "blood", "good": "red", "bad": "blue"},
    {"question": "what is the colour of the sky and of grass", "good": "blue green", "bad": "red and red"},
]
KEYS = {"kind": "preference", "prompt": "{question} ?", "chosen": "good", "rejected": "bad", "beta": 0.3}


@pytest.fixture
def folder(tmp_path):
    write_causal(tmp_path)
    return tmp_path


def likelihood(model, base, prompt, answer):
    """Σ log p of an answer's tokens, its end among them, and how many these are; one pass on one text."""
    given = tokenizer(bos=base == "llama")(prompt)["input_ids"]
    said = [*tokenizer()(answer)["input_ids"], 2]
    with torch.no_grad():
        logs = model(torch.tensor([given + said])).logits[0].double().log_softmax(-1)
    return sum(logs[len(given) - 1 + i, token].item() for i, token in enumerate(said)), len(said)


def order(task):
    """Rows in the order of the split."""
    firsts = [task.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in task.split("test").inputs["input_ids"]]
    return [next(row for row in ROWS if text.startswith(row["question"] + " ?")) for text in firsts]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [1, 3])
def test_margins_rewards_and_loss_are_those_of_single_passes(folder, base, size):
    task = build(folder, ROWS, KEYS, base)
    task.batch_size = size
    names = ["q_proj", "down_proj"] if base == "llama" else ["c_attn"]
    config = LoraConfig(r=2, target_modules=names, fan_in_fan_out=base == "gpt2")
    adapter = random_adapter(task, folder / "a", config, seed=0, scale=0.5)
    scores = score(task, adapter)
    plain = AutoModelForCausalLM.from_pretrained(folder / base).eval()
    worn = put_on(AutoModelForCausalLM.from_pretrained(folder / base).eval(), adapter).model
    for i, row in enumerate(order(task)):
        prompt = f"{row['question']} ?"
        (good, n), (bad, m) = (likelihood(worn, base, prompt, row[side]) for side in ("good", "bad"))
        (good_0, _), (bad_0, _) = (likelihood(plain, base, prompt, row[side]) for side in ("good", "bad"))
        assert scores["margin"][i] == pytest.approx(good - bad, abs=1e-4)
        assert scores["correct"][i] == (good > bad)
        assert scores["won_per_token"][i] == (good / n > bad / m)
        reward = 0.3 * ((good - good_0) - (bad - bad_0))
        assert scores["reward_margin"][i] == pytest.approx(reward, abs=1e-4)
        assert scores["won_by_reward"][i] == (reward > 0)
        assert scores["loss"][i] == pytest.approx(np.log1p(np.exp(-reward)), abs=1e-4)
        chance = 1 / (1 + np.exp(-reward))
        assert scores["brier"][i] == pytest.approx(2 * (1 - chance) ** 2, abs=1e-4)
        assert scores["confidence"][i] == pytest.approx(max(chance, 1 - chance), abs=1e-4)
    assert scores["margin"].std() > 0.5
    assert scores["reward_margin"].std() > 0.05


def test_the_loss_of_the_base_is_log_2(folder):
    task = build(folder, ROWS, KEYS)
    scores = score(task, None)
    assert scores["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert not np.allclose(scores["margin"], 0)


def test_the_base_is_asked_once_and_its_answers_are_kept(folder, monkeypatch):
    first = build(folder, ROWS, KEYS).split("test").inputs["reference"]
    assert first.shape == (len(ROWS), 2, 1)
    monkeypatch.setattr(preference.Preference, "model_on", lambda self, device: pytest.fail("asked again"))
    assert torch.equal(build(folder, ROWS, KEYS).split("test").inputs["reference"], first)
    other = build(folder, [{**row, "bad": "sky"} for row in ROWS], KEYS)
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        other.split("test")


def test_damaged_answers_of_the_base_are_asked_again(folder, monkeypatch):
    import os
    from pathlib import Path

    rows = [{**row, "good": "plus plus"} for row in ROWS]
    before = set(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.safetensors"))
    first = build(folder, rows, KEYS).split("test").inputs["reference"]
    (kept,) = set(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.safetensors")) - before
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with pytest.warns(LoraLabWarning, match=f"{kept.name}: damaged; it is computed again"):
        again = build(folder, rows, KEYS).split("test").inputs["reference"]
    assert torch.equal(again, first)


def test_the_models_own_loss_is_the_mean_of_the_pairs_and_has_their_gradient(folder):
    task = build(folder, ROWS, KEYS)
    adapter = random_adapter(task, folder / "a", LoraConfig(r=2, target_modules=["q_proj"]), seed=1, scale=0.5)
    model = put_on(task.build_model(), adapter).model
    (batch,) = task.training_split().batches(8)
    assert model(**batch).loss.item() == pytest.approx(score(task, adapter, "train")["loss"].mean(), abs=1e-5)
    plain = model(input_ids=batch["input_ids"][:, 0], attention_mask=batch["attention_mask"][:, 0])
    assert plain.logits.shape == (*batch["input_ids"][:, 0].shape, 25)  # as without pairs
    whole = task.split("train").batches(8)[0]
    targets = task.targets_of(task.logits(model, whole), whole)
    assert targets.mean(targets.loss).mean().item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)


def test_it_is_learnt_scored_and_played(folder):
    task = build(folder, ROWS, KEYS)
    before = score(task, None)["correct"].mean()
    adapter, result = train(task, Recipe(steps=40, learning_rate=2e-2, rank=4, batch_size=4))
    told = result.summary["validation"]
    assert next(iter(told)) == "won"
    assert told["won"] == 1 > before
    assert told["won_by_reward"] == 1
    assert result.columns["loss"][0] == pytest.approx(np.log(2), abs=1e-4)
    assert told["loss"] < 0.3
    assert Evaluate().run([adapter], task).rows(adapter=adapter.label)[0]["won"] == 1
    found = Shapley(players="layer", worth="loss", samples=8).run([adapter], task)
    assert sum(row["value"] for row in found.rows()) == pytest.approx(np.log(2) - told["loss"], abs=1e-4)
    evaluator = Evaluator([adapter], task)
    evaluator.scores([evaluator.keeping(evaluator.names[:k]) for k in range(len(evaluator.names) + 1)])
    assert evaluator.effort.why_not is None  # passes share their first blocks


def test_long_pairs_lose_the_same_part_of_the_prompt(folder):
    rows = [{"question": "one two three four", "good": "red", "bad": "red and blue"}]
    task = build(folder, rows, {**KEYS, "max_length": 7})
    good, bad = task.split("test").inputs["input_ids"][0]
    assert task.tokenizer.decode(bad) == "<s> four ? red and blue </s>"
    assert task.tokenizer.decode(good[:5]) == "<s> four ? red </s>"


def test_workers_build_it_again_and_settings_count(folder):
    task = build(folder, ROWS, KEYS)
    again = TaskSpec.of(task).task()
    assert all(torch.equal(again.split("test").inputs[n], t) for n, t in task.split("test").inputs.items())
    adapter = random_adapter(task, folder / "a", LoraConfig(r=2, target_modules=["q_proj"]), seed=0, scale=1.0)
    runs = [Evaluator([adapter], build(folder, ROWS, {**KEYS, "beta": beta})).run_of("test") for beta in (0.1, 0.2)]
    runs.append(Evaluator([adapter], build(folder, [{**ROWS[0], "bad": "two"}], KEYS)).run_of("test"))
    assert len(set(runs)) == 3


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} what {{ m.content }} {% else %} is "
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %} is {% endif %}"
)


def test_conversations(folder):
    plain = tokenizer(bos=True)
    plain.chat_template = TEMPLATE
    plain.save_pretrained(folder / "llama")
    asked = [{"role": "user", "content": "red"}]
    rows = [
        {
            "asked": asked,
            "good": [{"role": "assistant", "content": "one two"}],
            "bad": [{"role": "assistant", "content": "four"}],
        }
    ]
    task = build(folder, rows, {**KEYS, "prompt": "asked"})
    ids, targets = (task.split("test").inputs[name][0] for name in ("input_ids", "targets"))
    assert [plain.decode(row[row > 0]) for row in ids] == ["<s> what red is one two </s>", "<s> what red is four </s>"]
    assert [plain.decode(row[row >= 0]) for row in targets] == ["one two </s>", "four </s>"]


@pytest.mark.parametrize(
    ("rows", "keys", "told"),
    [
        (ROWS, {"beta": 0.0}, "beta is 0.0; a number above 0 is needed"),
        (ROWS, {"chosen": "god"}, "no column 'god'; there are: question, good, bad"),
        ([{"question": "one", "good": "", "bad": "two"}], {}, "an example with an empty answer in 'good'"),
    ],
)
def test_what_is_refused(folder, rows, keys, told):
    with pytest.raises((OptionError, TaskError)) as found:
        build(folder, rows, {**KEYS, **keys}).split("test")
    assert told in str(found.value)
    assert "\n" not in str(found.value)


def test_several_at_once_give_what_single_ones_do(folder):
    task = build(folder, ROWS, KEYS)
    adapter = random_adapter(
        task, folder / "a", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), seed=0, scale=1.0
    )
    alone, together = (Evaluator([adapter], task, Execution(coalitions_at_once=k)) for k in (0, 4))
    names = alone.names
    masks = [alone.keeping(names[i:]) for i in range(len(names) + 1)]
    found = [evaluator.scores(masks) for evaluator in (alone, together)]
    for one, other in zip(*found, strict=True):
        for name, values in one.columns.items():
            assert np.allclose(values, other[name], atol=1e-4), name
    assert any(not np.array_equal(found[0][0]["loss"], one["loss"]) for one in found[0])


def test_merges_that_look_at_data_take_it(folder):
    task = build(folder, ROWS, KEYS)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapters = [random_adapter(task, folder / f"s{i}", config, seed=i, scale=0.5) for i in (0, 1)]
    for method in ("fisher", "regmean"):
        merged = merge(Sources(adapters, tasks=[task, task]), method, options={"examples": 4}).adapter
        assert score(task, merged).loss.mean() != pytest.approx(score(task, None).loss.mean(), abs=1e-4)
