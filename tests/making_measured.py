"""Metrics of made-up scores, of models that are known by numbers."""

import dataclasses
from types import SimpleNamespace

from lora_lab.analysis.measured import Measured
from lora_lab.tasks.scores.metrics import METRICS
from lora_lab.tasks.task import Scores, Split


@dataclasses.dataclass(frozen=True)
class Place:
    key: str


def places(count):
    return [Place(str(i)) for i in range(count)]


def task(*metrics, **more):
    """A task of these metrics, those of METRICS or others by name."""
    known = {**METRICS, **more}
    return SimpleNamespace(
        name="made", metrics=metrics, needs_logits=False, metric=known.get, columns=lambda scores, split: scores.columns
    )


def measured(columns, *metrics, **more):
    """Metrics of columns, each [models, examples]."""
    count = len(next(iter(columns.values())))
    scores = {place.key: Scores({n: each[i] for n, each in columns.items()}) for i, place in enumerate(places(count))}
    return Measured.of_scores(task(*metrics, **more), scores, Split({}), metrics, seed=3)
