"""One adapter made smaller: fewer modules, lower ranks, fewer entries. A new adapter and what it cost.

Knows no task: which parts are worth keeping is told from outside.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.pruning.cost import Pruned as Pruned
    from lora_lab.pruning.entries import CRITERIA as CRITERIA
    from lora_lab.pruning.entries import prune_weights as prune_weights
    from lora_lab.pruning.intruders import Lowered as Lowered
    from lora_lab.pruning.intruders import lower_intruders as lower_intruders
    from lora_lab.pruning.modules import structured as structured
    from lora_lab.pruning.patterns import KEEPS as KEEPS
    from lora_lab.pruning.patterns import Choice as Choice
    from lora_lab.pruning.patterns import keep as keep
    from lora_lab.pruning.ranks import RANK_ORDERS as RANK_ORDERS
    from lora_lab.pruning.ranks import RankCut as RankCut
    from lora_lab.pruning.ranks import prune_rank as prune_rank

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "cost": ("Pruned",),
        "entries": (
            "CRITERIA",
            "prune_weights",
        ),
        "intruders": (
            "Lowered",
            "lower_intruders",
        ),
        "modules": ("structured",),
        "patterns": (
            "KEEPS",
            "Choice",
            "keep",
        ),
        "ranks": (
            "RANK_ORDERS",
            "RankCut",
            "prune_rank",
        ),
    },
)
