"""Adapters trained on a task: CoTo and what it is compared to, one run or many, at one setting or the best of several.

Knows transformers' Trainer; nothing of what is asked about adapters afterwards.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.training.coto import CoToCallback as CoToCallback
    from lora_lab.training.fit import train as train
    from lora_lab.training.recipe import METHODS as METHODS
    from lora_lab.training.recipe import Recipe as Recipe
    from lora_lab.training.runs import Job as Job
    from lora_lab.training.runs import train_all as train_all
    from lora_lab.training.schedule import Schedule as Schedule
    from lora_lab.training.tuning import train_best as train_best

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "coto": ("CoToCallback",),
        "fit": ("train",),
        "recipe": (
            "METHODS",
            "Recipe",
        ),
        "runs": (
            "Job",
            "train_all",
        ),
        "schedule": ("Schedule",),
        "tuning": ("train_best",),
    },
)
