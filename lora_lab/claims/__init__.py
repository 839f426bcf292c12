"""Claims of papers put to the test: which trainings, which number, and a rule that was stated before the run.

Knows training and the questions of analysis; nothing of the command line.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.claims.claims import Claim as Claim
    from lora_lab.claims.claims import Testbed as Testbed
    from lora_lab.claims.claims import read as read
    from lora_lab.claims.reproduce import Reproduce as Reproduce
    from lora_lab.claims.statistics import STATISTICS as STATISTICS
    from lora_lab.claims.verdicts import difference as difference

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "claims": ("Claim", "Testbed", "read"),
        "reproduce": ("Reproduce",),
        "statistics": ("STATISTICS",),
        "verdicts": ("difference",),
    },
)
