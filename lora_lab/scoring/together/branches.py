"""Blocks in a pass over many variants: rows that are equal before a block, and in its state, are computed once.

All variants that branch at one block start from one stored input: the block runs on the rows of one variant of each
group of equals, and its output is expanded to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lora_lab.scoring.layout import Layout, Variant
from lora_lab.scoring.together.rows import RowGates, by_variant

_Key = tuple[int, str]
"""A block, and the form of what it is given: which tensors and values, in which containers."""

_Heights = tuple["list[int] | None", "list[int] | None"]
"""First dimensions of the tensors that a block is given, and of those it gives; None where it holds more than these."""


@dataclass(frozen=True)
class _Plan:
    """Which of the tensors that a block is given, and of those it gives, have rows of variants."""

    given: tuple[bool, ...]
    made: tuple[bool, ...]


@dataclass(eq=False)
class Branches:
    """Calls the blocks of a model (see `calling`) in passes over several variants."""

    layout: Layout
    gates: RowGates
    computed: int = 0
    """Block evaluations, each of one variant on one batch."""
    unknown: dict[_Key, list[_Heights]] = field(default_factory=dict)
    """Calls in passes over several variants of which it is not known yet what has rows."""
    _plans: dict[_Key, _Plan | None] = field(default_factory=dict)
    _variants: Sequence[Variant] = ()
    _alone: dict[_Key, list[_Heights]] = field(default_factory=dict)
    _within: bool = False
    _groups: Any = field(default_factory=WeakIdKeyDictionary)
    """Tensor → which of its variants' rows are equal: a number each, and the tensor's version then."""

    def begin(self, variants: Sequence[Variant]) -> None:
        """A new pass over these variants; none: over one, without gates."""
        self._variants, self._within, self._alone = variants, False, {}
        self._groups = WeakIdKeyDictionary()

    def learn(self, count: int) -> None:
        """Find which tensors have rows, from the last pass over `count` variants and the one over one since then.

        Blocks that are called twice, hold more than tensors and plain values, write into what they are given, or of
        which a tensor's first dimension is neither as it was nor `count` times that, are computed on all rows.
        """
        for key, together in self.unknown.items():
            alone = self._alone.get(key, [])
            self._plans[key] = None
            if len(together) == len(alone) == 1:
                given, made = (_with_rows(a, b, count) for a, b in zip(alone[0], together[0], strict=True))
                self._plans[key] = _Plan(given, made) if given is not None and made is not None else None
        self.unknown = {}

    def call(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The block's output on all rows."""
        if self._within:  # a block within a block
            return forward(*args, **kwargs)
        self._within = True
        try:
            return self._call((index, _form((args, kwargs))), forward, args, kwargs)
        finally:
            self._within = False

    def _call(self, key: _Key, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        count, plan, given = max(1, len(self._variants)), self._plans.get(key), _leaves((args, kwargs))
        if self._variants and plan is not None:
            groups = self._equal_rows(key[0], [t for t, rows in zip(given, plan.given, strict=True) if rows])
            places = [groups.index(number) for number in dict.fromkeys(groups)]
            if len(places) < count:
                return self._shared(forward, (args, kwargs), plan, groups, places)
        self.computed += count
        versions = [tensor._version for tensor in given]
        output = forward(*args, **kwargs)
        if not self._variants or key not in self._plans:
            written = any(tensor._version != v for tensor, v in zip(given, versions, strict=True))
            heights = None if written or "?" in key[1] else list(map(_height, given))
            made = None if "?" in _form(output) else list(map(_height, _leaves(output)))
            (self.unknown if self._variants else self._alone).setdefault(key, []).append((heights, made))
        if self._variants and plan is not None:
            self._remember(output, plan, list(range(count)))
        return output

    def _shared(
        self, forward: Callable[..., Any], given: Any, plan: _Plan, groups: list[int], places: list[int]
    ) -> Any:
        """The block's output, computed on the rows of the variants at `places` alone."""
        count, device = len(groups), next(t.device for t in _leaves(given))
        chosen = torch.tensor(places, device=device)
        back = torch.tensor([list(dict.fromkeys(groups)).index(number) for number in groups], device=device)
        args, kwargs = _mapped(given, plan.given, lambda t: _chosen(t, count, chosen))
        with self.gates.only(chosen):
            output = forward(*args, **kwargs)
        self.computed += len(places)
        output = _mapped(output, plan.made, lambda t: _chosen(t, len(places), back))
        self._remember(output, plan, groups)
        return output

    def _remember(self, output: Any, plan: _Plan, groups: list[int]) -> None:
        made = _leaves(output)
        for tensor, rows in zip(made, plan.made, strict=len(made) == len(plan.made)):
            if rows:
                self._groups[tensor] = groups, tensor._version

    def _equal_rows(self, index: int, tensors: Sequence[Tensor]) -> list[int]:
        """A number for each variant, the same for those that have the same state there and equal rows in all these."""
        members = self.layout.members[index]
        keys: list[Any] = [(tuple(variant[i] for i in members),) for variant in self._variants]
        for tensor in tensors:
            known = self._groups.get(tensor)
            if known is None or known[1] != tensor._version:
                known = self._groups[tensor] = _runs(tensor, len(keys)), tensor._version
            keys = [(*key, number) for key, number in zip(keys, known[0], strict=True)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return [numbers[key] for key in keys]


def _runs(tensor: Tensor, count: int) -> list[int]:
    """A number for each variant's rows, the same for neighbours that are equal bit for bit (or are 0 and −0)."""
    rows = by_variant(tensor, count).flatten(1)
    changes = (rows[1:] != rows[:-1]).any(1).cumsum(0)
    return [0, *changes.tolist()]


def _chosen(tensor: Tensor, count: int, places: Tensor) -> Tensor:
    """The rows of the variants at these places."""
    return by_variant(tensor, count).index_select(0, places).flatten(0, 1)


def _with_rows(alone: list[int] | None, together: list[int] | None, count: int) -> tuple[bool, ...] | None:
    if alone is None or together is None or len(alone) != len(together):
        return None
    if any(many not in (one, one * count) for one, many in zip(alone, together, strict=True)):
        return None
    return tuple(many == one * count and one > 0 for one, many in zip(alone, together, strict=True))


def _height(tensor: Tensor) -> int:
    """The first dimension; 0 of a number."""
    return len(tensor) if tensor.ndim else 0


def _leaves(nest: Any) -> list[Tensor]:
    if isinstance(nest, Tensor):
        return [nest]
    items = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, tuple | list) else ()
    return [tensor for item in items for tensor in _leaves(item)]


def _form(nest: Any) -> str:
    """The nest with a T for every tensor and a V for every plain value; a ? for what may hold a state of its own."""
    if type(nest) in (tuple, list):
        return f"({','.join(map(_form, nest))})"
    if type(nest) is dict:
        return f"{{{','.join(f'{key}:{_form(value)}' for key, value in nest.items())}}}"
    if isinstance(nest, Tensor):
        return "T"
    plain = nest is None or isinstance(nest, bool | int | float | str | torch.dtype | torch.device)
    return "V" if plain else "?"


def _mapped(nest: Any, rows: Sequence[bool], change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest, changed where a tensor has rows."""
    at = iter(rows)

    def walk(item: Any) -> Any:
        if isinstance(item, Tensor):
            return change(item) if next(at) else item
        if isinstance(item, dict):
            return {key: walk(value) for key, value in item.items()}
        return type(item)(map(walk, item)) if isinstance(item, tuple | list) else item

    return walk(nest)
