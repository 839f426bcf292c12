"""The ranks at which merges come back: a number, or what the adapters' own ranks make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_lab.errors import OptionError
from lora_lab.merging.sources import Sources

RANKS: Mapping[str, Callable[[Sources, str], int]] = {
    "largest": lambda sources, module: sources.largest_rank_of(module),
    "sum": lambda sources, module: sources.rank_of(module),
}
"""Words for a rank → the rank in a module."""

EXACT = "exact"
"""The word for no cut, where ranks are compared."""

Rank = int | str
"""A number, or a word of RANKS."""


def rank_in(sources: Sources, module: str, rank: Rank | None) -> int | None:
    """The rank in a module that is asked for; None where none is."""
    return RANKS[rank](sources, module) if isinstance(rank, str) else rank


def check_rank(sources: Sources, rank: Rank | None) -> None:
    """OptionError for a rank that no module can have."""
    most = max(min(shape[0], shape[1:].numel()) for shape in sources.shapes.values())
    if isinstance(rank, int) and rank > most:
        raise OptionError(f"a rank of {rank} was asked for; the modules of these adapters have ranks up to {most}")
