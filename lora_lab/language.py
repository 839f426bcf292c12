"""Language models: the loss of texts or completions, and choices by likelihood, as a task file describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.errors import OptionError, TaskError
from lora_lab.file_task import COMMON, FileTask, Settings
from lora_lab.task import Scores, Split, by_length

CAUSAL_EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "causal-lm"

base = "path/to/model"        # folder or hub id; AutoModelForCausalLM must be able to load it
data = "texts.jsonl"          # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split
text = "text"                 # column with the text; or a prompt and its completion, on which alone is scored:
# prompt = "question"
# completion = "answer"
# max_length = 512            # tokens; longer texts are cut
"""
    + COMMON
)

CHOICE_EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "multiple-choice"

base = "path/to/model"        # folder or hub id; AutoModelForCausalLM must be able to load it
data = "questions.jsonl"      # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split
prompt = "Question: {question}\\nAnswer:"   # columns in braces
options = "choices"           # column with a list of answers, or a list with the names of several columns
label = "answer"              # column with the right one: a number from 0, a letter from A, or the answer itself
# max_length = 512            # tokens; longer prompts are cut at their beginning
"""
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class CausalKeys(Settings):
    """The keys of a causal-lm file."""

    kind: str = "causal-lm"
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    max_length: int = 512

    columns: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion")


@dataclass(frozen=True, kw_only=True)
class ChoiceKeys(Settings):
    """The keys of a multiple-choice file."""

    kind: str = "multiple-choice"
    prompt: str
    options: str | list[str]
    label: str
    max_length: int = 512


_FIELD = re.compile(r"{([^{}]+)}")
"""A column's place in a prompt."""


