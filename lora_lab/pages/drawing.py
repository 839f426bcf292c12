"""The figures of a result, as parts of a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from lora_lab.errors import LoraLabError
from lora_lab.escape import html
from lora_lab.plots import hover, inline, registry, style
from lora_lab.results.result import Result

_LARGEST = 2_000_000
"""Characters of a vector figure; a larger one is a picture."""
_DPI = 150


@dataclass(frozen=True)
class Drawing:
    """One view of a result."""

    title: str
    content: Markup | None
    """None where it cannot be drawn."""
    note: str
    """Why not, or what else is to be known."""


def drawings(result: Result, name: str) -> list[Drawing]:
    """All views of a result that show something, the usual one first; ids in them begin with `name`.

    Views of what it does not hold are left out, and so is what looks like another one. Why the usual one cannot be
    drawn is told.
    """
    views = [view for view, entry in registry.PLOTS.items() if entry.kind == result.kind]
    made: list[Drawing] = []
    seen: set[bytes] = set()
    for view in sorted(views, key=lambda view: view != result.kind):
        title = registry.PLOTS[view].title
        title = title[:1].upper() + title[1:]
        try:
            figure = registry.figure([result], kind=view)
            drawing = inline.rendered(figure)
        except LoraLabError as error:
            if view == result.kind:
                made.append(Drawing(title, None, f"no figure: {error}"))
            continue
        if drawing in seen:
            continue
        seen.add(drawing)
        content = inline.embedded(drawing, hover.spots(figure), f"{name}-{len(made)}", title)
        note = ""
        if len(content) > _LARGEST:
            content, note = _picture(figure, title), "Too large to be drawn with values; they are in the tables."
        made.append(Drawing(title, Markup(content), note))  # noqa: S704 (made above, every text escaped)
    return made


def _picture(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    with style.styled():
        figure.savefig(buffer, format="png", dpi=_DPI)
    return f'<img alt="{html(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
