"""What adapters change beside their task: losses and chances on texts that have nothing to do with it.

Forgetting is what PEFT's method comparison calls so: the mean loss over all tokens of unrelated texts with the adapter,
less that of the base alone. The divergence tells also what changed without becoming worse.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.adapters.attached import attach
from lora_lab.errors import DivergedError, FileError
from lora_lab.files.disk import size_of
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import Change
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.metrics import Column, Metric, mean_of
from lora_lab.tasks.task import Scores, Task

LARGEST = 2**26
"""Bytes of a file of texts."""
COLUMN = "text"
_HELD = 2**30
"""Bytes of the base's logits that are held at once."""


def _weighted(mean: Column, tokens: Column) -> Sequence[Column]:
    return mean * tokens, tokens


def _more_loss(loss: Column, base_loss: Column, tokens: Column) -> Sequence[Column]:
    return (loss - base_loss) * tokens, tokens


def _over_all(total: Floats, tokens: Floats) -> Floats:
    return total / tokens


OF_TOKENS = {
    "forgetting": Metric(
        "mean loss over all tokens of unrelated texts, less that of the base alone",
        ("loss", "base_loss", "tokens"),
        _over_all,
        _more_loss,
        higher=False,
        unit="nats",
    ),
    "kl": Metric(
        "KL(base ‖ with the adapter) of the next token, the mean over all tokens of unrelated texts",
        ("kl", "tokens"),
        _over_all,
        _weighted,
        higher=False,
        unit="nats",
    ),
}
"""Of models that write."""
OF_LABELS = {
    "kl": mean_of(
        "kl", "KL(base ‖ with the adapter) of a text's labels, the mean over unrelated texts", higher=False, unit="nats"
    )
}
"""Of classifiers."""


@dataclass(frozen=True)
class Texts:
    """Texts that have nothing to do with a task, and a hash of them."""

    digest: str
    texts: tuple[str, ...] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Texts:
        """Of a .txt with a text a line, or a .jsonl or .csv with a column `text`; FileError for any other."""
        readers = {".txt": _lines, ".jsonl": _of_json, ".csv": _of_csv}
        if path.suffix not in readers:
            raise FileError(f"{path}: {', '.join(readers)} can be read as texts")
        size = size_of(path)
        if size > LARGEST:
            raise FileError(f"{path}: {size} bytes of texts; at most {LARGEST} are read")
        try:
            texts = tuple(text for text in readers[path.suffix](path) if text.strip())
        except UnicodeDecodeError as error:
            raise FileError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
        if len(texts) < 2:
            raise FileError(f"{path}: {len(texts)} texts; an interval needs 2 or more")
        return cls(hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16], texts)


def _lines(path: Path) -> Iterator[str]:
    yield from path.read_text("utf-8").split("\n")


def _of_json(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FileError(f"{path}: line {number} is no JSON") from error
            yield _cell(row, f"{path}: line {number}")


def _of_csv(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        try:
            for row in rows:
                yield _cell(row, f"{path}: line {rows.line_num}")
        except csv.Error as error:
            raise FileError(f"{path}: line {rows.line_num} is no CSV ({error})") from error


def _cell(row: object, where: str) -> str:
    text = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise FileError(f"{where} has no text in a column {COLUMN!r}")
    return text


@dataclass(frozen=True)
class OnTexts(Change):
    """An adapter and the base of its task on texts: `kl`, and of models that write `loss`, `base_loss` and `tokens`."""

    index: int
    texts: Texts

    def apply(self, models: TaskModels, examples: Examples) -> Scores:
        """One value a text, shortest first."""
        task, adapter = models.tasks[self.index], models.adapters[self.index]
        split = task.encode_texts(self.texts.texts)
        model = task.model_on(models.device).eval()
        device, parts, held, size = next(model.parameters()).device, [], [], 0
        batches = [{n: t.to(device) for n, t in batch.items()} for batch in split.batches(task.batch_size)]
        for place, batch in enumerate(batches, 1):
            with torch.inference_mode():
                held.append((batch, task.text_logits(model, batch)))
            size += held[-1][1].nbytes
            if size > _HELD or place == len(batches):
                # the base is the model without PEFT's layers, since some adapters change the weights below them
                with attach(model, adapter) as attached:
                    parts += [_compared(task, attached.model, *each) for each in held]
                held, size = [], 0
        scores = Scores.join(parts)
        for name, values in scores.columns.items():
            if not np.isfinite(values).all():
                raise DivergedError(f"task {task.name}: the model's {name} is not finite on unrelated texts")
        return scores


@torch.inference_mode()
def _compared(task: Task, model: nn.Module, batch: dict[str, Tensor], base: Tensor) -> Scores:
    """Of a batch, with the base's logits [texts, predictions, choices]."""
    found: dict[str, list[float]] = {}
    labels = batch.get("labels")
    for i, (before, after) in enumerate(zip(base, task.text_logits(model, batch), strict=True)):
        if labels is not None:
            counted = labels[i, 1:] >= 0
            before, after = before[counted], after[counted]
        old, new = before.double().log_softmax(-1), after.double().log_softmax(-1)
        # KL(p ‖ q) = Σ p (log p − log q), 0 where p is
        divergence = torch.where(old > -torch.inf, old.exp() * (old - new), 0.0).sum(-1)
        if labels is None:
            found.setdefault("kl", []).append(float(divergence.sum()))
            continue
        right = labels[i, 1:][counted][:, None]
        values = {"kl": divergence, "loss": -new.gather(-1, right), "base_loss": -old.gather(-1, right)}
        for name, value in values.items():
            found.setdefault(name, []).append(float(value.mean()))
        found.setdefault("tokens", []).append(len(right))
    columns: dict[str, npt.NDArray[np.float64]] = {name: np.array(values) for name, values in found.items()}
    return Scores(columns)


def metrics_of(scores: Scores) -> dict[str, Metric]:
    """What scores of `OnTexts` tell, by name."""
    return OF_TOKENS if "tokens" in scores.columns else OF_LABELS
