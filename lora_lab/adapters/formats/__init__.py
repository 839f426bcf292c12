"""What the files of adapters mean: keys, configurations, which modules they name, and what is wrong with them.

Knows tensors by their keys and PEFT's rules; not what becomes of an adapter afterwards. Nothing that a file says is
believed before it is checked here.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.adapters.formats.keys import PREFIX as PREFIX
    from lora_lab.adapters.formats.keys import natural_key as natural_key
    from lora_lab.adapters.formats.lookup import locate as locate
    from lora_lab.adapters.formats.peft.peft_format import parse as parse
    from lora_lab.adapters.formats.peft.peft_format import update as update
    from lora_lab.adapters.formats.peft.peft_format import why_not_additive as why_not_additive

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "keys": (
            "PREFIX",
            "natural_key",
        ),
        "lookup": ("locate",),
        "peft.peft_format": (
            "parse",
            "update",
            "why_not_additive",
        ),
    },
)
