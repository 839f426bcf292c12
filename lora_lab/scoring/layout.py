"""Variants of an adapted model, and which blocks of the model they share; no weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from lora_lab.tasks.task import Scores

State = float | tuple[float, ...]
"""Of one adapted module: 0 off, 1 on, another number a factor on its update; or such a number for each of its ranks."""

Variant = tuple[State, ...]
"""A state for every adapted module, in the order of `Variants.names`."""

Judge = Callable[[nn.Module, Mapping[str, Tensor]], Scores]


@dataclass(frozen=True)
class Layout:
    """Which adapted modules lie in which block of a model, and by that what its variants share; no weights."""

    names: tuple[str, ...]
    """The adapted modules, in the order of a variant's states."""
    members: tuple[tuple[int, ...], ...]
    """For each block, in the model's order, its modules' places in `names`."""
    why_not: str | None = None
    """Why no block is shared; None where they are."""

    @property
    def blocks(self) -> int:
        """Blocks of the model that one forward pass runs."""
        return len(self.members)

    def cost(self, variants: Sequence[Variant], at_once: int | None = None) -> int:
        """Block evaluations for these variants on one batch, by the prefixes that they share.

        An upper bound where blocks' own outputs agree by chance, or a model has encoders side by side. So many of them
        `at_once` share with each other alone.
        """
        return self.walk(variants, at_once)[1]

    def walk(self, variants: Sequence[Variant], at_once: int | None = None) -> tuple[list[int], int]:
        """The variants' indices, lexicographically by the blocks in the model's order, and what that order costs."""
        if self.why_not is not None:
            return list(range(len(variants))), self.blocks * len(variants)
        segments = [self._segments(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: _sortable(segments[i]))
        again = [self.blocks, *(self._recomputed(segments[i], segments[j]) for i, j in itertools.pairwise(order))]
        if at_once:
            again[::at_once] = [self.blocks] * len(again[::at_once])
        return order, sum(again) if variants else 0

    @cached_property
    def _outside(self) -> list[int]:
        inside = {i for indices in self.members for i in indices}
        return [i for i in range(len(self.names)) if i not in inside]

    def _segments(self, variant: Variant) -> list[tuple[State, ...]]:
        """States by segment: modules outside of blocks first, then each block's."""
        inside = [tuple(variant[i] for i in indices) for indices in self.members]
        return [tuple(variant[i] for i in self._outside), *inside]

    def _recomputed(self, before: list[tuple[State, ...]], now: list[tuple[State, ...]]) -> int:
        first = next((k for k, (a, b) in enumerate(zip(before, now, strict=True)) if a != b), len(now))
        return self.blocks - max(0, first - 1)


def _sortable(segments: Sequence[tuple[State, ...]]) -> list[list[tuple[float, ...]]]:
    """States that compare with each other, numbers with rank masks too."""
    return [[state if isinstance(state, tuple) else (float(state),) for state in segment] for segment in segments]
