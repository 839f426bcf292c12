"""An adapter file taken apart: its modules, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_lab.brief import Brief

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
"""The parts of a plain LoRA."""


@dataclass(frozen=True)
class Site:
    """One adapted module: its name in the base model and the keys of its adapter tensors by part."""

    name: str
    kind: str
    """linear, embedding, conv1d … conv3d, or parameter (a stack of expert weights); tuner name for others."""
    keys: Mapping[str, str]
    """Part (lora_A, lora_B, hada_w1_a …, with .bias where it is one) → key in the adapter's tensors."""
    rank: int | None = None
    scale: float | None = None

    @property
    def pair(self) -> tuple[str, str]:
        """Parts that hold A and B."""
        return ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A", "lora_B")


@dataclass(repr=False)
class Parsed(Brief):
    """An adapter file taken apart."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
