"""Many variants of a model scored on a task, each once: weights change in place, here or in workers.

Knows tasks and adapters; not why anybody asks for these variants, nor what their scores mean.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.scoring.evaluate import score as score
    from lora_lab.scoring.execution import Cost as Cost
    from lora_lab.scoring.execution import Execution as Execution
    from lora_lab.scoring.workers import Workers as Workers
    from lora_lab.scoring.workers import open_workers as open_workers

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "evaluate": ("score",),
        "execution": ("Cost", "Execution"),
        "workers": ("Workers", "open_workers"),
    },
)
