"""What is trained here is what PEFT itself loads: the same logits, and nothing asked for that is left out."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from lora_lab import tasks
from lora_lab.adapters.models.attached import attach
from lora_lab.errors import OptionError
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

CASES = Path(__file__).parents[1] / "cases"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture
def task(tmp_path):
    """A mixture of experts whose weights are stacks, as transformers 5 has them."""
    shutil.copytree(CASES / "_bases/mixtral", tmp_path / "base")
    shutil.copy(CASES / "N20_loss_and_padding/texts.jsonl", tmp_path)
    (tmp_path / "lm.toml").write_text('kind = "causal-lm"\nbase = "base"\ndata = "texts.jsonl"\ntext = "text"\n')
    return tasks.from_name(str(tmp_path / "lm.toml"))


@pytest.mark.parametrize(
    ("peft", "config", "modules"),
    [
        ("lora", {}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("rslora", {"target_modules": ["q_proj"]}, {"q_proj"}),
        ("dora", {"target_modules": ["q_proj"]}, {"q_proj"}),
        ("loha", {"target_modules": ["q_proj"]}, {"q_proj"}),
        ("lora", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]}, {"q_proj", "experts"}),
        ("lora", {"target_modules": [], "target_parameters": EXPERTS}, {"experts", "base_layer"}),
    ],
)
def test_peft_loads_what_was_trained_with_the_same_logits(task, tmp_path, peft, config, modules):
    adapter, _ = train(task, Recipe(method="coto", peft=peft, peft_config=config, steps=2, batch_size=4))
    assert {name.rpartition(".")[2] for name in adapter.sites} == modules
    folder = adapter.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(task.build_model(), folder).eval()
    assert get_peft_model_state_dict(theirs).keys() == adapter.tensors.keys()
    (batch, *_) = task.split("test").batches(4)
    with torch.no_grad(), attach(task.build_model(), adapter) as attached:
        ours = task.logits(attached.model, batch)
        assert torch.equal(ours, task.logits(theirs, batch))
        assert not torch.allclose(ours, task.logits(task.build_model(), batch), atol=1e-6)
    for key, tensor in adapter.tensors.items():
        assert "lora_B" not in key or tensor.abs().sum() > 0, key  # every place asked for was trained


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"target_parameters": ["mlp.experts.up_proj"]}, "target_parameters names 'mlp.experts.up_proj', and the base"),
        ({"target_modules": ["q_proj", "c_attn"]}, "target_modules names 'c_attn', and the base has no such module"),
        ({"modules_to_save": ["score"]}, "modules_to_save names 'score', and the base has no such module"),
    ],
)
def test_names_that_the_base_lacks_are_refused_where_peft_passes_over_them(task, config, text):
    with pytest.raises(OptionError, match=text):
        train(task, Recipe(peft_config=config, steps=2, batch_size=4))
