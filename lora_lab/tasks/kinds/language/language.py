"""Language models: the loss of texts or completions, and choices by likelihood, as a task file describes them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from torch import Tensor, nn

from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.tasks.kinds.language.chat import NO_TARGET, Chat, cut
from lora_lab.tasks.kinds.language.tokens import Row as Row
from lora_lab.tasks.kinds.language.tokens import TokenTask
from lora_lab.tasks.settings import COMMON, Column, Settings
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Scores, Split, Targets, margins, mean_where

CAUSAL_EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "causal-lm"

base = "path/to/model"        # folder or hub id; AutoModelForCausalLM must be able to load it
data = "texts.jsonl"          # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split
text = "text"                 # column with the text, or with conversations (lists of {role, content}): the base's chat
#                             # template writes them, and only what the assistant says is scored;
#                             # or a prompt and its completion, on which alone is scored:
# prompt = "question"
# completion = "answer"       # a space is put between them where neither has one
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
# label_from = 0              # 1 where numbers count from 1
# max_length = 512            # tokens; longer prompts are cut at their beginning
"""
    + COMMON
)

_Tokens = Annotated[int, Ge(2), "a whole number of at least 2"]


@dataclass(frozen=True, kw_only=True)
class CausalKeys(Settings):
    """The keys of a causal-lm file."""

    kind: str = "causal-lm"
    text: Column | None = None
    prompt: Column | None = None
    completion: Column | None = None
    max_length: _Tokens = 512

    columns: ClassVar[tuple[str, ...]] = ("text", "prompt", "completion")

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        named = [name is not None for name in (self.text, self.prompt, self.completion)]
        if named not in ([True, False, False], [False, True, True]):
            raise OptionError(f"{where}: either text, or prompt and completion, must name columns")


@dataclass(frozen=True, kw_only=True)
class ChoiceKeys(Settings):
    """The keys of a multiple-choice file."""

    kind: str = "multiple-choice"
    prompt: str
    options: str | list[str]
    label: Column
    label_from: int | None = None
    max_length: _Tokens = 512

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if isinstance(self.options, list) and len(self.options) < 2:
            raise OptionError(f"{where}: options is {self.options}; two columns or more, or one that holds lists")


_FIELD = re.compile(r"{([^{}]+)}")
"""A column's place in a prompt."""


class _Language(TokenTask):
    batch_size = 16
    counts_targets = True

    def build_model(self) -> nn.Module:
        """The language model, frozen."""
        from transformers import AutoModelForCausalLM

        model: Any = self.pretrained_model(AutoModelForCausalLM)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: targets are tokens, and places of options are checked as they are read."""

    def _row(self, prompt: str, answer: str, most: int | None = None) -> Row:
        """A prompt with its answer, which alone is the target; a long prompt loses its beginning."""
        start, most = self._start, most or self.settings.max_length
        given, targets = self._parts(prompt, answer)
        targets = targets[: most - max(1, len(start))]
        room = most - len(start) - len(targets)
        return row_of([*start, *(given[-room:] if room > 0 else [])], targets)

    def _parts(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of its answer, with its end.

        Both are split into tokens together, as the model meets them, a space between them where there is none; the
        answer begins where the prompt's tokens end.
        """
        if prompt and not prompt[-1].isspace() and not answer[:1].isspace():
            answer = f" {answer}"
        alone, whole = self._tokens(prompt), self._tokens(prompt + answer)
        shared = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        return whole[:shared], [*whole[shared:], *self._ending]

    @property
    def _ending(self) -> list[int]:
        """What a right answer ends with, beyond its text."""
        return []


