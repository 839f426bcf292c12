"""Results as one HTML page that needs nothing else: their tables, figures, parameters and origin.

Knows results and their figures; no adapter, no model, no torch, and no network.
"""

from typing import TYPE_CHECKING

from lora_lab.lazy import face

if TYPE_CHECKING:
    from lora_lab.pages.collecting import Collected as Collected
    from lora_lab.pages.collecting import collect as collect
    from lora_lab.pages.page import as_html as as_html
    from lora_lab.pages.page import save as save

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "collecting": ("Collected", "collect"),
        "page": ("as_html", "save"),
    },
)
