"""Tiny bases of several architectures on disk, adapters that PEFT trained for them, and what PEFT merges of both."""

import copy
import warnings

import peft
import torch
import transformers
from peft_models import randomised

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 40, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
IMAGE = {**SMALL, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
MODELS = {
    "llama": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    "tied": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}),
    "bert": ("BertForSequenceClassification", {**TEXT, "num_labels": 3}),
    "vit": ("ViTForImageClassification", IMAGE),
    "clip": ("CLIPModel", {"text_config": {**TEXT, "max_position_embeddings": 8}, "vision_config": IMAGE}),
    "halves": ("Dinov2ForImageClassification", {**IMAGE, "use_swiglu_ffn": True}),  # two weights in one of the file
    "experts": ("MixtralForCausalLM", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 3}),
}
QV = ["q_proj", "v_proj"]


def class_of(name):
    return getattr(transformers, MODELS[name][0])


def write_base(name, folder, dtype=torch.float64, **more):
    cls, settings = class_of(name), {**MODELS[name][1], **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gpt2":
            settings |= {"bos_token_id": 0, "eos_token_id": 1}
        model = cls(cls.config_class(**copy.deepcopy(settings))).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def load_base(name, folder):
    return class_of(name).from_pretrained(folder, dtype="auto").eval()


def train(name, base, folder, config, seed=1):
    """An adapter of random weights in a folder, as PEFT writes it."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # PEFT draws where the parameters begin
        config = config() if callable(config) else copy.deepcopy(config)
        randomised(peft.get_peft_model(load_base(name, base), config), seed).save_pretrained(folder)
    return folder


def in_peft(name, base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load_base(name, base), adapter).eval()


def merged(name, base, adapter):
    """PEFT's merge_and_unload: parameter → tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return in_peft(name, base, adapter).merge_and_unload().state_dict()