class CausalLM(_Language):
    """Texts or completions; the loss of an example is the mean over its tokens, in nats."""

    kind = "causal-lm"
    Keys = CausalKeys
    labels = 0
    classifies = False
    metrics: Sequence[str] = ("loss", "perplexity", "token_accuracy")

    @property
    def _ending(self) -> list[int]:
        """A completion is over where it is over."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _load(self, split: str) -> Split:
        keys, table = self.settings, self.table(split)
        names = [keys.text] if keys.text else [keys.prompt, keys.completion]
        rows = [self._example(cells, names) for cells in zip(*(table[name] for name in names), strict=True)]
        scored = [row for row in rows if any(target != NO_TARGET for target in row[1])]
        if not scored:
            raise TaskError(
                f"task {self.name}: no text of its {split} split has a token to predict (two tokens at least)"
            )
        if len(scored) < len(rows):
            short = f"{len(rows) - len(scored)} of {len(rows)} texts of its {split} split have no token to predict"
            warnings.warn(f"task {self.name}: {short} and are left out", LoraLabWarning, stacklevel=2)
        return by_length(Split(self._padded(scored)))

    def _example(self, cells: Sequence[object], names: Sequence[str]) -> Row:
        """One example: a text, a prompt and its completion, or a conversation."""
        talk = next((name for name, cell in zip(names, cells, strict=True) if isinstance(cell, list)), None)
        if talk is not None:
            chat = Chat(self.tokenizer, self.settings.base, f"task {self.name}: column {talk!r}")
            try:
                return cut(chat.row(*cells), self.settings.max_length)
            except TaskError as error:
                if self.reach.quotes:
                    raise
                raise TaskError(f"{chat.where} holds other conversations than its base's template takes") from error
        texts = [text_of(self, cell, name) for cell, name in zip(cells, names, strict=True)]
        if len(texts) > 1:
            return self._row(texts[0], texts[1])
        tokens = [*self._start, *self._tokens(texts[0])][: self.settings.max_length]
        return row_of(tokens[:1], tokens[1:])  # nothing is before the first

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Mean loss over each example's target tokens, the share of them that is predicted right, the mean margin."""
        return _by_example(logits[:, :-1].float(), batch["labels"][:, 1:])

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """Loss and margin of every token."""
        logits, targets = logits[:, :-1].float(), batch["labels"][:, 1:]
        margin = margins(logits, targets.clamp(min=0))
        return Targets(_losses(logits, targets), margin, targets != NO_TARGET)

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Those of every token that is a target."""
        return logits[:, :-1][batch["labels"][:, 1:] != NO_TARGET].float()

    def columns(self, scores: Scores, split: Split) -> Mapping[str, npt.NDArray[Any]]:
        """With the number of tokens of every example that are predicted."""
        tokens = (split.inputs["labels"][:, 1:] != NO_TARGET).sum(1).numpy()
        return {**scores.columns, "tokens": tokens}


def row_of(given: Sequence[int], targets: Sequence[int]) -> Row:
    """Tokens that are given and tokens to predict; the first of all is never predicted."""
    if not given:
        given, targets = targets[:1], targets[1:]
    return [*given, *targets], [*[NO_TARGET] * len(given), *targets]


def _by_example(logits: Tensor, targets: Tensor) -> Scores:
    answers = targets.clamp(min=0)
    values = _losses(logits, targets), logits.argmax(-1) == targets, margins(logits, answers)
    # of float32 precision, as journals keep them
    loss, correct, margin = (mean_where(each, targets != NO_TARGET).float().double().cpu().numpy() for each in values)
    return Scores.judged(loss, correct, margin)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token."""
    return logits.logsumexp(-1) - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]


