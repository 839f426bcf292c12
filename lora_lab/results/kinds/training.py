"""What results of trainings, and of adapters scored as they are, hold."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lab.results.rows import MEASURED, METRICS, Adapted
from lora_lab.results.schema import Kind, Paper, column


@dataclass
class TrainRow:
    """One optimiser step."""

    step: int = column("optimiser step, from 0")
    p: float = column("probability with which each group is on", "share")
    mask: str | None = column("which groups were on, a 0 or 1 for each; null of methods without masks")
    loss: float = column("training loss; null where it was no finite number", "nats")
    learning_rate: float = column("learning rate of the step", form=".2g")


@dataclass
class TuningRow:
    """One training at one setting."""

    method: str = column("training method")
    seed: int = column("seed of the training")
    chosen: bool = column("whether this setting was the best")


@dataclass
class TuningSetting:
    """One setting, over the seeds."""

    chosen: bool = column("whether this setting was the best")


@dataclass
class EvaluateRow(Adapted):
    """One adapter on one task."""

    task: str = column("name of the task")
    examples: int = column("examples that were scored")


KINDS = (
    Kind(
        "train",
        "one training, step by step",
        {"rows": TrainRow},
        Paper(("step", "p", "loss", "learning_rate")),
        summary={
            "validation": "the task's metrics on the validation split, the main one first, and number of examples",
            "cpu_s": "CPU seconds of the training",
            "steps": "optimiser steps",
        },
        parameters={"record": "what the adapter records of its training", "groups": "group → its modules"},
    ),
    Kind(
        "tuning",
        "trainings at several settings, of which the best was kept",
        {"rows": TuningRow, "settings": TuningSetting},
        Paper(("chosen",), "settings"),
        version=2,
        open={
            "rows": "each option tried, and each metric on the validation split, null where the training diverged",
            "settings": "the same, metrics as means over the seeds",
        },
        parameters={
            "options": "names of the options tried",
            "criterion": "the metric that chose; where it could not, the next one did",
        },
    ),
    Kind(
        "evaluate",
        "metrics of adapters on tasks",
        {"rows": EvaluateRow},
        Paper(("adapter", "task"), further_last=True),
        version=2,
        open={"rows": f"{MEASURED}; null where a task lacks it"},
        parameters={
            "tasks": "the records of the tasks",
            "examples": "of the split; null for all",
            "behaviour": "file of texts beside the task; null for none",
            "texts": "how many these are, and a hash of them; only with such a file",
            "not_defined": "what of behaviour has no meaning on the tasks, a line each; only with such a file",
            **METRICS,
        },
    ),
)
