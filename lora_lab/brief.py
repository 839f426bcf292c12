"""A repr in one line for dataclasses whose tensors and long lists would fill the screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_FEW, _MOST = 4, 120
"""Numbers or names of a list that are shown, and characters of anything else."""


class Brief:
    """A base of dataclasses with repr=False: their repr is one line, with shapes of tensors and counts of entries."""

    def __repr__(self) -> str:
        shown = [f"{field.name}={_brief(getattr(self, field.name))}" for field in fields(self)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        inside = value.values() if isinstance(value, Mapping) else value
        plain = all(isinstance(each, str | int | float | None) for each in inside)
        if len(value) > _FEW or not plain:
            return f"<{len(value)} {'entry' if len(value) == 1 else 'entries'}>"
    text = " ".join(repr(value).split())
    return text if len(text) <= _MOST else f"{text[: _MOST - 1]}…"
