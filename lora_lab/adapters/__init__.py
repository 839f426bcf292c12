"""Adapters as they are: files read and written, ΔW kept as factors, modules named and grouped, weights put on models.

Knows PEFT's format and nothing of tasks, data, scores or training; nothing here is changed in place: a change is a new
one. `formats` takes files apart; the rest works on what they mean.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter as Adapter
    from lora_lab.adapters.cutting import factored as factored
    from lora_lab.adapters.files.reading import inspect as inspect
    from lora_lab.adapters.files.recording import put_record as put_record
    from lora_lab.adapters.groups import blocks as blocks
    from lora_lab.adapters.groups import locate as locate
    from lora_lab.adapters.groups import players as players
    from lora_lab.adapters.lowrank import LowRank as LowRank
    from lora_lab.adapters.lowrank import combine as combine
    from lora_lab.adapters.lowrank import combine_factors as combine_factors
    from lora_lab.adapters.models.attached import attach as attach
    from lora_lab.adapters.models.attached import put_on as put_on
    from lora_lab.adapters.models.attached import weight_deltas as weight_deltas
    from lora_lab.adapters.naming import named as named

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "adapter": ("Adapter",),
        "models.attached": (
            "attach",
            "put_on",
            "weight_deltas",
        ),
        "groups": (
            "blocks",
            "locate",
            "players",
        ),
        "cutting": ("factored",),
        "lowrank": (
            "LowRank",
            "combine",
            "combine_factors",
        ),
        "naming": ("named",),
        "files.reading": ("inspect",),
        "files.recording": ("put_record",),
    },
)
