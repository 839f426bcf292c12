"""Answers to questions that are a part of a text: where it begins and ends, as a task file describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from torch import Tensor, nn

from lora_lab.errors import OptionError, TaskError
from lora_lab.tasks.kinds.heads import HeadedTask, float_heads
from lora_lab.tasks.kinds.language.answering import as_bytes, as_texts
from lora_lab.tasks.kinds.language.chat import NO_TARGET
from lora_lab.tasks.kinds.texts import squad
from lora_lab.tasks.settings import COMMON, Column, Count, Settings
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Scores, Split, Targets, mean_where

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "question-answering"

base = "path/to/model"        # folder or hub id; AutoModelForQuestionAnswering must be able to load it
data = "questions.jsonl"      # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split:
# data = {train = "train.jsonl", validation = "dev.jsonl", test = "test.jsonl"}
question = "question"         # column with the question
context = "context"           # column with the text that the answer is a part of
answers = "answers"           # column with the right answers: a text, a list of texts, or SQuAD's table of text and
#                             # answer_start; the first one is trained on, any of them counts as right
# answer_start = "start"      # column with the character at which the answer begins; by default where it first is
# unanswerable = false        # true takes questions without an answer as such (as in SQuAD 2.0), on which none is right
# head = "frozen"             # the last layer: frozen as it is, or "trained" along with the adapter
# max_length = 384            # tokens of a window on question and text; longer texts are seen through several windows
# stride = 128                # tokens of the text that two windows share
# max_answer = 30             # tokens of an answer at most
"""
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class Keys(Settings):
    """The keys of a question-answering file."""

    kind: str = "question-answering"
    question: Column
    context: Column
    answers: Column
    answer_start: Column | None = None
    unanswerable: bool = False
    head: Literal["frozen", "trained"] = "frozen"
    max_length: Count = 384
    stride: Annotated[int, Ge(0), "a whole number of at least 0"] = 128
    max_answer: Count = 30

    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answers", "answer_start")

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if self.stride >= self.max_length:
            raise OptionError(f"{where}: stride is {self.stride}; less than max_length, {self.max_length}, is needed")


class _Row(NamedTuple):
    """A question, its text, all right answers, and the characters of the first from begin to end; −1 of none."""

    question: str
    context: str
    answers: list[str]
    begin: int
    end: int


