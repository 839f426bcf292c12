"""Results as figures ready for a paper. Nothing is computed here that the results do not hold, and torch stays out."""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.plots.registry import PLOTS as PLOTS
    from lora_lab.plots.registry import View as View
    from lora_lab.plots.registry import draw as draw
    from lora_lab.plots.registry import figure as figure
    from lora_lab.plots.registry import save as save
    from lora_lab.plots.registry import shows as shows
    from lora_lab.plots.style import WIDTHS as WIDTHS
    from lora_lab.plots.style import use as use

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "registry": (
            "PLOTS",
            "View",
            "draw",
            "figure",
            "save",
            "shows",
        ),
        "style": (
            "WIDTHS",
            "use",
        ),
    },
)
