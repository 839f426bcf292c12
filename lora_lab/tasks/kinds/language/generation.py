"""Answers that a causal language model generates to prompts, as a task file describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lora_lab.errors import TaskError
from lora_lab.tasks.kinds.language.answering import (
    KEYS,
    Answering,
    AnswerKeys,
    as_bytes,
    padded_left,
    require_generating,
    unpadded,
)
from lora_lab.tasks.kinds.language.chat import Chat, messages
from lora_lab.tasks.kinds.language.language import CausalLM, Row, row_of
from lora_lab.tasks.kinds.language.templates import columns_of, filled
from lora_lab.tasks.settings import COMMON, Column
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Split

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "generation"

base = "path/to/model"        # folder or hub id; AutoModelForCausalLM must be able to load it
data = "questions.jsonl"      # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split
prompt = "Question: {question}\\nAnswer:"   # columns in braces, or the name of one column; of conversations (lists of
#                             # {role, content}) the base's chat template makes a prompt
answer = "answer"             # column with the right answer: a text, or the messages that end a conversation
# max_length = 512            # tokens of a prompt; longer ones are cut at their beginning
"""
    + KEYS
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class Keys(AnswerKeys):
    """The keys of a generation file."""

    kind: str = "generation"
    prompt: str
    answer: Column
    max_length: Annotated[int, Ge(2), "a whole number of at least 2"] = 512

    columns: ClassVar[tuple[str, ...]] = ("prompt", "answer")


class Generation(Answering, CausalLM):  # type: ignore[override]  # metrics of the first
    """Prompts that a causal language model answers; trained on prompt and answer, the answer alone as the target.

    The loss is that of the reference answer, the mean over its tokens: it is smooth where right or wrong is not.
    """

    kind = "generation"
    Keys = Keys  # type: ignore[assignment]

    def build_model(self) -> nn.Module:
        """The language model, frozen; TaskError for one that generates nothing."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        needed = "which answers no prompt: a causal language model does"
        if getattr(self.config, "is_encoder_decoder", False):
            needed = 'an encoder with a decoder: kind = "seq2seq" is for those'
        require_generating(self, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, needed)
        return super().build_model()

    def _wanted(self) -> list[str]:
        return list(dict.fromkeys([*columns_of(self.settings.prompt), self.settings.answer]))

    def _load(self, split: str) -> Split:
        examples = self._examples(split)
        rows, prompts, references = zip(*examples, strict=True)
        self._tell_cut(split, sum(len(self._tokens(text)) > self.settings.max_new_tokens for text in references))
        return by_length(
            Split(
                {
                    **self._padded(rows),
                    **padded_left(prompts, self.tokenizer.pad_token_id),
                    "reference": as_bytes(references),
                    "index": torch.arange(len(rows)),
                }
            )
        )

    def _examples(self, split: str) -> list[tuple[Row, list[int], str]]:
        """Row of prompt and answer, tokens of the prompt alone, and the answer in words."""
        keys, table = self.settings, self.table(split)
        examples = []
        for i, answer in enumerate(table[keys.answer]):
            prompt = filled(self, keys.prompt, {name: table[name][i] for name in columns_of(keys.prompt)})
            if isinstance(prompt, str):
                examples.append(self._of_texts(prompt, text_of(self, answer, keys.answer)))
            else:
                examples.append(self._of_chat(prompt, answer))
        return examples

    def _of_texts(self, prompt: str, answer: str) -> tuple[Row, list[int], str]:
        self._require_answer(answer)
        given, targets = self._parts(prompt, answer)
        begun = self._cut([*self._start, *self._tokens(prompt)])
        if not begun:
            raise TaskError(f"task {self.name}: an example with an empty prompt")
        return row_of(self._cut([*self._start, *given]), targets[: self.settings.max_new_tokens]), begun, answer

    def _of_chat(self, prompt: object, answer: object) -> tuple[Row, list[int], str]:
        keys = self.settings
        chat = Chat(self.tokenizer, keys.base, f"task {self.name}: column {keys.prompt!r}")
        said = (
            answer if isinstance(answer, list) else [{"role": "assistant", "content": text_of(self, answer, "answer")}]
        )
        try:
            text = messages(said, f"task {self.name}: column {keys.answer!r}")[-1]["content"]
            self._require_answer(text)
            ids, labels = chat.row(prompt, said)
            begun = chat.prompt([*messages(prompt, chat.where), *messages(said, chat.where)[:-1]])
        except TaskError as error:
            if self.reach.quotes:
                raise
            raise TaskError(f"{chat.where} holds other conversations than its base's template takes") from error
        first = next((i for i, label in enumerate(labels) if label >= 0), len(ids))
        whole = [*self._cut(ids[:first]), *ids[first:]][: keys.max_length + keys.max_new_tokens]
        marks = [*([-100] * len(self._cut(ids[:first]))), *labels[first:]][: len(whole)]
        return (whole, marks), self._cut(begun), text

    def _require_answer(self, text: str) -> None:
        """TaskError for a reference that no answer could equal."""
        if not text.strip():
            raise TaskError(f"task {self.name}: an example with an empty answer in {self.settings.answer!r}")

    def _cut(self, prompt: Sequence[int]) -> list[int]:
        """A prompt of `max_length` tokens at most, without its beginning but for what the tokenizer puts there."""
        start, most = self._start, self.settings.max_length
        if len(prompt) <= most:
            return list(prompt)
        kept = start if list(prompt[: len(start)]) == start else []
        return [*kept, *prompt[len(prompt) - most + len(kept) :]]

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says of prompt and reference, [examples, tokens, vocabulary]."""
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def training_split(self) -> Split:
        """Prompts with their answers, which alone are the target."""
        inputs: Mapping[str, Any] = self.split("train").inputs
        return Split({name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})

    def _asked(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return unpadded(batch)
