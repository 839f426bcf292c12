"""How sharp the loss is around an adapter, the learning rates that this allows, and those that were tried.

Sharpness is the largest eigenvalue of the Hessian in the adapter's tensors. It hangs on the gauge: the same ΔW with
(cB, A/c) has other ones. So it is told in the tensors as they were trained, which is what a learning rate sees; in
balanced factors (B = U√S, A = √S V, the scale among them), in which adapters can be compared; and where training began,
for adapters whose record lets that be drawn again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described
from lora_lab.analysis.curvature import CurvaturePass, largest_rates
from lora_lab.analysis.lines.landscape import Sharpness
from lora_lab.analysis.measured import require, told
from lora_lab.errors import LoraLabError
from lora_lab.results.result import Result, columns, finite
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.scoring.journal import Journal
from lora_lab.tasks.task import Task
from lora_lab.training.fit import initial
from lora_lab.training.recipe import Recipe

TRAINED, BALANCED, INITIAL = "trained", "balanced", "initial"

_OF = "loss"
"""What the curvature is of, and so the metric by which rates are told first."""

PRODUCT = 6.0
"""What a Hessian product takes, in forward passes: two backward passes, the second through the first as well."""


def answer(question: Sharpness, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """A row for every adapter and every set of tensors that it can be measured in."""
    began = time.perf_counter()
    require(task, question.metric)
    run = dataclasses.replace(question, metric=()).run_id(adapters, task)  # curvature is the same whatever is told
    journal = Journal(on.cache / f"{run}.sqlite", run) if on.cache else None
    places = {i: dict(_places(adapter, task)) for i, adapter in enumerate(adapters)}
    _tell_cost(question, adapters, task, on, sum(map(len, places.values())))
    rows: list[dict[str, Any]] = []
    done, total = 0, sum(map(len, places.values()))
    evaluator: Evaluator | None = None
    for i, adapter in enumerate(adapters):
        for at, there in places[i].items():
            key = f"{i} {at}"
            found = journal[key] if journal is not None and key in journal else None
            if found is None:
                evaluator = Evaluator([there], task, on, split=question.split, examples=question.examples)
                asked = CurvaturePass(there, question.iterations, question.probes, _batch(adapter, task), question.seed)
                (found,) = evaluator.gather([asked])
                if journal is not None:
                    journal.add(key, finite(found))
            done += 1
            on.report(done, total)
            rows.append({**_who(adapter), "at": at, **found, **_rates(found)})
    metrics = list(question.metric) or sorted(task.usual, key=lambda name: name != _OF)
    evaluator = evaluator or Evaluator(adapters, task, on, split=question.split, examples=question.examples)
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "metrics": told({name: task.metric(name) for name in metrics}),
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"rates": [row for adapter in adapters for row in tried(adapter, metrics)]}),
        evaluator.provenance(adapters, began=began, run=run),
    )


def tried(adapter: Adapter, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The learning rates that were tried for an adapter, by its record: of a tuning all of them, else its own.

    With the metrics that each had on the validation split; None where that is not known.
    """
    rows = adapter.record.get("tuning")
    recipe = adapter.record.get("recipe")
    own = _number(recipe.get("learning_rate")) if isinstance(recipe, Mapping) else None
    found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list | tuple) else []
    if any(_number(row.get("learning_rate")) for row in found):
        for row in found:
            rate = _number(row.get("learning_rate"))
            if rate:
                measures = {name: _number(row.get(name)) for name in metrics}
                yield {**_who(adapter), "rate": rate, **measures, "chosen": bool(row.get("chosen"))}
    elif own:
        told_of = adapter.record.get("metrics")
        scores = told_of.get("validation") if isinstance(told_of, Mapping) else None
        measures = {n: _number(scores.get(n)) if isinstance(scores, Mapping) else None for n in metrics}
        yield {**_who(adapter), "rate": own, **measures, "chosen": True}


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def _who(adapter: Adapter) -> dict[str, Any]:
    return {"adapter": adapter.label, "method": adapter.record.get("method"), "seed": adapter.record.get("seed")}


def _rates(found: Mapping[str, float]) -> dict[str, float]:
    return largest_rates(found["sharpness"], found["adam_sharpness"])


def _places(adapter: Adapter, task: Task) -> Iterator[tuple[str, Adapter]]:
    """Names of the tensors in which an adapter is measured, and the adapter that has them."""
    yield TRAINED, adapter
    if adapter.why_not_additive is None:
        balanced = {name: update.balanced() for name, update in adapter.updates.items()}
        yield BALANCED, adapter.with_updates(balanced, source=adapter.source)
    begun = _began(adapter, task)
    if begun is not None:
        yield INITIAL, begun


def _began(adapter: Adapter, task: Task) -> Adapter | None:
    """The adapter where its training began, drawn again from its recipe; None where that is not known."""
    record = adapter.record
    recipe, names = record.get("recipe"), {field.name for field in dataclasses.fields(Recipe)}
    if not adapter.origin.own or not isinstance(recipe, Mapping) or record.get("task") != task.record:
        return None
    try:
        made = Recipe(
            **{key: value for key, value in recipe.items() if key in names},
            method=str(record.get("method")),
            seed=record.get("seed"),  # type: ignore[arg-type]
        )
        begun = initial(task, made)
    except LoraLabError:  # of another version of this package
        return None
    same = begun.sites.keys() == adapter.sites.keys() and begun.tuner == adapter.tuner
    return dataclasses.replace(begun, source=adapter.source) if same else None


def _batch(adapter: Adapter, task: Task) -> int:
    """Examples of a batch in the adapter's training, as far as that is known."""
    recipe = adapter.record.get("recipe")
    size = recipe.get("batch_size") if isinstance(recipe, Mapping) else None
    return size if isinstance(size, int) and size > 0 else task.train_batch_size


def _tell_cost(question: Sharpness, adapters: Sequence[Adapter], task: Task, on: Execution, places: int) -> None:
    if on.confirm:
        probe = Evaluator(adapters[:1], task, on, split=question.split, examples=question.examples)
        passes = places * PRODUCT * (2 * question.iterations + question.probes + 1)
        on.confirm(Cost(round(passes), 0, 0, probe.seconds(passes)))
