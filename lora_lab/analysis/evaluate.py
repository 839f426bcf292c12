"""How good are adapters? Each on its own task, beside its base alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.results.result import Result, columns, fingerprint, provenance
from lora_lab.results.stats import Sampled, proportion
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.choosing import task_of
from lora_lab.tasks.task import Scores, Task


def evaluate(
    adapters: Sequence[Adapter],
    *,
    given: str | None = None,
    trust_record: bool = False,
    split: str = "test",
    base: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Every adapter on its own task (or the one given), and every base model alone, with 95 % intervals.

    What an adapter's record may name without `trust_record` says trust.py.
    """
    began = time.perf_counter()
    found = [task_of(adapter, given=given, trust_record=trust_record) for adapter in adapters]
    shared = {fingerprint(task.record): task for task in reversed(found)}  # equal tasks load their data once
    runs: list[tuple[Adapter | None, Task]] = [*((None, task) for task in shared.values() if base)]
    runs += [(adapter, shared[fingerprint(task.record)]) for adapter, task in zip(adapters, found, strict=True)]
    measures = list(dict.fromkeys(name for task in shared.values() for name in task.measures))
    rows = []
    for i, (adapter, task) in enumerate(runs):
        scores = score(task, adapter, split, device=device, keep_logits=bool(task.measures))
        rows.append({**_described(adapter, task), "examples": len(scores), **_estimates(scores, seed)})
        if any(not each.classifies for each in found):
            rows[-1] |= _perplexity(scores, None if task.classifies else task.target_counts(split), seed)
        rows[-1] |= _shares(measures, task.measured(scores, split))
        if progress:
            progress(i + 1, len(runs))
    return Result(
        "evaluate",
        columns(rows),
        {"split": split, "tasks": [task.record for task in shared.values()], "seed": seed},
        {},
        provenance(
            inputs=[Path(a.source) for a in adapters], elapsed_s=time.perf_counter() - began, examples=len(scores)
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
        found: tuple[float | None, ...] = (None, None, None)
        if name in right:
            found = proportion(right[name])
        cells |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    return cells


def _perplexity(scores: Scores, counts: npt.NDArray[np.int64] | None, seed: int) -> dict[str, float | None]:
    """exp of the mean loss over all tokens, so that a long text counts for more than a short one; None without."""
    if counts is None:
        return dict.fromkeys(("perplexity", "perplexity_low", "perplexity_high"))
    sampled = Sampled.of(np.stack([scores.loss * counts, counts.astype(np.float64)]), seed=seed)
    value, low, high = sampled[[0, 1]].estimate(lambda means: np.exp(means[0] / means[1]))
    return {"perplexity": value, "perplexity_low": low, "perplexity_high": high}
