import shutil

import psutil
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lora_lab.errors import MismatchError, TaskError
from lora_lab.hub import base_model, check_memory, pretrained

SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_is_built_in_the_class_that_its_configuration_names(folder):
    model = base_model(str(folder), ["bert.encoder.layer.0.attention.self.query"])
    assert isinstance(model, BertForSequenceClassification)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_loading_leaves_the_global_random_state_alone(folder):
    before = torch.random.get_rng_state()
    base_model(str(folder))
    assert (torch.random.get_rng_state() == before).all()


def test_a_base_without_the_adapters_modules_is_refused(folder):
    with pytest.raises(MismatchError, match=r"BertForSequenceClassification.*has no module model\.layers\.0"):
        base_model(str(folder), ["model.layers.0"])


def test_what_cannot_be_loaded_says_what_was_looked_for_and_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(TaskError, match=r"the model 'no/such-model' cannot be loaded .*give a folder, or a hub id"):
        pretrained(BertModel, "no/such-model")


def test_weights_that_would_not_fit_are_refused_before_they_are_read(folder, tmp_path, monkeypatch):
    size = (folder / "model.safetensors").stat().st_size

    class Memory:
        available = 0.75 * size

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    check_memory("no/hub/id", torch.float32, where="base")
    check_memory("some/model", torch.float32, where="base")  # not in the cache: nothing is known of it
    cached = tmp_path / "models--some--model"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TaskError, match=r"base 'some/model' takes .* GiB in float32"):
        check_memory("some/model", torch.float32, where="base")
    check_memory(str(folder), torch.bfloat16, where="base")
    with pytest.raises(TaskError, match=r'GiB in float32, and .* GiB are free; dtype = "bfloat16" takes half'):
        check_memory(str(folder), torch.float32, where="base")
    Memory.available = size
    check_memory(str(folder), torch.float32, where="base")
