"""The caption of a figure for LaTeX: what is drawn, on what it was measured, and what its bands are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_lab import files
from lora_lab.errors import OptionError
from lora_lab.escape import latex
from lora_lab.files.ownership import MARK

_SYMBOLS = {
    "‖": r"$\|$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "½": r"$\tfrac12$",
    "√": r"$\surd$",
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "…": r"\dots{}",
    "–": "--",
    "›": "$>$",
    "‹": "$<$",
}


def save(path: Path, panels: Sequence[tuple[str, str]], *, force: bool = False) -> None:
    """Write the caption as .tex; FileError where something else is there, OptionError for another ending."""
    check(path)
    files.refuse_existing(path, force=force)
    files.write_bytes(path, caption(panels).encode())


def check(path: Path | None) -> None:
    """OptionError for a path that captions are not written to."""
    if path is not None and path.suffix != ".tex":
        raise OptionError(f"{path}: a caption is written as .tex")


def caption(panels: Sequence[tuple[str, str]]) -> str:
    r"""`\caption{…}` of each panel's (what is to be seen, on what it was measured); several have their letters."""
    parts = []
    for (title, said), letter in zip(panels, "abcdefghijklmnopqrstuvwxyz", strict=False):
        front = rf"\textbf{{({letter})}} " if len(panels) > 1 else ""
        sentences = [_sentence(text) for text in (title[:1].upper() + title[1:], said) if text]
        parts.append(front + " ".join(sentences))
    return f"% {MARK} caption\n\\caption{{{' '.join(parts)}}}\n"


def _sentence(text: str) -> str:
    plain = text.replace(r"\$", "$")  # as drawn texts have it
    marked = "".join(_SYMBOLS.get(sign, sign) for sign in latex(plain))
    joined = re.sub(r"(?<!\\)\$\$", "", marked)  # one formula of two that touch; \$ is a dollar
    return joined.rstrip(".") + "."
