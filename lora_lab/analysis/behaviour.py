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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import Measured
from lora_lab.errors import DivergedError, FileError, TaskError
from lora_lab.files.disk import size_of
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.scores.metrics import Column, Metric, mean_of
from lora_lab.tasks.task import Scores, Task

LARGEST = 2**26
"""Bytes of a file of texts."""
COLUMN, TARGET = "text", "target"
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
    """Texts that have nothing to do with a task, what is to be written of them if that is said, and a hash of both."""

    digest: str
    texts: tuple[str, ...] = field(repr=False)
    targets: tuple[str, ...] | None = field(default=None, repr=False)

    @classmethod
    def read(cls, path: Path) -> Texts:
        """Of a .txt with a text a line, or a .jsonl or .csv with a column `text`, and maybe one `target`.

        FileError for any other.
        """
        readers = {".txt": _lines, ".jsonl": _of_json, ".csv": _of_csv}
        if path.suffix not in readers:
            raise FileError(f"{path}: {', '.join(readers)} can be read as texts")
        size = size_of(path)
        if size > LARGEST:
            raise FileError(f"{path}: {size} bytes of texts; at most {LARGEST} are read")
        try:
            rows = [row for row in readers[path.suffix](path) if row[0].strip()]
        except UnicodeDecodeError as error:
            raise FileError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
        if len(rows) < 2:
            raise FileError(f"{path}: {len(rows)} texts; an interval needs 2 or more")
        texts, targets = (tuple(each) for each in zip(*rows, strict=True))
        there = [target for target in targets if target is not None]
        if there and len(there) < len(rows):
            raise FileError(f"{path}: {len(there)} of {len(rows)} texts have a {TARGET!r}; all or none are needed")
        held = [texts, there] if there else texts
        digest = hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]
        return cls(digest, texts, tuple(there) if there else None)

    @property
    def record(self) -> dict[str, Any]:
        """What results tell of them."""
        return {"count": len(self.texts), "digest": self.digest}

    def batches(self, task: Task, device: torch.device) -> list[dict[str, Tensor]]:
        """As the task's model takes them, shortest first."""
        split = task.encode_texts(self.texts, self.targets)
        return [{n: t.to(device) for n, t in batch.items()} for batch in split.batches(task.batch_size)]


_Row = tuple[str, str | None]


def _lines(path: Path) -> Iterator[_Row]:
    for line in path.read_text("utf-8").split("\n"):
        yield line, None


def _of_json(path: Path) -> Iterator[_Row]:
    for number, (line, _) in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FileError(f"{path}: line {number} is no JSON") from error
            yield _cells(row, f"{path}: line {number}")


def _of_csv(path: Path) -> Iterator[_Row]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        try:
            for row in rows:
                yield _cells(row, f"{path}: line {rows.line_num}")
        except csv.Error as error:
            raise FileError(f"{path}: line {rows.line_num} is no CSV ({error})") from error


def _cells(row: object, where: str) -> _Row:
    found = row if isinstance(row, dict) else {}
    text, target = found.get(COLUMN), found.get(TARGET)
    if not isinstance(text, str):
        raise FileError(f"{where} has no text in a column {COLUMN!r}")
    return text, target if isinstance(target, str) and target.strip() else None


def calibration(task: Task, examples: int) -> list[str]:
    """Names of the task's metrics of calibration that have a value on so many examples."""
    metrics = {name: task.metric(name) for name in task.metrics}
    return [name for name, metric in metrics.items() if metric.on_request and examples >= metric.least]


def not_defined(task: Task, examples: int) -> list[str]:
    """What of behaviour has no meaning on the task, a line each; TaskError where nothing of it has one."""
    of_chances = [task.metric(name) for name in task.metrics if task.metric(name).on_request]
    short = [metric for metric in of_chances if examples < metric.least]
    if task.why_no_texts and not of_chances:
        raise TaskError(f"task {task.name}: {task.why_no_texts}; its behaviour cannot be measured")
    lacking = []
    if task.why_no_texts:
        lacking.append(f"forgetting and divergence ({task.why_no_texts})")
    elif not task.writes:
        lacking.append("forgetting (its model writes no texts)")
    if short:
        lacking.append(f"calibration error ({examples} examples, and {short[0].least} are needed)")
    elif not of_chances:
        lacking.append("calibration (its answers are not one of some labels)")
    return [f"task {task.name}: not defined of it: {each}" for each in lacking]


@dataclass(frozen=True)
class OnTexts(Change):
    """An adapter and the base of its task on texts: `kl`, and of models that write `loss`, `base_loss` and `tokens`."""

    index: int
    texts: Texts

    def apply(self, models: TaskModels, examples: Examples) -> Scores:
        """One value a text, shortest first."""
        task, adapter = models.tasks[self.index], models.adapters[self.index]
        model = task.model_on(models.device).eval()
        parts, held, size = [], [], 0
        batches = self.texts.batches(task, next(model.parameters()).device)
        for place, batch in enumerate(batches, 1):
            with torch.inference_mode():
                held.append((batch, task.text_logits(model, batch)))
            size += held[-1][1].nbytes
            if size > _HELD or place == len(batches):
                # the base is the model without PEFT's layers, since some adapters change the weights below them
                with attach(model, adapter) as attached:
                    parts += [_compared(task, attached.model, *each) for each in held]
                held, size = [], 0
        return _joined(task, parts)


@dataclass(frozen=True)
class PointOnTexts(Change):
    """The same of a mix of adapters of one task, beside a base of its own."""

    point: MixPoint
    texts: Texts

    @property
    def key(self) -> str:
        """Equal for points that are one model."""
        return f"{self.point.key} on {self.texts!r}"

    def apply(self, models: LineModels, examples: Examples) -> Scores:
        """One value a text, shortest first."""
        task, base, parts = models.tasks[0], models.base, []
        with models.wearing(models.paths.mix(self.point.weights, self.point.space)) as model:
            model.eval()
            for batch in self.texts.batches(task, next(base.parameters()).device):
                with torch.inference_mode():
                    before = task.text_logits(base, batch)
                parts.append(_compared(task, model, batch, before))
        return _joined(task, parts)


def along(evaluator: Evaluator, points: Sequence[MixPoint], texts: Texts, seed: int) -> Measured:
    """What texts tell of points between adapters, each known by its own key."""
    asked = {point.key: PointOnTexts(point, texts) for point in points}
    evaluator.total = len(evaluator.known) + len(asked)
    scores = evaluator.scores(list(asked.values()))
    columns = {key: each.columns for key, each in zip(asked, scores, strict=True)}
    return Measured(metrics_of(evaluator.task), columns, seed)


def _joined(task: Task, parts: Sequence[Scores]) -> Scores:
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


def metrics_of(task: Task) -> dict[str, Metric]:
    """What texts beside a task tell of its models, by name."""
    return OF_TOKENS if task.writes else OF_LABELS
