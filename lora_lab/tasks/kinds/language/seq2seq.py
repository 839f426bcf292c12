"""Texts that an encoder with a decoder (T5, BART …) makes of others, as a task file describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lora_lab.errors import OptionError, TaskError
from lora_lab.tasks.kinds.language.answering import KEYS, Answering, AnswerKeys, as_bytes, require_generating
from lora_lab.tasks.kinds.language.chat import NO_TARGET
from lora_lab.tasks.kinds.language.language import CausalLM
from lora_lab.tasks.kinds.language.templates import columns_of, filled
from lora_lab.tasks.settings import COMMON, Column
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Scores, Split

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "seq2seq"

base = "path/to/t5"           # folder or hub id; AutoModelForSeq2SeqLM must be able to load it
data = "articles.jsonl"       # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split
source = "summarize: {article}"   # columns in braces, or the name of one column
target = "summary"            # column with the text that is to come of it
# max_length = 512            # tokens of a source; longer ones are cut
# generate = true             # false scores the loss of the target alone, which is faster
"""
    + KEYS
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class Keys(AnswerKeys):
    """The keys of a seq2seq file."""

    kind: str = "seq2seq"
    source: str
    target: Column
    max_length: Annotated[int, Ge(2), "a whole number of at least 2"] = 512
    generate: bool = True

    columns: ClassVar[tuple[str, ...]] = ("source", "target")

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if self.rouge and not self.generate:
            raise OptionError(f"{where}: rouge is of generated texts; generate = true is needed")


class Seq2Seq(Answering, CausalLM):
    """Texts made of others by an encoder with a decoder; the loss of an example is the mean over its target's tokens.

    To its decoder, a target is what a text is to a causal language model: tokens after a first one that is given.
    """

    kind = "seq2seq"
    Keys = Keys  # type: ignore[assignment]
    counts_targets = False  # T5 and its like take means over a batch's tokens whatever they are told

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """The loss first, of which every kind of text has a useful one."""
        first = ("loss", "perplexity")
        return tuple(dict.fromkeys((first[0], *super().metrics))) if self.settings.generate else first

    @property
    def why_not_shared(self) -> str | None:  # type: ignore[override]
        """Nothing, where the loss alone is scored."""
        return Answering.why_not_shared if self.settings.generate else None

    def build_model(self) -> nn.Module:
        """The encoder and decoder, frozen; TaskError for a base that is none."""
        from transformers import AutoModelForSeq2SeqLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        if not getattr(self.config, "is_encoder_decoder", False):
            what = f"is a {self.config.model_type}, no encoder with a decoder"
            raise TaskError(f'task {self.name}: its base {self.base!r} {what}; kind = "generation" is for those')
        require_generating(self, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "which writes no texts")
        model: Any = self.pretrained_model(AutoModelForSeq2SeqLM)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def heads(self, model: nn.Module) -> list[str]:
        """What makes logits of the decoder's output; encoder and decoder stand side by side, not in a base model."""
        outputs: Any = model
        head = outputs.get_output_embeddings()
        return [name for name, module in model.named_modules() if module is head]

    def _wanted(self) -> list[str]:
        return list(dict.fromkeys([*columns_of(self.settings.source), self.settings.target]))

    def _load(self, split: str) -> Split:
        keys, table = self.settings, self.table(split)
        names = columns_of(keys.source)
        sources = [self._source({name: table[name][i] for name in names}) for i in range(len(table[keys.target]))]
        texts = [text_of(self, cell, keys.target) for cell in table[keys.target]]
        if not all(text.strip() for text in texts):
            raise TaskError(f"task {self.name}: an example with an empty text in {keys.target!r}")
        inputs, longer = self._encoded(sources, texts)
        self._tell_cut(split, longer)
        return by_length(Split({**inputs, "reference": as_bytes(texts), "index": torch.arange(len(texts))}))

    def _encoded(self, sources: Sequence[str], texts: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """Sources and targets as the model takes them, and how many targets were too long and are cut."""
        most = self.settings.max_length, self.settings.max_new_tokens
        targets = [self.tokenizer(text_target=text)["input_ids"] for text in texts]
        read = self.tokenizer(list(sources), truncation=True, max_length=most[0], padding=True, return_tensors="pt")
        inputs = {name: read[name] for name in ("input_ids", "attention_mask")}
        rows = self._decoded([tokens[: most[1]] for tokens in targets], inputs["input_ids"].shape[1])
        return {**inputs, **rows}, sum(len(tokens) > most[1] for tokens in targets)

    def encode_texts(self, texts: Sequence[str], targets: Sequence[str] | None = None) -> Split:
        """The texts as sources, not put into the task's template; TaskError without a target of each."""
        if targets is None:
            needed = "a .jsonl or .csv with the columns text and target is needed"
            raise TaskError(f"task {self.name}: its model writes a target of every text; {needed}")
        return by_length(Split(self._encoded(texts, targets)[0]))

    def text_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says of every token of the targets, [texts, tokens, vocabulary]."""
        return self.logits(model, batch)[:, :-1].float()

    def _source(self, cells: Mapping[str, object]) -> str:
        source = filled(self, self.settings.source, cells)
        if not isinstance(source, str):
            raise TaskError(f"task {self.name}: column {self.settings.source!r} holds lists; texts are needed")
        return source

    def _decoded(self, targets: Sequence[Sequence[int]], width: int) -> dict[str, Tensor]:
        """What the decoder is given, and its labels, each beginning with the token that a text begins with.

        They are as wide as no source is, with the first token or without: batches are cut to their longest source.
        """
        start = self.config.decoder_start_token_id
        if start is None:
            raise TaskError(f"task {self.name}: the configuration of {self.base!r} names no decoder_start_token_id")
        longest = 1 + max(map(len, targets))
        longest += 2 * (longest in (width, width + 1))
        given = torch.full((len(targets), longest), self.tokenizer.pad_token_id)
        labels = torch.full_like(given, NO_TARGET)
        given[:, 0] = start
        for i, tokens in enumerate(targets):
            given[i, 1 : len(tokens) + 1] = labels[i, 1 : len(tokens) + 1] = torch.tensor(tokens)
        return {"decoder_input_ids": given, "labels": labels}

    def training_split(self) -> Split:
        """Sources with their targets, before which the model itself puts the first token."""
        inputs = self.split("train").inputs
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return Split({**read, "labels": inputs["labels"][:, 1:]})

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says of the targets, [examples, tokens, vocabulary]."""
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        logits: Tensor = model(**{name: batch[name] for name in names}).logits
        return logits

    def judge(self, model: nn.Module, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Scores of the targets, and of the texts that are generated."""
        way = Answering if self.settings.generate else CausalLM
        return way.judge(self, model, batch, keep_logits=keep_logits)

    def _asked(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _given(self, asked: Mapping[str, Tensor]) -> int:
        return 1
