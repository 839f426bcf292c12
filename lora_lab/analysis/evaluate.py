"""How good are adapters? Each on its own task, beside its base alone."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.behaviour import OnTexts, Texts, metrics_of, not_defined
from lora_lab.analysis.measured import cells, told
from lora_lab.analysis.questions import Evaluate as Evaluate
from lora_lab.errors import unknown
from lora_lab.results.result import Result, columns, fingerprint, provenance
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.scores.metrics import Metric
from lora_lab.tasks.task import Scores, Split, Task


@dataclass(frozen=True)
class AsItIs(Change):
    """An adapter on its task, or the base of that task alone."""

    index: int
    base: bool

    def apply(self, models: TaskModels, examples: Examples) -> Scores:
        """The scores, with logits where metrics of the task are made of them."""
        task = models.tasks[self.index]
        model, drawn = task.model_on(models.device), replace(examples, logits=task.needs_logits)
        with contextlib.nullcontext() if self.base else attach(model, models.adapters[self.index]) as attached:
            scores = models.score(attached.model if attached else model, drawn, self.index)
        task.require_finite(scores)
        return scores


def answer(question: Evaluate, adapters: Sequence[Adapter], task: Task | Sequence[Task], on: Execution) -> Result:
    """Every adapter on its task, and every base model alone."""
    began, split = time.perf_counter(), question.split
    texts = None if question.behaviour is None else Texts.read(Path(question.behaviour))
    tasks = [task] * len(adapters) if isinstance(task, Task) else task
    shared = {fingerprint(task.spec): task for task in reversed(tasks)}  # equal tasks load their data once
    of_adapters = [shared[fingerprint(task.spec)] for task in tasks]
    evaluator = Evaluator(adapters, of_adapters, on, split=split, examples=question.examples)
    sizes = [(task, len(evaluator.drawn(split).of_task(task))) for task in shared.values()] if texts else []
    lacking = [line for each in sizes for line in not_defined(*each)]
    changes: list[AsItIs | OnTexts] = [
        OnTexts(index, texts) for index, task in enumerate(of_adapters) if texts and not task.why_no_texts
    ]
    changes += [AsItIs(of_adapters.index(task), base=True) for task in shared.values() if question.base]
    changes += [AsItIs(index, base=False) for index in range(len(adapters))]
    evaluator.total = len(changes)
    if on.workers:
        evaluator.prepare([(functools.partial(_ask, change), [(split, change)]) for change in changes])
    rows, metrics, behind = [], _Metrics(question, list(shared.values())), []
    found = dict(zip(changes, evaluator.scores(changes), strict=True))
    for change, scores in found.items():
        if isinstance(change, OnTexts):
            continue
        on_texts = OnTexts(change.index, texts) if texts and not change.base else None
        adapter, judge = None if change.base else adapters[change.index], of_adapters[change.index]
        if on.by_example:
            behind.append(metrics.behind(scores, judge, evaluator.drawn(split).of_task(judge)))
        rows.append(
            {
                **_described(adapter, judge),
                "examples": len(scores),
                **metrics.of(scores, judge, evaluator.drawn(split).of_task(judge)),
                **(metrics.beside(found[on_texts], judge) if on_texts in found else {}),
            }
        )
    metrics.require(of_adapters)
    if on.by_example:
        on.by_example("rows", behind)
    return Result(
        question.kind,
        columns([{**row, **{cell: row.get(cell) for cell in metrics.cells}} for row in rows]),
        {
            **question.record,
            "tasks": [task.record for task in shared.values()],
            "metrics": metrics.told,
            **({"texts": texts.record, "not_defined": lacking} if texts else {}),
        },
        {},
        provenance(
            inputs=[Path(adapter.source) for adapter in adapters],
            elapsed_s=time.perf_counter() - began,
            examples=rows[-1]["examples"],
        ),
    )


def _ask(change: Change, evaluator: Evaluator) -> None:
    evaluator.scores([change])


def _described(adapter: Adapter | None, task: Task) -> dict[str, Any]:
    record = adapter.record if adapter else {}
    label = adapter.label if adapter else "(base model alone)"
    return {"adapter": label, "task": task.name, "method": record.get("method"), "seed": record.get("seed")}


class _Metrics:
    """The metrics that are asked for, or else all that the tasks have, and what they say."""

    def __init__(self, question: Evaluate, tasks: Sequence[Task]) -> None:
        self._question = question
        self.told: dict[str, dict[str, Any]] = {}
        """Metric → what it is, its unit, and whether more is better."""
        if all(task.metrics for task in tasks):  # one of the user's own may know its columns only after a scoring
            self.require(tasks)

    def require(self, tasks: Sequence[Task]) -> None:
        """OptionError for a metric that is asked for and that no task has."""
        there = dict.fromkeys(name for task in tasks for name in task.metrics)
        for name in self._question.metric:
            if name not in there:
                raise unknown(f"metric of task {tasks[0].name}:", name, list(there))

    @property
    def cells(self) -> list[str]:
        """The columns of all of them."""
        return [cell for name in self.told for cell in cells(name, (0, 0, 0))]

    def of(self, scores: Scores, task: Task, examples: Split) -> dict[str, float]:
        """Each metric with the ends of its interval, and what it is of models without what it measures."""
        given, seed = task.columns(scores, examples), self._question.seed
        found: dict[str, float] = {}
        for name, metric in self._wanted(task, len(scores)).items():
            self.told |= told({name: metric})
            found |= cells(name, metric.estimate(given, seed=seed))
            if metric.null:
                about = f"mean and middle 95 % of {name} of models as confident that are calibrated"
                self.told |= told({f"{name}_null": replace(metric, about=about)})
                found |= cells(f"{name}_null", metric.without(given, seed=seed))
        return found

    def behind(self, scores: Scores, task: Task, examples: Split) -> Floats:
        """Numbers of the examples behind the first of the metrics."""
        first = next(iter(self._wanted(task, len(scores)).values()))
        return first.influence(task.columns(scores, examples))

    def beside(self, scores: Scores, task: Task) -> dict[str, float]:
        """What texts beside the task tell of an adapter."""
        metrics = metrics_of(task)
        found: dict[str, float] = {}
        for name, metric in metrics.items():
            found |= cells(name, metric.estimate(scores.columns, seed=self._question.seed))
        self.told |= told(metrics)
        return found

    def _wanted(self, task: Task, examples: int) -> dict[str, Metric]:
        """Those asked for; else the usual ones, with behaviour also those of calibration that have a value."""
        asked = self._question.metric
        if not asked and self._question.behaviour is None:
            return task.usual
        metrics = {name: task.metric(name) for name in task.metrics if not asked or name in asked}
        return {n: each for n, each in metrics.items() if asked or not each.on_request or examples >= each.least}
