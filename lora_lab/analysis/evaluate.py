"""How good are adapters? Each on its own task, beside its base alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.questions import Evaluate as Evaluate
from lora_lab.results.result import Result, columns, fingerprint, provenance
from lora_lab.results.stats import Sampled, proportion
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.task import Scores, Task


@dataclass(frozen=True)
class AsItIs(Change):
    """An adapter on its task, or the base of that task alone."""

    index: int
    base: bool

    def apply(self, models: TaskModels, examples: Examples) -> Scores:
        """The scores, with logits where the task has measures of its own."""
        task, adapter = models.tasks[self.index], None if self.base else models.adapters[self.index]
        return score(task, adapter, examples.split, device=models.device, keep_logits=bool(task.measures))


def answer(question: Evaluate, adapters: Sequence[Adapter], task: Task | Sequence[Task], on: Execution) -> Result:
    """Every adapter on its task, and every base model alone."""
    began, split, seed = time.perf_counter(), question.split, question.seed
    tasks = [task] * len(adapters) if isinstance(task, Task) else task
    shared = {fingerprint(task.record): task for task in reversed(tasks)}  # equal tasks load their data once
    of_adapters = [shared[fingerprint(task.record)] for task in tasks]
    changes = [AsItIs(of_adapters.index(task), base=True) for task in shared.values() if question.base]
    changes += [AsItIs(index, base=False) for index in range(len(adapters))]
    measures = list(dict.fromkeys(name for task in shared.values() for name in task.measures))
    evaluator = Evaluator(adapters, of_adapters, on, split=split)
    evaluator.total = len(changes)
    if on.workers:
        evaluator.prepare([(functools.partial(_ask, change), [(split, change)]) for change in changes])
    rows = []
    for change, scores in zip(changes, evaluator.scores(changes), strict=True):
        adapter, judge = None if change.base else adapters[change.index], of_adapters[change.index]
        rows.append({**_described(adapter, judge), "examples": len(scores), **_estimates(scores, seed)})
        if any(not task.classifies for task in tasks):
            rows[-1] |= _perplexity(scores, None if judge.classifies else judge.target_counts(split), seed)
        rows[-1] |= _shares(measures, judge.measured(scores, split))
    return Result(
        question.kind,
        columns(rows),
        {**question.record, "tasks": [task.record for task in shared.values()]},
        {},
        provenance(
            inputs=[Path(adapter.source) for adapter in adapters],
            elapsed_s=time.perf_counter() - began,
            examples=len(scores),
        ),
    )


def _ask(change: Change, evaluator: Evaluator) -> None:
    evaluator.scores([change])


def _described(adapter: Adapter | None, task: Task) -> dict[str, Any]:
    record = adapter.record if adapter else {}
    label = adapter.label if adapter else "(base model alone)"
    return {"adapter": label, "task": task.name, "method": record.get("method"), "seed": record.get("seed")}


def _estimates(scores: Scores, seed: int) -> dict[str, float]:
    """Mean loss with a bootstrap interval, and accuracy with Wilson's (see `proportion`)."""
    loss = Sampled.of(scores.loss[None], seed=seed).estimate(lambda means: means[0])
    cells = dict(zip(("loss", "loss_low", "loss_high"), loss, strict=True))
    return cells | dict(zip(("accuracy", "accuracy_low", "accuracy_high"), proportion(scores.correct), strict=True))


def _shares(measures: Sequence[str], right: Mapping[str, npt.NDArray[np.bool_]]) -> dict[str, float | None]:
    """Share of examples that are right by each measure, with Wilson's interval; None where there is no such measure."""
    cells: dict[str, float | None] = {}
    for name in measures:
        share: tuple[float | None, ...] = (None, None, None)
        if name in right:
            share = proportion(right[name])
        cells |= dict(zip((name, f"{name}_low", f"{name}_high"), share, strict=True))
    return cells


def _perplexity(scores: Scores, counts: npt.NDArray[np.int64] | None, seed: int) -> dict[str, float | None]:
    """exp of the mean loss over all tokens, so that a long text counts for more than a short one; None without."""
    if counts is None:
        return dict.fromkeys(("perplexity", "perplexity_low", "perplexity_high"))
    sampled = Sampled.of(np.stack([scores.loss * counts, counts.astype(np.float64)]), seed=seed)
    value, low, high = sampled[[0, 1]].estimate(lambda means: np.exp(means[0] / means[1]))
    return {"perplexity": value, "perplexity_low": low, "perplexity_high": high}
