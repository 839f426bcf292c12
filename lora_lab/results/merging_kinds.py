"""What results of comparing merges hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.rows import ADAPTERS, Accuracy
from lora_lab.results.schema import Kind, Paper, column


@dataclass
class Merged:
    """Which merge a row is about."""

    set: str = column("the adapters that are merged together, in words")
    method: str | None = column("training method of the set")
    seed: int | str | None = column("seed of the set; null of seeds merged with each other")
    ratio: str | None = column("weights of the seeds of one task; null for several tasks")
    merge: str = column("name of the merge, alone, or ensemble of logits")


@dataclass
class Normalised:
    """A share of the adapter's own accuracy, with its interval."""

    normalised: float = column("accuracy / accuracy of the adapter alone", "share", heading="norm.")
    normalised_low: float = column("low end of its interval", "share")
    normalised_high: float = column("high end of its interval", "share")


@dataclass
class AtCoefficient:
    """Where on its line of coefficients a merge stands."""

    coefficient: float = column("factor of the merged ΔW; null of what has none", form=".2g", heading="coef.")
    chosen: bool = column("whether it was chosen on the validation splits")


@dataclass
class MergeRow(AtCoefficient, Normalised, Accuracy, Merged):
    """One merge at one coefficient, on one adapter's task."""

    task: str = column("name of the task")
    adapter: str = column("label of the adapter whose task it is")
    loss: float = column("mean loss over the examples", "nats")


@dataclass
class MergeSetRow(AtCoefficient, Normalised, Accuracy, Merged):
    """One merge at one coefficient, a mean over the tasks of its set."""

    loss: float = column("mean loss over the tasks", "nats")
    at_edge: bool | None = column("whether the coefficient is the smallest or largest of those tried")


@dataclass
class MergeMethod:
    """One merge at its chosen coefficients, over the sets of one training method."""

    method: str | None = column("training method of the sets")
    ratio: str | None = column("weights of the seeds of one task; null for several tasks")
    merge: str = column("name of the merge")
    sets: int = column("sets", counts=True)
    at_edge: int = column("sets in which the coefficient is at the edge of those tried")
    coefficient: float = column("mean chosen coefficient", form=".2g", heading="coef.")
    accuracy: float = column("mean accuracy at the chosen coefficient", "share")
    accuracy_spread: float = column("spread over the sets", "share")
    plain_accuracy: float = column("mean accuracy at coefficient 1", "share")
    plain_accuracy_spread: float = column("spread over the sets", "share")
    normalised: float = column("mean accuracy / accuracy alone, at the chosen coefficient", "share", heading="norm.")
    normalised_spread: float = column("spread over the sets", "share")
    plain_normalised: float = column("the same at coefficient 1", "share")
    plain_normalised_spread: float = column("spread over the sets", "share")
    loss: float = column("mean loss at the chosen coefficient", "nats")
    loss_spread: float = column("spread over the sets", "nats")
    plain_loss: float = column("mean loss at coefficient 1", "nats")
    plain_loss_spread: float = column("spread over the sets", "nats")


@dataclass
class MergeCurve(Merged):
    """One merge over the coefficients, on the validation splits."""

    coefficient: list[Any] = column("factors of the merged ΔW")
    accuracy: list[Any] = column("mean accuracy at each", "share")
    normalised: list[Any] = column("mean accuracy / accuracy alone at each", "share")
    loss: list[Any] = column("mean loss at each", "nats")


@dataclass
class Skipped:
    """A merge that these adapters cannot be merged by."""

    set: str = column("the adapters")
    merge: str = column("name of the merge")
    why: str = column("what it says")


@dataclass
class SharedStart:
    """Whether the adapters of a set began from one A."""

    set: str = column("the adapters")
    method: str | None = column("their training method")
    cosine: float = column("mean cosine between rows of A in one place")
    z: float = column("the same in standard deviations of independent rows", form=".1f")
    shared: bool | None = column("whether they share their initial A; null where that cannot be told")


KINDS = (
    Kind(
        "compare-merges",
        "what merges keep of every adapter, on its own task",
        {
            "rows": MergeRow,
            "sets": MergeSetRow,
            "by_method": MergeMethod,
            "curves": MergeCurve,
            "skipped": Skipped,
            "shared_initial_A": SharedStart,
        },
        Paper(("accuracy", "normalised", "coefficient"), "by_method", ("merge", "ratio"), "method"),
        optional=("shared_initial_A",),
        parameters={
            "task_names": "name of the task of each adapter, each once",
            "one_task": "whether the adapters are seeds of one task",
            "merges": "the merges compared",
            "stands_for": "merge → others that are the same sum at another coefficient",
            **ADAPTERS,
        },
    ),
)