class _Language(FileTask):
    batch_size = 16

    @classmethod
    def _check(cls, settings: Any, where: str) -> None:
        super()._check(settings, where)
        if settings.max_length < 2:
            raise OptionError(f"{where}: max_length is {settings.max_length}; at least 2 tokens are needed")

    def build_model(self) -> nn.Module:
        """The language model, frozen."""
        from transformers import AutoModelForCausalLM

        model: Any = self.pretrained_model(AutoModelForCausalLM)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: targets are tokens, and places of options are checked as they are read."""

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text, if anything."""
        empty: list[int] = self.tokenizer("")["input_ids"]
        return [token for token in empty if token == self.tokenizer.bos_token_id]

    @property
    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _padded(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """(tokens, how many of them are no target) → input_ids, attention_mask, labels (−100: no target)."""
        longest = max(len(tokens) for tokens, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (tokens, given) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            labels[i, given : len(tokens)] = torch.tensor(tokens[given:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class CausalLM(_Language):
    """Texts or completions; the loss of an example is the mean over its tokens, in nats."""

    kind = "causal-lm"
    Keys = CausalKeys
    labels = 0
    classifies = False

    @classmethod
    def _check(cls, settings: Any, where: str) -> None:
        super()._check(settings, where)
        named = [name is not None for name in (settings.text, settings.prompt, settings.completion)]
        if named not in ([True, False, False], [False, True, True]):
            raise OptionError(f"{where}: either text, or prompt and completion, must name columns")

    def _load(self, split: str) -> Split:
        keys, table = self.settings, self.table(split)
        rows = []
        if keys.text:
            for text in table[keys.text]:
                tokens = [*self._start, *self._tokens(str(text))][: keys.max_length]
                rows.append((tokens, 1))  # the first token has nothing before it
        else:
            for prompt, completion in zip(table[keys.prompt], table[keys.completion], strict=True):
                answer = [*self._tokens(str(completion)), *self._end][: keys.max_length - 1]
                given = [*self._start, *self._tokens(str(prompt))][-(keys.max_length - len(answer)) :]
                rows.append(([*given, *answer], max(1, len(given))))
        rows = [row for row in rows if len(row[0]) > row[1]]
        if not rows:
            raise TaskError(f"task {self.name}: no text of its {split} split has two tokens or more")
        return by_length(Split(self._padded(rows)))

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Mean loss over each example's target tokens, the share of them that is predicted right, the mean margin."""
        return _by_example(logits[:, :-1].float(), batch["labels"][:, 1:])

    def perplexity(self, scores: Scores) -> float:
        """exp of the mean loss, every example counted alike."""
        return float(np.exp(scores.mean_loss))


def _by_example(logits: Tensor, targets: Tensor) -> Scores:
    known = targets.clamp(min=0)
    right = logits.gather(-1, known[..., None])[..., 0]
    others = logits.scatter(-1, known[..., None], -torch.inf).amax(-1)
    means = (_losses(logits, targets), logits.argmax(-1) == targets, right - others)
    return Scores(*(_mean(values, targets).cpu().numpy() for values in means))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token."""
    return logits.logsumexp(-1) - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]


def _mean(values: Tensor, targets: Tensor) -> Tensor:
    """Mean over an example's target tokens."""
    counted = targets != -100
    return (values.double() * counted).sum(1) / counted.sum(1).clamp(min=1)


class MultipleChoice(_Language):
    """The option of the highest mean log-likelihood per token is the answer; trained on the right one."""

    kind = "multiple-choice"
    Keys = ChoiceKeys
    rows_are_examples = False

    @classmethod
    def _check(cls, settings: Any, where: str) -> None:
        super()._check(settings, where)
        if isinstance(settings.options, list) and len(settings.options) < 2:
            raise OptionError(f"{where}: options is {settings.options}; two columns or more, or one that holds lists")

    @property
    def labels(self) -> int:  # type: ignore[override]
        """The largest number of options."""
        return int(self.split("test").inputs["input_ids"].shape[1])

    def _wanted(self) -> list[str]:
        keys = self.settings
        options = [keys.options] if isinstance(keys.options, str) else keys.options
        return list(dict.fromkeys([*_FIELD.findall(keys.prompt), *options, keys.label]))

    def _load(self, split: str) -> Split:
        examples = self._examples(split)
        most = max(len(options) for _, options, _ in examples)
        rows = [self._row(prompt, option) for prompt, options, _ in examples for option in _filled(options, most)]
        padded = self._padded(rows)
        shaped = {name: tensor.reshape(len(examples), most, -1) for name, tensor in padded.items()}
        there = torch.tensor([[i < len(options) for i in range(most)] for _, options, _ in examples])
        return by_length(
            Split(
                {
                    "input_ids": shaped["input_ids"],
                    "attention_mask": shaped["attention_mask"],
                    "targets": torch.where(there[..., None], shaped["labels"], -100),
                    "labels": torch.tensor([label for *_, label in examples]),
                }
            )
        )

    def training_split(self) -> Split:
        """Every prompt with its right option, which alone is the target."""
        rows = [self._row(prompt, options[label]) for prompt, options, label in self._examples("train")]
        return by_length(Split(self._padded(rows)))

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean log-likelihood per token of every option, [examples, options]; −inf where there is none."""
        ids = batch["input_ids"]
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        targets = batch["targets"].flatten(0, 1)[:, 1:]
        losses = _mean(_losses(model(**flat).logits[:, :-1].float(), targets), targets)
        found = -losses.float().reshape(ids.shape[:2])
        return found.masked_fill((batch["targets"] == -100).all(-1), -torch.inf)

    def _row(self, prompt: str, option: str) -> tuple[list[int], int]:
        answer = self._tokens(option if prompt.endswith((" ", "\n")) else f" {option}")
        answer = answer[: self.settings.max_length - 1]
        given = [*self._start, *self._tokens(prompt)][-(self.settings.max_length - len(answer)) :]
        return [*given, *answer], max(1, len(given))

    def _examples(self, split: str) -> list[tuple[str, list[str], int]]:
        """Prompt, options and the place of the right one."""
        keys, table = self.settings, self.table(split)
        found = []
        for i, right in enumerate(table[keys.label]):
            prompt = _FIELD.sub(lambda name: str(table[name[1]][i]), keys.prompt)  # noqa: B023 (used at once)
            if isinstance(keys.options, str):
                options = table[keys.options][i]
                if not isinstance(options, list) or len(options) < 2:
                    raise TaskError(
                        f"task {self.name}: options {options!r} in {keys.options!r}; a list of two or more is needed"
                    )
            else:
                options = [table[name][i] for name in keys.options]
            found.append((prompt, *self._filled_in(options, right)))
        return found

    def _filled_in(self, options: Sequence[object], right: object) -> tuple[list[str], int]:
        """The options that are not empty, and the place of the right one among them."""
        place = self._place(right, options)
        if options[place] is None:
            raise TaskError(f"task {self.name}: its right answer {right!r} is an empty option")
        there = [str(option) for option in options if option is not None]
        if len(there) < 2:
            raise TaskError(f"task {self.name}: options {there}; two or more are needed")
        return there, place - sum(option is None for option in options[:place])

    def _place(self, right: object, options: Sequence[object]) -> int:
        if isinstance(right, str) and right in options:
            return list(options).index(right)
        if isinstance(right, str) and len(right) == 1 and right.isalpha():
            right = ord(right.upper()) - ord("A")
        if isinstance(right, str) and right.isdigit():
            right = int(right)
        if isinstance(right, bool) or not isinstance(right, int | np.integer):
            raise TaskError(
                f"task {self.name}: answer {right!r} is a {type(right).__name__}; a number from 0, a letter or the "
                "option itself is needed"
            )
        if right == -1:
            raise TaskError(f"task {self.name}: a split without answers (-1); name another one in splits")
        if not 0 <= right < len(options):
            raise TaskError(f"task {self.name}: answer {right} of {len(options)} options; they count from 0")
        return int(right)


def _filled(options: Sequence[str], count: int) -> list[str]:
    """Options up to a number; what is added is scored nowhere."""
    return [*options, *[options[0]] * (count - len(options))]
