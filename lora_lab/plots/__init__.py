"""Results as figures ready for a paper. Nothing is computed here that the results do not hold, and torch stays out."""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.plots.registry import PLOTS as PLOTS
    from lora_lab.plots.registry import figure as figure
    from lora_lab.plots.registry import save as save
    from lora_lab.plots.registry import shows as shows
    from lora_lab.plots.style import WIDTHS as WIDTHS

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "registry": (
            "PLOTS",
            "figure",
            "save",
            "shows",
        ),
        "style": ("WIDTHS",),
    },
)
