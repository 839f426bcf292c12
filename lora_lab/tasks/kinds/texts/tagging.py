"""A tag for every word of a text: named entities and the like, as a task file describes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.tasks.kinds.heads import ProbedTask, float_heads
from lora_lab.tasks.kinds.language.chat import NO_TARGET
from lora_lab.tasks.kinds.texts.listed import ListedTask
from lora_lab.tasks.settings import COMMON, Column, Count, Head, Settings
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Scores, Split, Targets, margins, mean_where

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "token-classification"

base = "path/to/model"        # folder or hub id; AutoModelForTokenClassification must be able to load it
data = "entities.jsonl"       # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split:
# data = {train = "train.jsonl", validation = "dev.jsonl", test = "test.jsonl"}
words = "tokens"              # column with the list of a text's words
tags = "ner_tags"             # column with the list of their tags, one a word: names, or numbers from 0
# labels = ["O", "B-PER", "I-PER"]   # names in the order of the model's outputs; by default sorted
# scheme = "BIO"              # tags are of spans: B-X begins one of type X, I-X goes on with it, O is outside; or
#                             # "plain". By default what the names of the tags look like
# head = "frozen"             # the last layer: frozen as it is, trained along with the adapter, or a probe: fitted
#                             # to the base's features by logistic regression, then frozen
# max_length = 128            # tokens; longer texts are cut. A word is tagged by the first of its tokens
"""
    + COMMON
)

_OUTSIDE, _BEGINS, _GOES_ON = "O", "B-", "I-"
_SPACED = ("bloom", "deberta", "gpt2", "longformer", "roberta", "xlm-roberta-xl")
"""Kinds of models whose tokenizers must be told that a word by itself comes after a space."""


@dataclass(frozen=True, kw_only=True)
class Keys(Settings):
    """The keys of a token-classification file."""

    kind: str = "token-classification"
    words: Column
    tags: Column
    labels: list[str] | None = None
    scheme: Literal["BIO", "plain"] | None = None
    head: Head = "frozen"
    max_length: Count = 128

    columns: ClassVar[tuple[str, ...]] = ("words", "tags")

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise OptionError(f"{where}: labels is {self.labels}; different names, two or more, are needed")


