"""What results of claims that were put to the test hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.schema import Kind, Paper, column


@dataclass
class ClaimRow:
    """One claim on one task."""

    claim: str = column("name of the claim")
    says: str = column("the claim, in a sentence")
    source: str = column("who makes it, and where")
    published: str = column("all numbers that were published for it, in words; empty where none were")
    published_of: str | None = column("what the first of them are of", heading="published of")
    published_unit: str | None = column("their unit", heading="their unit")
    published_control: float | None = column("the control's", heading="published control", form="g")
    published_treated: float | None = column("the treated's", heading="published treated", form="g")
    published_difference: float | None = column("their difference", heading="published difference", form="+.3g")
    task: str = column("task that it was judged on; of merges, all tasks")
    statistic: str = column("the number that it is about")
    where: dict[str, Any] = column("which of the statistic's numbers")
    direction: str = column("what is claimed of it: higher, lower or equal")
    least: float = column("smallest difference that counts, told before the run", "of the statistic")
    treated: dict[str, Any] = column("fields of the recipe that it is about")
    control: dict[str, Any] | None = column("fields of the recipe that it is compared with; null of a number alone")
    unit: str = column("unit of the statistic, or the metric that it is in")
    of_treated: float = column("mean over the seeds, of the treated", "of the statistic", heading="treated")
    of_control: float = column("the same of the control", "of the statistic", heading="control")
    difference: float = column("treated less control, over the units that both have", "of the statistic")
    difference_low: float = column("low end of its interval, over seeds and examples")
    difference_high: float = column("high end of its interval")
    seeds: int = column("seeds")
    units: int = column("adapters, pairs or sets that the mean is over")
    paired: bool | None = column(
        "whether the noise of examples is that of differences on the same ones; null where none is known"
    )
    p_holds: float = column("p-value of the claim's opposite, corrected over all claims (Holm)", form=".2g")
    p_fails: float = column("p-value of the claim, as large as counts, corrected over all claims", form=".2g")
    verdict: str = column("holds, does not hold, or cannot be told")
    why: str | None = column("why there is no number")


KINDS = (
    Kind(
        "reproduce",
        "claims of papers, put to the test on one testbed",
        {"rows": ClaimRow},
        Paper(("claim", "task", "of_treated", "of_control", "difference", "verdict")),
        version=2,
        summary={"verdicts": "verdict → how many claims have it"},
        parameters={
            "testbed": "its name",
            "about": "what it is",
            "tasks": "tasks that claims about one task were judged on",
            "merged": "tasks whose adapters were merged",
            "seeds": "trainings of each kind",
            "recipe": "fields of the recipe that all trainings had",
        },
    ),
)
