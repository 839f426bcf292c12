"""Cooperative games: which coalitions to ask for, and what their worths say. Numbers in, numbers out: numpy alone.

Knows no model, adapter or task: a game is any function of bool [m, players] → float [m].
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.games.coalitions import Estimate as Estimate
    from lora_lab.games.coalitions import all_coalitions as all_coalitions
    from lora_lab.games.estimators import ESTIMATORS as ESTIMATORS
    from lora_lab.games.estimators import Estimator as Estimator
    from lora_lab.games.estimators import estimate as estimate
    from lora_lab.games.estimators import exact as exact
    from lora_lab.games.interactions import Interactions as Interactions
    from lora_lab.games.progressive import inequality as inequality

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "coalitions": (
            "Estimate",
            "all_coalitions",
        ),
        "estimators": (
            "ESTIMATORS",
            "Estimator",
            "estimate",
            "exact",
        ),
        "interactions": ("Interactions",),
        "progressive": ("inequality",),
    },
)
