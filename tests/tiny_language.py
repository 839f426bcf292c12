"""Tiny random models of language with a tokenizer of a few words, and task files on rows of one's own."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_lab import tasks

WORDS = [
    "what",
    "is",
    "one",
    "two",
    "three",
    "four",
    "plus",
    "and",
    "equals",
    "red",
    "green",
    "blue",
    "a",
    "the",
    "colour",
    "of",
    "grass",
    "sky",
    "blood",
    ":",
    "?",
]


def tokenizer(*, bos=False, end=False):
    """Of these words; with `bos`, <s> is put before a text, with `end`, </s> after it; with neither it cannot pad."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    named = {"tokenizer_object": words, "eos_token": "</s>", "unk_token": "<unk>"}
    if bos or end:
        single = " ".join([*(["<s>"] if bos else []), "$A", *(["</s>"] if end else [])])
        words.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
        named |= {"bos_token": "<s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(**named)


SHAPE = {"vocab_size": 4 + len(WORDS), "bos_token_id": 1, "eos_token_id": 2}


def write_causal(folder: Path) -> None:
    """`llama`, whose tokenizer puts <s> before a text, and `gpt2`, whose tokenizer cannot even pad."""
    llama = LlamaConfig(
        **SHAPE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    gpt2 = GPT2Config(**SHAPE, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
            model.save_pretrained(folder / name)
            tokenizer(bos=name == "llama").save_pretrained(folder / name)


def write_t5(folder: Path) -> None:
    """`t5` of two blocks in the encoder and two in the decoder, whose tokenizer puts </s> after a text."""
    shape = {**SHAPE, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(**shape, pad_token_id=0, decoder_start_token_id=0, initializer_factor=4.0)
        T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    tokenizer(end=True).save_pretrained(folder / "t5")


def build(folder, rows, keys, base="llama"):
    """The task on these rows, the same ones in every split."""
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines += [f'base = "{base}"', 'data = {train = "rows.jsonl", validation = "rows.jsonl", test = "rows.jsonl"}']
    (folder / "my.toml").write_text("\n".join(lines) + "\n")
    return tasks.from_name(str(folder / "my.toml"))
