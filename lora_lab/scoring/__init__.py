"""Many variants of a model scored on a task, each once: weights change in place, here or in workers.

Knows tasks and adapters; not why anybody asks for these variants, nor what their scores mean.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.scoring.changes import Change as Change
    from lora_lab.scoring.changes import LayerMask as LayerMask
    from lora_lab.scoring.changes import Replacement as Replacement
    from lora_lab.scoring.evaluate import score as score
    from lora_lab.scoring.evaluator import Evaluator as Evaluator
    from lora_lab.scoring.execution import Cost as Cost
    from lora_lab.scoring.execution import Execution as Execution
    from lora_lab.scoring.journal import Journal as Journal
    from lora_lab.scoring.sharing.workers import Workers as Workers
    from lora_lab.scoring.sharing.workers import open_workers as open_workers

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "changes": ("Change", "LayerMask", "Replacement"),
        "evaluate": ("score",),
        "evaluator": ("Evaluator",),
        "execution": ("Cost", "Execution"),
        "journal": ("Journal",),
        "sharing.workers": ("Workers", "open_workers"),
    },
)
