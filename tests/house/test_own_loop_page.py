"""The loop of docs/your-own-loop.md, word for word, on a tiny model."""

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

PAGE = (Path(__file__).parents[2] / "docs/your-own-loop.md").read_text()


def test_the_loop_trains_every_layer_and_leaves_the_model_as_it_was(base_model):
    model = get_peft_model(base_model("llama").float(), LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.arange(8)[None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(block, {"model": model, "batches": [{"input_ids": ids, "labels": ids}] * 12})
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("forward" in vars(module) for module in model.modules())
