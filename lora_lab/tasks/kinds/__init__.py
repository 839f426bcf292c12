"""The kinds of tasks: digits, texts, language models, images, CLIP; and by which name, file or record one is found.

Knows how each kind builds its base, reads its columns and tells what is right; nothing of where tables come from
(tasks), and nothing of adapters.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.tasks.kinds.registry import KINDS as KINDS
    from lora_lab.tasks.kinds.registry import TASKS as TASKS
    from lora_lab.tasks.kinds.registry import example as example
    from lora_lab.tasks.kinds.registry import from_file as from_file
    from lora_lab.tasks.kinds.registry import from_name as from_name
    from lora_lab.tasks.kinds.registry import from_record as from_record
    from lora_lab.tasks.kinds.registry import from_spec as from_spec
    from lora_lab.tasks.kinds.registry import iterate as iterate

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
            "from_spec",
            "iterate",
        ),
    },
)
