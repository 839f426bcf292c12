"""Several adapters made one: sums, rules on entries, shared subspaces, and merges that look at data.

Knows ΔW as factors, and tasks where a method looks at data; scores nothing but what a method or a search asks for.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.merging.merged import Merged as Merged
    from lora_lab.merging.merged import merge as merge
    from lora_lab.merging.methods import MERGES as MERGES
    from lora_lab.merging.paths import Paths as Paths
    from lora_lab.merging.sources import Sources as Sources
    from lora_lab.merging.sources import Weights as Weights
    from lora_lab.merging.writing.export import save as save

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "merged": (
            "Merged",
            "merge",
        ),
        "methods": ("MERGES",),
        "paths": ("Paths",),
        "sources": (
            "Sources",
            "Weights",
        ),
        "writing.export": ("save",),
    },
)
