"""How good are adapters? Each on its own task, beside its base alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.questions import Evaluate as Evaluate
from lora_lab.results.result import Result, columns, fingerprint, provenance
from lora_lab.results.stats import Sampled, proportion
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.task import Scores, Task


def answer(question: Evaluate, adapters: Sequence[Adapter], task: Task | Sequence[Task], on: Execution) -> Result:
    """Every adapter on its task, and every base model alone."""
    began, split, seed = time.perf_counter(), question.split, question.seed
    tasks = [task] * len(adapters) if isinstance(task, Task) else task
    shared = {fingerprint(each.record): each for each in reversed(tasks)}  # equal tasks load their data once
    runs: list[tuple[Adapter | None, Task]] = [(None, each) for each in shared.values() if question.base]
    runs += [(adapter, shared[fingerprint(each.record)]) for adapter, each in zip(adapters, tasks, strict=True)]
    measures = list(dict.fromkeys(name for each in shared.values() for name in each.measures))
    rows = []
    for done, (adapter, own) in enumerate(runs, 1):
        scores = score(own, adapter, split, device=on.device, keep_logits=bool(own.measures))
        rows.append({**_described(adapter, own), "examples": len(scores), **_estimates(scores, seed)})
        if any(not each.classifies for each in tasks):
            rows[-1] |= _perplexity(scores, None if own.classifies else own.target_counts(split), seed)
        rows[-1] |= _shares(measures, own.measured(scores, split))
        on.report(done, len(runs))
    return Result(
        question.kind,
        columns(rows),
        {**question.record, "tasks": [each.record for each in shared.values()]},
        {},
        provenance(
            inputs=[Path(adapter.source) for adapter in adapters],
            elapsed_s=time.perf_counter() - began,
            examples=len(scores),
        ),
    )


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
