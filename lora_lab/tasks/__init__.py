"""What adapters are good for: a base model, examples in three splits, and what counts as right.

Knows tables, settings, splits and scores, and which task an adapter was made on; nothing of how many models are
scored. What differs from kind to kind is in kinds/, which knows this room.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.tasks.kinds import KINDS as KINDS
    from lora_lab.tasks.kinds import TASKS as TASKS
    from lora_lab.tasks.kinds import example as example
    from lora_lab.tasks.kinds import from_file as from_file
    from lora_lab.tasks.kinds import from_name as from_name
    from lora_lab.tasks.kinds import from_record as from_record
    from lora_lab.tasks.kinds import from_spec as from_spec
    from lora_lab.tasks.kinds import iterate as iterate
    from lora_lab.tasks.task import Scores as Scores
    from lora_lab.tasks.task import Split as Split
    from lora_lab.tasks.task import Task as Task

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "kinds": (
            "KINDS",
            "TASKS",
            "example",
            "from_file",
            "from_name",
            "from_record",
            "from_spec",
            "iterate",
        ),
        "task": (
            "Scores",
            "Split",
            "Task",
        ),
    },
)