class QuestionAnswering(HeadedTask):
    """The likeliest span of a text; the loss of a question is the mean over its windows of begin's and end's.

    A window in which the answer is not has its first token (CLS) as the answer, in training too. Of all windows the
    span is taken whose logits of begin and end sum to the most: inside the text, of `max_answer` tokens at most; none
    where `unanswerable` and the least sum of a window's first token is more than that.
    """

    kind = "question-answering"
    Keys = Keys
    classifies = False
    counts_targets = True
    rows_are_examples = False
    labels = 2
    batch_size = 16
    metrics = ("answer_f1", "exact_match", "loss")

    def build_model(self) -> nn.Module:
        """The base, frozen; a head that the checkpoint lacks is drawn from seed 0."""
        from transformers import AutoModelForQuestionAnswering

        finished = any("ForQuestionAnswering" in name for name in self.config.architectures or [])
        model: Any = self.pretrained_head(AutoModelForQuestionAnswering, finished=finished)
        float_heads(model, self.heads(model))
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def training_split(self) -> Split:
        """Every window with its own begin and end."""
        inputs = self.split("train").inputs
        there = inputs["attention_mask"].any(-1)
        return Split({name: inputs[name][there] for name in (*self._given(inputs), "labels")})

    def _given(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """What the model takes of a split."""
        return [name for name in inputs if name in self.tokenizer.model_input_names]

    def step_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Mean cross-entropy of begins and ends over all windows of a step, however many parts it is computed in."""
        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).float()
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of begin and end at every token, [questions, 2, windows, tokens]; −∞ at padding and in missing windows."""
        mask = batch["attention_mask"].bool()
        there = mask.any(-1)
        said = model(**{name: batch[name][there] for name in self._given(batch)})
        both = torch.stack([said.start_logits, said.end_logits], 1).float()
        both = both.masked_fill(~mask[there][:, None], -torch.inf)
        filled = both.new_full((*mask.shape[:2], 2, mask.shape[2]), -torch.inf)
        filled[there] = both
        return filled.transpose(1, 2)

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """The loss of every window's begin and end; as several answers are right, there is no margin."""
        labels = batch["labels"].transpose(1, 2).flatten(1)  # begins of all windows, then ends
        counted = labels != NO_TARGET
        flat = logits.flatten(1, 2)
        # a window that is missing has no finite logit, and its gradient would be none either
        flat = flat.masked_fill(~counted[..., None], 0.0)
        loss = flat.logsumexp(-1) - flat.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return Targets(loss, None, counted)

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Those of every window's begin and end."""
        there = batch["attention_mask"].any(-1)
        return logits.transpose(1, 2)[there].flatten(0, 1)

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Loss, and how far the answer is a right one: wholly (`correct`), and by its words."""
        targets = self.targets_of(logits, batch)
        loss = mean_where(targets.loss, targets.counted).float().double().cpu().numpy()
        rows = [json.loads(text) for text in as_texts(batch["texts"])]
        found = self.answered(logits, batch, [row["context"] for row in rows])
        pairs = [(text, row["answers"]) for text, row in zip(found, rows, strict=True)]
        columns: dict[str, npt.NDArray[Any]] = {
            "loss": loss,
            "correct": np.array([squad.best(squad.exact, *pair) for pair in pairs]) > 0,
            "answer_f1": np.array([squad.best(squad.overlap, *pair) for pair in pairs]),
        }
        return Scores(columns)

    def columns(self, scores: Scores, split: Split) -> Mapping[str, npt.NDArray[Any]]:
        """With `exact_match`, which is what is correct."""
        return {**scores.columns, "exact_match": scores.correct}

    def answered(self, logits: Tensor, batch: Mapping[str, Tensor], contexts: Sequence[str]) -> list[str]:
        """The answer to every question, "" for none."""
        width = logits.shape[-1]
        begins, ends = (batch[name][..., :width] for name in ("begins", "ends"))
        inside = logits.masked_fill(begins[:, None] < 0, -torch.inf)
        best = torch.full_like(inside[:, 0].flatten(1)[:, 0], -torch.inf)
        place, size = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
        for longer in range(min(self.settings.max_answer, width)):
            sums = inside[:, 0, :, : width - longer] + inside[:, 1, :, longer:]
            highest, at = sums.flatten(1).max(1)
            at = at // (width - longer) * width + at % (width - longer)
            better = highest > best
            best, place, size = (
                torch.where(better, new, old)
                for new, old in ((highest, best), (at, place), (torch.full_like(size, longer), size))
            )
        nowhere = ~torch.isfinite(best)
        if self.settings.unanswerable:
            first = logits.gather(-1, batch["first"][:, None].expand(-1, 2, -1, -1))[..., 0].sum(1)
            none = first.masked_fill(~batch["attention_mask"].any(-1), torch.inf).amin(1)
            nowhere |= none > best
        starts = begins.flatten(1).gather(1, place[:, None])[:, 0].tolist()
        stops = ends.flatten(1).gather(1, (place + size)[:, None])[:, 0].tolist()
        rows = zip(contexts, starts, stops, nowhere.tolist(), strict=True)
        return ["" if empty else context[start:stop] for context, start, stop, empty in rows]

    def check_split(self, name: str) -> None:
        """Whether its columns are there, with answers that are in their texts."""
        super().check_split(name)
        self._rows(self._whole(name))

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: answers are checked as they are read."""

    def _rows(self, table: Mapping[str, Sequence[Any]]) -> list[_Row]:
        keys = self.settings
        count = len(table[keys.answers])
        starts = table[keys.answer_start] if keys.answer_start else [None] * count
        return [
            self._row(table[keys.question][i], table[keys.context][i], table[keys.answers][i], starts[i], i)
            for i in range(count)
        ]

    def _row(self, question: object, context: object, cell: object, start: object, row: int) -> _Row:
        """A question as the table has it; TaskError naming the row whose answer is not in its text."""
        keys, where = self.settings, f"(row {row} of a split, counted from 0)"
        asked, text = text_of(self, question, keys.question), text_of(self, context, keys.context)
        answers, starts = self._answers(cell, start, where)
        if not answers:
            if keys.unanswerable:
                return _Row(asked, text, [], -1, -1)
            raise TaskError(
                f"task {self.name}: no answer in {keys.answers!r} {where}; unanswerable = true takes such questions"
            )
        begin = text.find(answers[0]) if starts is None else starts[0]
        if begin < 0 or text[begin : begin + len(answers[0])] != answers[0]:
            told = self.reach.quote(answers[0])
            place = "" if starts is None else f" at character {starts[0]}"
            raise TaskError(f"task {self.name}: the answer {told} is not in its text{place} {where}")
        return _Row(asked, text, answers, begin, begin + len(answers[0]))

    def _answers(self, cell: object, start: object, where: str) -> tuple[list[str], list[int] | None]:
        """Right answers, and where they begin, where the table says it."""
        texts: object = cell
        if isinstance(cell, Mapping):
            texts, start = cell.get("text"), cell.get("answer_start")
        texts = [texts] if isinstance(texts, str) else texts
        if texts is None:
            texts = []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TaskError(
                f"task {self.name}: a {type(cell).__name__} in {self.settings.answers!r} {where}; a text, a list of "
                "texts, or a table of text and answer_start is needed"
            )
        there = [str(text) for text in texts if text]
        starts: list[Any] | None = start if isinstance(start, list) else None if start is None else [start]
        if not there or starts is None:
            return there, None
        if not starts or isinstance(starts[0], bool) or not isinstance(starts[0], int):
            raise TaskError(f"task {self.name}: the answer {where} begins at no whole number of characters")
        return there, starts

    def _load(self, split: str) -> Split:
        rows = self._rows(self.table(split))
        encoded = self._windows(rows)
        of = encoded.pop("overflow_to_sample_mapping")
        spans = encoded.pop("offset_mapping")
        inside = torch.tensor([[part == 1 for part in encoded.sequence_ids(i)] for i in range(len(of))])
        begins, ends = (spans[..., k].masked_fill(~inside, -1) for k in (0, 1))
        first = self._first(encoded["input_ids"])
        labels = torch.tensor(
            [self._label(rows[q], begins[i], ends[i], int(first[i])) for i, q in enumerate(of.tolist())]
        )
        windows: list[list[int]] = [[] for _ in rows]
        for i, q in enumerate(of.tolist()):
            windows[q].append(i)
        sizes = encoded["attention_mask"].sum(1).tolist()
        # those of as many windows beside each other, shortest first
        order = sorted(range(len(rows)), key=lambda q: (len(windows[q]), sum(sizes[i] for i in windows[q])))
        per_window = {
            **{name: encoded[name] for name in self._given(encoded)},
            "begins": begins,
            "ends": ends,
            "first": first[:, None],
            "labels": labels,
        }
        fill = {"labels": NO_TARGET, "begins": -1, "ends": -1}
        shaped = {
            name: _by_row(tensor, [windows[q] for q in order], fill.get(name, 0)) for name, tensor in per_window.items()
        }
        texts = [json.dumps({"context": rows[i].context, "answers": rows[i].answers}) for i in order]
        return Split({**shaped, "texts": as_bytes(texts)})

    def _windows(self, rows: Sequence[_Row]) -> Any:
        """Questions and texts as tokens, a row a window."""
        keys, tokenizer = self.settings, self.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise TaskError(
                f"task {self.name}: the tokenizer of {self.base!r} does not tell where in a text a token is"
            )
        questions = [row.question.strip() for row in rows]
        sizes = [len(tokens) for tokens in tokenizer(questions, add_special_tokens=False)["input_ids"]]
        room = keys.max_length - max(sizes) - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= keys.stride:
            longest = f"a question of {max(sizes)} tokens (row {sizes.index(max(sizes))} of a split)"
            raise TaskError(
                f"task {self.name}: {longest} leaves {max(0, room)} of max_length, {keys.max_length}, for its text; "
                f"more than stride, {keys.stride}, are needed"
            )
        return tokenizer(
            questions,
            [row.context for row in rows],
            truncation="only_second",
            max_length=keys.max_length,
            stride=keys.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )

    def _first(self, ids: Tensor) -> Tensor:
        """Where the token that stands for no answer is in every window: CLS, or the first where there is none."""
        mark = self.tokenizer.cls_token_id
        found = torch.zeros_like(ids) if mark is None else (ids == mark).int()
        return found.argmax(1)

    def _label(self, row: _Row, begins: Tensor, ends: Tensor, first: int) -> tuple[int, int]:
        """First and last token of the answer in a window; twice that of none where it is not wholly there."""
        inside = begins >= 0
        if row.begin < 0 or not inside.any() or begins[inside][0] > row.begin or ends[inside][-1] < row.end:
            return first, first
        start = int((inside & (begins <= row.begin)).nonzero()[-1])
        end = int((inside & (ends >= row.end)).nonzero()[0])
        return start, end


def _by_row(tensor: Tensor, windows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Windows [all, …] as [questions, most windows, …], filled up."""
    shaped = tensor.new_full((len(windows), max(map(len, windows)), *tensor.shape[1:]), fill)
    for row, places in enumerate(windows):
        shaped[row, : len(places)] = tensor[places]
    return shaped
