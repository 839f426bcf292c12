"""One adapter made smaller: fewer modules, lower ranks, fewer entries. A new adapter and what it cost.

Knows no task: which parts are worth keeping is told from outside.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.pruning.patterns import Choice as Choice
    from lora_lab.pruning.patterns import keep as keep
    from lora_lab.pruning.prune import Pruned as Pruned
    from lora_lab.pruning.prune import prune_rank as prune_rank
    from lora_lab.pruning.prune import prune_weights as prune_weights
    from lora_lab.pruning.prune import structured as structured

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "patterns": (
            "Choice",
            "keep",
        ),
        "prune": (
            "Pruned",
            "prune_rank",
            "prune_weights",
            "structured",
        ),
    },
)
