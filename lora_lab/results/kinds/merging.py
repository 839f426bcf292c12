"""What results of comparing merges hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.rows import ADAPTERS
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
    """What is kept of the adapter's own score: a share of it, or of a metric without a natural zero what is lost."""

    normalised: float = column(
        "score / score of the adapter alone, of a metric that is a share; else null", "share", heading="norm."
    )
    normalised_low: float = column("low end of its interval", "share")
    normalised_high: float = column("high end of its interval", "share")
    lost: float = column("how much worse than the adapter alone, of other metrics; else null", "of the metric")
    lost_low: float = column("low end of its interval", "of the metric")
    lost_high: float = column("high end of its interval", "of the metric")


@dataclass
class AtCoefficient:
    """Where on its line of coefficients a merge stands."""

    coefficient: float = column("factor of the merged ΔW; null of what has none", form=".2g", heading="coef.")
    chosen: bool = column("whether it was chosen on the validation splits")


@dataclass
class MergeRow(AtCoefficient, Normalised, Sized, Merged):
    """One merge at one coefficient, on one adapter's task."""

    task: str = column("name of the task")
    adapter: str = column("label of the adapter whose task it is")
    loss: float = column("mean loss over the examples", "nats")


@dataclass
class MergeSetRow(AtCoefficient, Normalised, Sized, Merged):
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
    normalised: float = column("mean score / score alone, at the chosen coefficient", "share", heading="norm.")
    normalised_spread: float = column("spread over the sets", "share")
    plain_normalised: float = column("the same at coefficient 1", "share")
    plain_normalised_spread: float = column("spread over the sets", "share")
    lost: float = column("mean of how much worse than the adapters alone", "of the metric")
    lost_spread: float = column("spread over the sets", "of the metric")
    plain_lost: float = column("the same at coefficient 1", "of the metric")
    plain_lost_spread: float = column("spread over the sets", "of the metric")
    loss: float = column("mean loss at the chosen coefficient", "nats")
    loss_spread: float = column("spread over the sets", "nats")
    plain_loss: float = column("mean loss at coefficient 1", "nats")
    plain_loss_spread: float = column("spread over the sets", "nats")
    difference: float = column(
        "how much better than the first merge, in units of the metric (of tasks with several, in shares of the "
        "adapters' own); null of that one and of what is no merge"
    )
    difference_low: float = column("low end of its interval, over examples and (of several) sets")
    difference_high: float = column("high end of its interval")
    p: float = column("p-value of a difference of 0, paired", form=".2g")
    p_holm: float = column("the same, corrected by Holm for all merges of the training method", form=".2g")
    verdict: str | None = column("ahead or behind (p_holm below 0.05), or cannot be told")
    p_nulls: float = column("largest p-value against the nulls; null without 20 draws", form=".2g", heading="p (nulls)")


@dataclass
class MergeTask:
    """One merge at its chosen coefficients on one task, over the sets of one training method."""

    method: str | None = column("training method of the sets")
    ratio: str | None = column("weights of the seeds of one task; null for several tasks")
    merge: str = column("name of the merge")
    task: str = column("name of the task")
    sets: int = column("sets", counts=True)
    category: str = column("equal rank, exact, or reference (no merge)")
    normalised: float = column("mean score / score alone; null of metrics that are no shares", "share", heading="norm.")
    normalised_spread: float = column("spread over the sets", "share")
    lost: float = column("mean of how much worse than the adapter alone, of other metrics", "of the metric")
    lost_spread: float = column("spread over the sets", "of the metric")


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
    normalised: float = column(
        "mean score / score alone over draws and sets; of metrics that are no shares, how much better than alone",
        heading="norm.",
    )
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
    normalised: list[Any] = column("mean score / score alone at each", "share")
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
            "by_task": MergeTask,
            "nulls": MergedNull,
            "curves": MergeCurve,
            "skipped": Skipped,
            "shared_initial_A": SharedStart,
        },
        Paper(
            ("normalised", "lost", "coefficient", "verdict", "p_nulls"),
            "by_method",
            ("merge", "ratio"),
            "method",
            ("bytes", "cut_error"),
        ),
        version=3,
        open={
            "rows": "the metric that each task is judged by, with its interval (accuracy, accuracy_low …)",
            "sets": "the same, a mean over the tasks where all are judged by one metric, else null",
            "by_method": "the same at the chosen coefficient and (plain_accuracy …) at 1, with spreads",
            "by_task": "the same",
            "curves": "the same at each coefficient",
        },
        parameters={
            "metrics": "metric → about, unit, and higher: whether more is better",
            "task_names": "name of the task of each adapter, each once",
            "one_task": "whether the adapters are seeds of one task",
            "merges": "the merges compared",
            "stands_for": "merge → others that are the same sum at another coefficient",
            "reference": "the merge that the others are compared with",
            **ADAPTERS,
        },
    ),
)
