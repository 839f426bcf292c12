"""Whole checkpoints with adapters in them: fused into a base, verified to be so, and extracted again.

Knows checkpoints on disk, one tensor at a time, and what adapters change in them; not tasks, scores or training.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.fusing.extract import Extracted as Extracted
    from lora_lab.fusing.extract import ExtractOptions as ExtractOptions
    from lora_lab.fusing.fuse import Fused as Fused
    from lora_lab.fusing.fuse import FuseOptions as FuseOptions
    from lora_lab.fusing.fuse import Fusion as Fusion
    from lora_lab.fusing.verify import Finding as Finding
    from lora_lab.fusing.verify import Verified as Verified

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "extract": ("ExtractOptions", "Extracted"),
        "fuse": ("FuseOptions", "Fused", "Fusion"),
        "verify": ("Finding", "Verified"),
    },
)