class MultipleChoice(_Language):
    """The option of the highest mean log-likelihood per token is the answer; trained on the right one.

    Further metrics are what lm-evaluation-harness calls so: acc takes the option of the highest log-likelihood (a sum
    over its tokens), acc_norm that of the highest one per character of the option, acc_bytes per byte of it in UTF-8.
    """

    kind = "multiple-choice"
    metrics = ("accuracy", "loss", "acc", "acc_norm", "acc_bytes", "brier", "ece")
    needs_logits = True
    Keys = ChoiceKeys
    rows_are_examples = False

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
                    "targets": torch.where(there[..., None], shaped["labels"], NO_TARGET),
                    "labels": torch.tensor([label for *_, label in examples]),
                    "characters": _sizes(examples, most, len),
                    "bytes": _sizes(examples, most, lambda option: len(option.encode())),
                }
            )
        )

    def columns(self, scores: Scores, split: Split) -> Mapping[str, npt.NDArray[Any]]:
        """With acc, acc_norm and acc_bytes where logits were kept; of equally good options the first is taken."""
        if scores.logits is None:
            return scores.columns
        inputs = split.inputs
        tokens = (inputs["targets"][..., 1:] != NO_TARGET).sum(-1).numpy()
        there = tokens > 0
        sums = np.where(there, np.where(there, scores.logits, 0.0).astype(np.float64) * tokens, -np.inf)
        right = inputs["labels"].numpy()
        sizes = (1, inputs["characters"][..., 0].numpy(), inputs["bytes"][..., 0].numpy())
        found = {name: (sums / size).argmax(-1) == right for name, size in zip(self.metrics[2:5], sizes, strict=True)}
        return {**scores.columns, **found}

    def training_split(self) -> Split:
        """Every prompt with its right option, which alone is the target."""
        rows = [self._row(prompt, options[label]) for prompt, options, label in self._examples("train")]
        return by_length(Split(self._padded(rows)))

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean log-likelihood per token of every option, [examples, options]; −inf where there is none."""
        ids = batch["input_ids"]
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        targets = batch["targets"].flatten(0, 1)[:, 1:]
        losses = mean_where(_losses(model(**flat).logits[:, :-1].float(), targets), targets != NO_TARGET)
        likelihoods = -losses.float().reshape(ids.shape[:2])
        return likelihoods.masked_fill((batch["targets"] == NO_TARGET).all(-1), -torch.inf)

    def _examples(self, split: str) -> list[tuple[str, list[str], int]]:
        """Prompt, options and the place of the right one."""
        keys, table = self.settings, self.table(split)
        examples = []
        for i, right in enumerate(table[keys.label]):
            cells = {name: text_of(self, table[name][i], name) for name in _FIELD.findall(keys.prompt)}
            prompt = _FIELD.sub(lambda name: cells[name[1]], keys.prompt)  # noqa: B023 (used at once)
            if isinstance(keys.options, str):
                options = table[keys.options][i]
                if not isinstance(options, list) or len(options) < 2:
                    raise TaskError(
                        f"task {self.name}: options {self.reach.quote(options)} in {keys.options!r}; a list of two or "
                        "more is needed"
                    )
            else:
                options = [table[name][i] for name in keys.options]
            examples.append((prompt, *self._filled_in(options, right)))
        counted = [number for right in table[keys.label] if (number := _number(right)) is not None]
        if keys.label_from is None and counted and min(counted) > 0:
            raise TaskError(
                f"task {self.name}: no answer of its {split} split is 0; say label_from = 1 if they count from 1, "
                "or label_from = 0 if from 0"
            )
        return examples

    def _filled_in(self, options: Sequence[object], right: object) -> tuple[list[str], int]:
        """The options that are not empty, and the place of the right one among them."""
        index = self._place(right, options)
        if options[index] in (None, ""):
            raise TaskError(f"task {self.name}: its right answer {self.reach.quote(right)} is an empty option")
        column = self.settings.options if isinstance(self.settings.options, str) else ", ".join(self.settings.options)
        there = [text_of(self, option, column) for option in options if option not in (None, "")]
        if len(there) < 2:
            raise TaskError(f"task {self.name}: options {self.reach.quote(there)}; two or more are needed")
        return there, index - sum(option in (None, "") for option in options[:index])

    def _place(self, right: object, options: Sequence[object]) -> int:
        if isinstance(right, str) and right in options:
            return list(options).index(right)
        given = right
        if isinstance(right, str) and len(right) == 1 and right.isalpha():
            right = ord(right.upper()) - ord("A")
        else:
            number, first = _number(right), self.settings.label_from or 0
            if number is None:
                needed = f"a number from {first}, a letter or the option itself is needed"
                raise TaskError(
                    f"task {self.name}: answer {self.reach.quote(right)} is a {type(right).__name__}; {needed}"
                )
            if number == -1:
                raise TaskError(f"task {self.name}: a split without answers (-1); name another one in splits")
            right = number - first
        if not 0 <= right < len(options):
            more = "" if self.settings.label_from is not None else ", or from 1 with label_from = 1"
            counted = f"they count from {self.settings.label_from or 0}{more}"
            raise TaskError(f"task {self.name}: answer {self.reach.tell(given)} of {len(options)} options; {counted}")
        return right


def _number(right: object) -> int | None:
    """An answer that is a number, or the text of one."""
    if isinstance(right, str) and right.removeprefix("-").isdigit():
        return int(right)
    return int(right) if isinstance(right, int | np.integer) and not isinstance(right, bool) else None


def _sizes(examples: Sequence[tuple[str, list[str], int]], most: int, size: Callable[[str], int]) -> Tensor:
    """Sizes of all options, [examples, most, 1], 1 where there is none; the last dimension is none of tokens."""
    filled = [[size(option) for option in options] + [1] * (most - len(options)) for _, options, _ in examples]
    return torch.tensor(filled)[..., None]


def _filled(options: Sequence[str], count: int) -> list[str]:
    """Options up to a number; what is added is scored nowhere."""
    return [*options, *[options[0]] * (count - len(options))]
