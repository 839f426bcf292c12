"""How good models are by one metric of their task, example by example, and beside the adapters alone.

What becomes of an adapter is told as a share of its own score where the metric has a natural zero (shares, of which
more is better), and else as how much worse it is, in units of the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.errors import TaskError, unknown
from lora_lab.results.stats import Floats
from lora_lab.tasks.task import Scores, Split, Task


class Judge:
    """The main metric of a task, or the first of those asked for that it has; OptionError where it has none of them.

    `scored` are scores of the examples, after which tasks of the user's own know their metrics.
    """

    def __init__(self, task: Task, examples: Split, asked: Sequence[str], scored: Scores) -> None:
        self._task, self._examples = task, examples
        columns = self._columns(scored)
        there = [name for name in asked if name in task.metrics]
        if asked and not there:
            raise unknown(f"metric of task {task.name}:", asked[0], list(task.metrics))
        self.name: str = there[0] if asked else task.metrics[0]
        self.metric = task.metric(self.name)
        self.shares = self.metric.higher and self.metric.unit == "share"
        """Whether shares of the adapter's own mean something."""
        absent = [name for name in self.metric.needs if name not in columns]
        if absent and task.needs_logits:
            raise TaskError(f"task {task.name}: {self.name} is made of logits, which merges do not keep")

    def outcomes(self, scores: Sequence[Scores]) -> npt.NDArray[Any]:
        """Numbers of the examples whose mean is the metric (see `Metric.influence`); of several models their mean."""
        found = [self._of_one(each) for each in scores]
        return found[0] if len(found) == 1 else np.asarray(np.mean(found, axis=0, dtype=np.float64))

    def value(self, scores: Sequence[Scores]) -> float:
        """The metric, of several models its mean."""
        return float(self.outcomes(scores).mean())

    def better(self, values: Any, own: Any) -> Any:
        """How much better values are than the adapter's own."""
        return values - own if self.metric.higher else own - values

    def _of_one(self, scores: Scores) -> npt.NDArray[Any]:
        columns = self._columns(scores)
        return self.metric.parts(columns)[0] if self.metric.is_mean else self.metric.influence(columns)

    def _columns(self, scores: Scores) -> Any:
        return self._task.columns(scores, self._examples)


def one_metric(judges: Sequence[Judge]) -> bool:
    """Whether all tasks are judged by the same metric, so that means over them mean something."""
    return len({judge.name for judge in judges}) == 1


def all_shares(judges: Sequence[Judge]) -> bool:
    """Whether every task's score is told as a share of the adapter's own."""
    return all(judge.shares for judge in judges)


def kept(judges: Sequence[Judge], values: Floats, own: Floats) -> Floats:
    """[..., tasks] → [...]: what models keep of the adapters alone, more being better.

    The mean share of the adapters' own scores where all have one (of the scores, where one is 0); else how much better
    they are in units of the metric, of several metrics in shares of |own|.
    """
    if all_shares(judges):
        shares = share(values, own)
        return np.asarray((shares if np.isfinite(shares).all() else values).mean(-1))
    better = np.stack([judge.better(values[..., i], own[i]) for i, judge in enumerate(judges)], axis=-1)
    return np.asarray(better.mean(-1) if one_metric(judges) else (better / np.abs(own)).mean(-1))


def share(values: Floats, own: Floats) -> Floats:
    """Scores as a share of the adapter's own; NaN where that is 0."""
    shares: Floats = np.divide(values, own, out=np.full(np.broadcast(values, own).shape, np.nan), where=own > 0)
    return shares
