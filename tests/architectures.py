"""Small models of many architectures that wear random adapters, and batches for them."""

import dataclasses

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import block
from lora_lab.adapters.models.attached import put_on
from lora_lab.tasks.task import Scores

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "num_labels": 3}


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_hidden_layers=4, num_labels=3, **SMALL))


def bert():
    return BertForSequenceClassification(BertConfig(num_hidden_layers=4, **SMALL, **TEXT))


def albert():
    return AlbertForSequenceClassification(AlbertConfig(embedding_size=8, num_hidden_layers=3, **SMALL, **TEXT))


def gpt2():
    config = GPT2Config(n_positions=16, n_embd=16, n_layer=4, n_head=2, pad_token_id=0, **TEXT)
    return GPT2ForSequenceClassification(config)


def llama():
    return LlamaForSequenceClassification(
        LlamaConfig(num_hidden_layers=4, num_key_value_heads=1, pad_token_id=0, **SMALL, **TEXT)
    )


def t5():
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, dropout_rate=0.0, **TEXT)
    config.eos_token_id, config.decoder_start_token_id, config.pad_token_id = 1, 0, 0
    return T5ForSequenceClassification(config)


class Clip(nn.Module):
    """CLIP as a classifier: similarities of an image to three texts."""

    def __init__(self):
        super().__init__()
        tower = {**SMALL, "num_hidden_layers": 3}
        text = {**tower, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 1, "projection_dim": 8}
        vision = {**tower, "image_size": 8, "patch_size": 4, "projection_dim": 8}
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        self.register_buffer("texts", torch.tensor([[3, 4, 1], [5, 6, 1], [7, 8, 1]]))

    def forward(self, pixel_values):
        found = self.clip(input_ids=self.texts, pixel_values=pixel_values, attention_mask=torch.ones_like(self.texts))
        return dataclasses.make_dataclass("Output", ["logits"])(found.logits_per_image)


def tokens(n, length=7):
    ids = torch.randint(2, 40, (n, length), generator=torch.Generator().manual_seed(n))
    ids[:, -1] = 1  # T5 reads the end-of-text token
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    ids[0, 4:] = 0
    ids[0, 3] = 1
    ids[1:, -1] = 1
    return {"input_ids": ids, "attention_mask": mask}


def images(n):
    return {"pixel_values": torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))}


ARCHITECTURES = {
    "vit": (vit, images, ["q_proj", "v_proj", "fc1"]),
    "bert": (bert, tokens, ["query", "value", "dense"]),
    "gpt2": (gpt2, tokens, ["c_attn", "c_fc"]),
    "llama": (llama, tokens, ["q_proj", "v_proj", "down_proj"]),
    "t5": (t5, tokens, ["q", "v", "wo"]),
    "clip": (Clip, images, ["q_proj", "fc2"]),
    "clip text": (Clip, images, r".*text_model.*\.(q_proj|fc2)"),
    "clip vision": (Clip, images, r".*vision_model.*\.(q_proj|fc2)"),
}


def judge(model, batch):
    logits = model(**batch).logits.float().numpy()
    n = len(logits)
    return Scores.judged(np.zeros(n), np.zeros(n, bool), np.zeros(n), logits)


def worn(tmp_path, make, targets, config=None, scale=0.3):
    """A model that wears a random adapter, and the adapter."""
    torch.manual_seed(0)
    base = make().eval().requires_grad_(False)
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    wrapped = get_peft_model(base, config or LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    torch.manual_seed(0)
    fresh = make().eval().requires_grad_(False)
    fresh.load_state_dict(state)
    return put_on(fresh, adapter), adapter


def by_block(engine, masks):
    """Variants that switch whole blocks."""
    blocks = [block(name) for name in engine.names]
    order = [name for name in dict.fromkeys(blocks) if name not in engine.names]
    return [tuple(float(name not in order or mask[order.index(name)]) for name in blocks) for mask in masks], len(order)
