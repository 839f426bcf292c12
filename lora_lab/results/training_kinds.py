"""What results of trainings, and of adapters scored as they are, hold."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lab.results.rows import Accuracy, Adapted, Loss
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
    accuracy: float = column("validation accuracy; null where the training diverged", "share")
    loss: float = column("validation loss; null where the training diverged", "nats")
    chosen: bool = column("whether this setting was the best")


@dataclass
class TuningSetting:
    """One setting, over the seeds."""

    accuracy: float = column("mean validation accuracy; null where a training diverged", "share")
    loss: float = column("mean validation loss; null where a training diverged", "nats")
    chosen: bool = column("whether this setting was the best")


@dataclass
class EvaluateRow(Accuracy, Loss, Adapted):
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
            "validation": "accuracy, loss and number of examples of the validation split",
            "cpu_s": "CPU seconds of the training",
            "steps": "optimiser steps",
        },
        parameters={"record": "what the adapter records of its training", "groups": "group → its modules"},
    ),
    Kind(
        "tuning",
        "trainings at several settings, of which the best was kept",
        {"rows": TuningRow, "settings": TuningSetting},
        Paper(("accuracy", "loss", "chosen"), "settings"),
        open={"rows": "a column for each option tried", "settings": "a column for each option tried"},
        parameters={"options": "names of the options tried", "criterion": "accuracy or loss: what chose"},
    ),
    Kind(
        "evaluate",
        "accuracy and loss of adapters on tasks",
        {"rows": EvaluateRow},
        Paper(("adapter", "task", "accuracy", "loss")),
        open={"rows": "perplexity and the task's own measures, such as exact_match, each with its interval"},
        parameters={"tasks": "the records of the tasks"},
    ),
)
