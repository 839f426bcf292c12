"""What was found out: numbers with their intervals and their provenance, in one file that lasts.

Knows no torch, no model and no figure.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.results.result import Result as Result
    from lora_lab.results.result import fingerprint as fingerprint
    from lora_lab.results.result import provenance as provenance
    from lora_lab.results.stats import Sampled as Sampled
    from lora_lab.results.stats import mean_and_error as mean_and_error
    from lora_lab.results.stats import mean_and_spread as mean_and_spread
    from lora_lab.results.stats import proportion as proportion

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "result": (
            "Result",
            "fingerprint",
            "provenance",
        ),
        "stats": (
            "Sampled",
            "mean_and_error",
            "mean_and_spread",
            "proportion",
        ),
    },
)
