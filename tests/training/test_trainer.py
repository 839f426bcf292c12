"""The model as the steps of a training see it: its mode, its recomputation, its running statistics."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lora_lab import tasks
from lora_lab.errors import OptionError
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

CASES = Path(__file__).parents[1] / "cases"


def expected(case):
    (folder,) = CASES.glob(f"{case}_*")
    return folder, json.loads((folder / "expected.json").read_text())


def watched(task, monkeypatch, watch):
    """The task whose models `watch` sees once they are built."""
    build = task.build_model

    def built():
        model = build()
        watch(model)
        return model

    monkeypatch.setattr(task, "build_model", built)
    return task


@pytest.mark.parametrize("checkpointing", [False, True])
def test_n15_checkpointing_runs_every_block_twice_a_step_and_the_base_trains(checkpointing, monkeypatch):
    folder, wanted = expected("N15")
    modes, task = [], tasks.from_name(str(folder / "lm.toml"))

    def watch(model):
        layer = model.model.layers[0]
        layer.self_attn.register_forward_pre_hook(lambda module, _: modes.append(layer.training))

    recipe = Recipe(method="lora", steps=6, batch_size=4, checkpointing=checkpointing)
    train(watched(task, monkeypatch, watch), recipe)
    steps = [mode for mode in modes if mode]  # the rest is the scoring at the end
    assert len(steps) == wanted["forwards_of_layer0"]["with" if checkpointing else "without"]
    assert len(modes) > len(steps)


def test_a_base_that_cannot_recompute_is_refused_in_one_line(monkeypatch):
    folder, _ = expected("N15")
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(OptionError, match=r"^checkpointing: LlamaForCausalLM does not support") as caught:
        train(tasks.from_name(str(folder / "lm.toml")), Recipe(steps=2, batch_size=4, checkpointing=True))
    assert "\n" not in str(caught.value)


def saved(folder, model):
    """A base in a folder with the words of the cases, and 40 texts."""
    model.save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CASES / "_bases/llama" / name, folder / "base")
    shutil.copy(next(CASES.glob("N20_*")) / "texts.jsonl", folder)


def language_task(folder, dropout):
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, attention_dropout=dropout)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        saved(folder, LlamaForCausalLM(config))
    (folder / "lm.toml").write_text('kind = "causal-lm"\nbase = "base"\ndata = "texts.jsonl"\ntext = "text"\n')
    return tasks.from_name(str(folder / "lm.toml"))


def test_dropout_of_the_base_is_active_as_under_a_plain_trainer_and_drawn_alike_when_recomputed(tmp_path):
    plain, noisy = (tmp_path / name for name in ("plain", "noisy"))
    losses = {}
    for folder, dropout in ((plain, 0.0), (noisy, 0.4)):
        for checkpointing in (False, True):
            task = language_task(folder, dropout)
            recipe = Recipe(method="coto", steps=4, batch_size=4, checkpointing=checkpointing)
            _, log = train(task, recipe)
            losses[folder.name, checkpointing] = log.columns["loss"]
    assert losses["plain", True] == pytest.approx(losses["plain", False], abs=1e-6)
    assert losses["noisy", True] == pytest.approx(losses["noisy", False], abs=1e-6)
    # the first step's loss is the base's own, so it differs by the dropout alone
    assert abs(losses["noisy", False][0] - losses["plain", False][0]) > 1e-5


def test_a_head_behind_the_dropout_of_a_classifier_is_trained_under_it(tmp_path, monkeypatch):
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**shape, num_attention_heads=2, num_labels=2))
        saved(tmp_path, model)
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = 'kind = "text-classification"\nbase = "base"\ndata = "texts.jsonl"\ntext = "text"\nlabel = "label"\n'
    (tmp_path / "cls.toml").write_text(keys + 'head = "trained"\n')
    seen = []

    def watch(model):
        model.dropout.register_forward_hook(lambda module, given, out: seen.append((out == 0).double().mean().item()))

    task = watched(tasks.from_name(str(tmp_path / "cls.toml")), monkeypatch, watch)
    train(task, Recipe(method="lora", steps=8, batch_size=8))
    assert 0.03 < sum(seen[:8]) / 8 < 0.2  # BERT's 0.1 in every training step
    assert not any(seen[8:])  # and none in scoring
    assert len(seen) > 8


def normed(momentum):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.InstanceNorm2d(4), nn.Flatten())


def test_running_statistics_of_a_frozen_base_stand_still_and_those_of_a_trained_copy_do_not():
    from peft import LoraConfig, get_peft_model

    from lora_lab.training.trainer import training_mode

    config = LoraConfig(target_modules=["0.0"], modules_to_save=["1.1"])
    model = get_peft_model(nn.Sequential(normed(0.5), normed(0.5).append(nn.Dropout(0.5))), config)
    first, second = model.base_model.model[0], model.base_model.model[1]
    copy = second[1].modules_to_save["default"]
    with training_mode(model):
        for _ in range(2):
            assert [module.training for module in (first[0], first[1], first[2], second[-1], copy)] == [
                True,
                False,
                True,  # without running statistics it is the same in both modes
                True,
                True,
            ]
            first(torch.randn(4, 3, 8, 8))
            copy(torch.randn(4, 4, 8, 8))
            assert torch.equal(first[1].running_mean, torch.zeros(4))
            assert not torch.equal(copy.running_mean, torch.zeros(4))
            model.eval()
            assert not any(module.training for module in model.modules())
            model.train()


def test_n20_losses_of_texts_do_not_hang_on_their_batch(monkeypatch):
    folder, _ = expected("N20")
    found = {}
    for size in (1, 16):
        task = tasks.from_name(str(folder / "lm.toml"))
        monkeypatch.setattr(type(task), "batch_size", size)
        found[size] = task.score(task.build_model(), "test").loss
    inputs, model = task.split("test").inputs, task.build_model()
    alone = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        text = ids[mask.bool()][None]
        with torch.no_grad():
            alone.append(float(model(input_ids=text, labels=text).loss))
    assert found[1] == pytest.approx(found[16], abs=1e-5)
    assert found[16] == pytest.approx(alone, abs=1e-5)
    assert len({int(mask.sum()) for mask in inputs["attention_mask"]}) > 3


def test_n22_a_long_prompt_loses_its_beginning_and_no_target():
    folder, _ = expected("N22")
    task = tasks.from_name(str(folder / "pc.toml"))
    answer, end = task.tokenizer.convert_tokens_to_ids("w7"), task.tokenizer.eos_token_id
    for split in (task.training_split(), *map(task.split, ("train", "validation", "test"))):
        for ids, labels in zip(split.inputs["input_ids"], split.inputs["labels"], strict=True):
            assert labels[labels != -100].tolist() == [answer, end]
            assert ids.shape == (8,)


def test_n29_a_base_that_asks_for_bitsandbytes_is_refused_by_its_name(lora_lab):
    from importlib.util import find_spec

    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    folder, _ = expected("N29")
    code, out, err = lora_lab("train", "--task", folder / "lm.toml", "--steps", 2, "-o", "a.safetensors")
    assert (code, out) == (1, "")
    assert "bitsandbytes" in err
    assert err.strip().count("\n") == 0
    assert not Path("a.safetensors").exists()
