"""What adapters are good for: a base model, examples in three splits, and what counts as right.

Knows how to build a base and judge its outputs; nothing of adapters, and nothing of how many models are scored.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.tasks.registry import KINDS as KINDS
    from lora_lab.tasks.registry import TASKS as TASKS
    from lora_lab.tasks.registry import example as example
    from lora_lab.tasks.registry import from_file as from_file
    from lora_lab.tasks.registry import from_name as from_name
    from lora_lab.tasks.registry import from_record as from_record
    from lora_lab.tasks.registry import iterate as iterate
    from lora_lab.tasks.task import Scores as Scores
    from lora_lab.tasks.task import Split as Split
    from lora_lab.tasks.task import Task as Task

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "registry": (
            "KINDS",
            "TASKS",
            "example",
            "from_file",
            "from_name",
            "from_record",
            "iterate",
        ),
        "task": (
            "Scores",
            "Split",
            "Task",
        ),
    },
)
