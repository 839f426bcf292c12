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
    merge: str = column(
        "name of the merge; or base (no adapter), alone (each task's own adapter: oracle routing), ensemble of logits"
    )


@dataclass
class Sized:
    """What a merge takes, and what its cut to a rank lost."""

    category: str = column("equal rank (cut to the rank that was asked for), exact (no cut), or reference (no merge)")
    rank: int | None = column("largest rank of a module; null of what is no merge")
    bytes: int = column("size of all factors in the file, in the adapters' dtype, without header and heads", "bytes")
    cut_error: float = column(
        "relative Frobenius error of ΔW by the cut; null of what is no merge", form=".2g", heading="cut error"
    )


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
class MergeRow(AtCoefficient, Normalised, Accuracy, Sized, Merged):
    """One merge at one coefficient, on one adapter's task."""

    task: str = column("name of the task")
    adapter: str = column("label of the adapter whose task it is")
    loss: float = column("mean loss over the examples", "nats")


@dataclass
class MergeSetRow(AtCoefficient, Normalised, Accuracy, Sized, Merged):
    """One merge at one coefficient, a mean over the tasks of its set."""

    loss: float = column("mean loss over the tasks", "nats")
    at_edge: bool | None = column("whether the coefficient is the smallest or largest of those tried")


@dataclass
class MergeMethod(Sized):
    """One merge at its chosen coefficients, over the sets of one training method; rank and bytes are the largest."""

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
    difference: float = column("mean accuracy less that of the first merge; null of that one and of what is no merge")
    difference_low: float = column("low end of its interval, over examples and (of several) sets", "share")
    difference_high: float = column("high end of its interval", "share")
    p: float = column("p-value of a difference of 0, paired", form=".2g")
    p_holm: float = column("the same, corrected by Holm for all merges of the training method", form=".2g")
    verdict: str | None = column("ahead or behind (p_holm below 0.05), or cannot be told")
    p_nulls: float = column("largest p-value against the nulls; null without 20 draws", form=".2g", heading="p (nulls)")


@dataclass
class MergedNull:
    """A merge of nulls, over the sets of one training method, beside that of the adapters."""

    method: str | None = column("training method of the sets")
    ratio: str | None = column("weights of the seeds of one task; null for several tasks")
    merge: str = column("name of the merge")
    null: str = column("name of the null")
    replaced: str = column("what nulls stand for: others (all but the adapter whose task is scored), or all")
    sets: int = column("sets", counts=True)
    draws: int = column("draws of the null")
    normalised: float = column("mean accuracy / accuracy alone over draws and sets", "share", heading="norm.")
    normalised_low: float = column("2.5 % of the draws are lower", "share")
    normalised_high: float = column("2.5 % of the draws are higher", "share")
    of_adapters: float = column("the same of the adapters themselves", "share")
    p: float = column("(1 + draws that keep as much) / (1 + draws)", form=".2g")
    p_holm: float = column("the same, corrected by Holm for all merges of the training method", form=".2g")
    p_below: float = column("(1 + draws that keep as little) / (1 + draws)", form=".2g")
    verdict: str | None = column("above the null (p at most 0.05), below it (p_below), or cannot be told")
    why: str | None = column("why there is no p-value")


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
            "nulls": MergedNull,
            "curves": MergeCurve,
            "skipped": Skipped,
            "shared_initial_A": SharedStart,
        },
        Paper(
            ("accuracy", "normalised", "coefficient", "verdict", "p_nulls"),
            "by_method",
            ("merge", "ratio"),
            "method",
            ("bytes", "cut_error"),
        ),
        version=2,
        parameters={
            "task_names": "name of the task of each adapter, each once",
            "one_task": "whether the adapters are seeds of one task",
            "merges": "the merges compared",
            "stands_for": "merge → others that are the same sum at another coefficient",
            "reference": "the merge that the others are compared with",
            **ADAPTERS,
        },
    ),
)