class TokenClassification(ProbedTask, ListedTask):
    """A tag for every word; the loss of a text is the mean over its words, that of a training step over all words.

    A word is what its first token is said to be, as in transformers' examples. Spans are counted as seqeval does
    (and conlleval before it): one begins at B, or at an I of another type than what is before it.
    """

    kind = "token-classification"
    Keys = Keys
    listed = "tags"
    classifies = False
    counts_targets = True

    @property
    def labels(self) -> int:  # type: ignore[override]
        """Number of tags."""
        return len(self.names)

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """Of spans, where the tags are of such, the main one."""
        spans = ("span_f1", "span_precision", "span_recall") if self._spans else ()
        return (*spans, "tag_accuracy", "tag_loss", "loss")

    @cached_property
    def _spans(self) -> tuple[Tensor, Tensor] | None:
        """Of every tag its type (−1: outside), and whether it begins a span; None where tags are of words alone."""
        found = [name == _OUTSIDE or name[:2] in (_BEGINS, _GOES_ON) for name in self.names]
        scheme = self.settings.scheme
        if scheme == "plain" or (scheme is None and not all(found)):
            return None
        if not all(found):
            odd = self.reach.quote(self.names[found.index(False)])
            raise TaskError(f"task {self.name}: the tag {odd} is neither O nor B-… nor I-…, which scheme BIO needs")
        types = sorted({name[2:] for name in self.names if name != _OUTSIDE})
        of = [-1 if name == _OUTSIDE else types.index(name[2:]) for name in self.names]
        return torch.tensor(of), torch.tensor([name.startswith(_BEGINS) for name in self.names])

    @property
    def _finished(self) -> bool:
        return any("ForTokenClassification" in name for name in self.config.architectures or [])

    @property
    def tokenizer_options(self) -> Mapping[str, Any]:
        """How words that stand by themselves are split."""
        return {"add_prefix_space": True} if self.config.model_type in _SPACED else {}

    def build_model(self) -> nn.Module:
        """The base, frozen; a head that the checkpoint lacks is drawn from seed 0, or fitted for a probe."""
        model = self._built_anew()
        if self.settings.head == "probe":
            head = self._head(model)
            for own, fitted in zip((head.weight, head.bias), self._probe, strict=True):
                own.data = fitted.to(own)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _built_anew(self) -> Any:
        from transformers import AutoModelForTokenClassification

        model: Any = self.pretrained_head(AutoModelForTokenClassification, finished=self._finished)
        float_heads(model, self.heads(model))
        return model

    def _head(self, model: nn.Module) -> Any:
        """The linear layer that a probe takes the place of."""
        modules = [model.get_submodule(name) for name in self.heads(model)]
        linear = [module for module in modules if isinstance(module, nn.Linear)]
        if len(linear) != 1:
            raise TaskError(f"task {self.name}: {type(model).__name__} has no single linear head that could be a probe")
        return linear[0]

    @torch.inference_mode()
    def _features(self) -> npt.NDArray[np.float64]:
        model = self._built_anew().requires_grad_(False).eval()
        seen: list[npt.NDArray[np.float64]] = []
        given: list[Tensor] = []
        self._head(model).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        for batch in self.split("train").batches(self.batch_size):
            self.logits(model, batch)
            seen.append(given.pop()[batch["labels"] != NO_TARGET].double().numpy())
        return np.concatenate(seen)

    def _fit(self, features: npt.NDArray[np.float64], answers: npt.NDArray[Any], labels: int) -> tuple[Tensor, Tensor]:
        """Logistic regression of the tags of all words."""
        return super()._fit(features, answers[answers != NO_TARGET], labels)

    def step_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean cross-entropy over all words of a step, however many parts it is computed in."""
        total = nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return total / ((labels != NO_TARGET).sum() if num_items_in_batch is None else num_items_in_batch)

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """Loss and margin of every word."""
        logits, labels = logits.float(), batch["labels"]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return Targets(loss, margins(logits, labels.clamp(min=0)), labels != NO_TARGET)

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Those of every word."""
        return logits[batch["labels"] != NO_TARGET].float()

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Means over each text's words, how many these are, and counts of spans."""
        targets, labels = self.targets_of(logits, batch), batch["labels"]
        said = logits.argmax(-1)
        assert targets.margin is not None
        means = (mean_where(each, targets.counted) for each in (targets.loss, said == labels, targets.margin))
        # of float32 precision, as journals keep them
        loss, correct, margin = (mean.float().double().cpu().numpy() for mean in means)
        columns = {"loss": loss, "correct": correct, "margin": margin, "tokens": targets.counted.sum(1).cpu().numpy()}
        if self._spans is not None:
            columns |= self._counted_spans(said.cpu(), labels.cpu())
        return Scores(columns)

    def _counted_spans(self, said: Tensor, labels: Tensor) -> dict[str, npt.NDArray[np.int64]]:
        """Spans of a type that are there, that are said, and that are both from the same word to the same word."""
        counted = labels != NO_TARGET
        order = (~counted).int().argsort(dim=1, stable=True)  # words beside each other, whatever stood between them
        there = counted.gather(1, order)
        found = [self._spans_of(tags.clamp(min=0).gather(1, order), there) for tags in (said, labels)]
        (types, begins, ends), (right_types, right_begins, right_ends) = found
        both = begins & right_begins & (types == right_types) & (ends == right_ends)
        counts = {"spans_correct": both, "spans_predicted": begins, "spans_true": right_begins}
        return {name: spans.sum(1).numpy() for name, spans in counts.items()}

    def _spans_of(self, tags: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tags [texts, words]: each one's type, whether a span begins, and where the next span ends."""
        assert self._spans is not None
        types = self._spans[0][tags].masked_fill(~there, -1)
        nothing = torch.full_like(types[:, :1], -1)
        inside, before = types >= 0, torch.cat([nothing, types[:, :-1]], 1)
        begins = inside & (self._spans[1][tags] | (types != before))
        after = torch.cat([inside[:, 1:] & ~begins[:, 1:], nothing > 0], 1)  # whether the next word goes on with it
        places = torch.arange(tags.shape[1]).expand_as(tags).masked_fill(~(inside & ~after), tags.shape[1])
        return types, begins, places.flip(1).cummin(1).values.flip(1)

    def check_split(self, name: str) -> None:
        """Whether its columns are there, and its tags known."""
        super().check_split(name)
        self._rows(self._whole(name))

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: tags are checked as they are read."""

    def _rows(self, table: Mapping[str, Sequence[Any]]) -> list[tuple[list[str], list[int]]]:
        """Words and tags of every text; TaskError naming the row whose numbers differ."""
        keys, rows = self.settings, []
        for row, (words, cell) in enumerate(zip(table[keys.words], table[keys.tags], strict=True)):
            where = f"(row {row} of a split, counted from 0)"
            if not isinstance(words, list):
                kind = type(words).__name__
                raise TaskError(f"task {self.name}: a {kind} in {keys.words!r} {where}; a list of words is needed")
            tags = self._cell(cell, row)
            if len(tags) != len(words):
                raise TaskError(
                    f"task {self.name}: {len(words)} words and {len(tags)} tags {where}; one a word is needed"
                )
            rows.append(([text_of(self, word, keys.words) for word in words], [self._place(tag, row) for tag in tags]))
        return rows

    def _load(self, split: str) -> Split:
        rows = self._rows(self.table(split))
        if not getattr(self.tokenizer, "is_fast", False):
            raise TaskError(f"task {self.name}: the tokenizer of {self.base!r} does not tell which word a token is of")
        encoded = self.tokenizer(
            [words for words, _ in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=self.settings.max_length,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(encoded["input_ids"], NO_TARGET)
        for i, (_, tags) in enumerate(rows):
            places = encoded.word_ids(i)
            for k, word in enumerate(places):
                if word is not None and (k == 0 or word != places[k - 1]):
                    labels[i, k] = tags[word]
        self._tell_lost(split, sum(len(tags) for _, tags in rows), labels)
        tagged = (labels != NO_TARGET).any(1)
        return by_length(Split({name: tensor[tagged] for name, tensor in {**encoded, "labels": labels}.items()}))

    def _tell_lost(self, split: str, words: int, labels: Tensor) -> None:
        there = int((labels != NO_TARGET).sum())
        if not there:
            raise TaskError(f"task {self.name}: its {split} split has no word with a token")
        if there < words:
            lost = f"{words - there} of {words} words of its {split} split are beyond max_length, or give no token"
            warnings.warn(f"task {self.name}: {lost}, and are not scored", LoraLabWarning, stacklevel=2)
