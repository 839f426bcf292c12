"""Figures as PGF, whose text is set by LaTeX in the fonts of the paper that takes them in by \\input."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.text import Text

from lora_lab.errors import OptionError
from lora_lab.files.ownership import MARK

_ENGINES = ("lualatex", "xelatex")
"""Those that know every letter that figures have; matplotlib asks one how wide texts are."""
_OF_TEX = "#&~{}"
"""Signs that TeX takes for its own, and that matplotlib hands on as they are."""


def content(made: Any, identity: str, path: Path) -> bytes:
    """The figure in PGF; OptionError without an engine of TeX, or for what PGF cannot hold in one file."""
    engine = next((name for name in _ENGINES if shutil.which(name)), None)
    if engine is None:
        raise OptionError(
            f"{path}: PGF needs TeX ({' or '.join(_ENGINES)}), which tells how wide texts are, and there is none; .pdf "
            "and .svg need none"
        )
    if any(ax.images for ax in made.axes):
        raise OptionError(f"{path}: a matrix of colours would be a file of its own beside PGF; .pdf and .svg hold it")
    for text in {text.get_text() for text in made.findobj(Text) if text.get_visible()}:
        for sign in _OF_TEX if "$" not in text.replace(r"\$", "") else "":
            if sign in text:
                raise OptionError(f"{path}: TeX takes {sign} in {text!r} for its own; .pdf and .svg show it as it is")
    buffer = io.BytesIO()
    with rc_context({"pgf.texsystem": engine}):
        made.savefig(buffer, format="pgf")
    return f"% {MARK} figure\n% {identity}\n".encode() + buffer.getvalue()
