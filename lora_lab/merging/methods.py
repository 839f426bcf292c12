"""Every method of merging in one place: a name, the function behind it, and its options with their defaults.

A method takes sources and options and gives (module, merged ΔW) pairs. Those of one module take its updates and
weights; they run in factor space where that is exact, and on a dense ΔW, one module at a time, where they work on
single entries.
"""

from __future__ import annotations

import functools
import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank, combine, combine_factors
from lora_lab.errors import MismatchError, OptionError, some, unknown
from lora_lab.merging import data_driven, elementwise, subspaces
from lora_lab.merging.elementwise import RULES, SUMS
from lora_lab.merging.sources import Sources

Merge = Callable[..., Iterable[tuple[str, LowRank | Tensor]]]
"""Function (sources, options) → (module, merged ΔW), dense where the method works on entries."""


def check(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options to call a method with; OptionError for a method or an option that does not exist."""
    if method not in MERGES:
        raise unknown("method", method, MERGES)
    known = defaults(method, options)
    for name in options:
        if name not in known:
            if not known:
                raise OptionError(f"{method} has no options to set")
            raise unknown(f"option of {method}", name, list(known))
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{name} is {value}; a finite number is needed")
    return dict(options)


def defaults(method: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of a method with their defaults, those of the inner rule that is chosen among them."""
    if method not in MERGES:
        raise unknown("method", method, MERGES)
    found = _keywords(MERGES[method])
    given = options or {}
    if "inner" in found:
        inner = given.get("inner", found["inner"])
        if inner not in RULES:
            raise unknown("inner rule", str(inner), RULES)
        found |= {name: value for name, value in _keywords(RULES[inner]).items() if name not in found}
    return found


def variant(method: str) -> str:
    """Which published variant a method is, from its docstring."""
    paragraphs = inspect.cleandoc(MERGES[method].__doc__ or "").split("\n\n")
    found = next((text for text in paragraphs if text.startswith("Variant: ")), "")
    return " ".join(found.removeprefix("Variant: ").split())


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def each(function: Callable[..., LowRank]) -> Merge:
    """A method of one module's (updates, weights) as a method of all modules."""

    @functools.wraps(function)
    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, LowRank]]:
        for name in sources.modules:
            updates, weights = sources.updates_of(name), sources.weights_of(name)
            used = [i for i, weight in enumerate(weights) if weight]
            if not used:
                yield name, 0.0 * updates[0]
                continue
            with _naming(name):
                made = function([updates[i] for i in used], [weights[i] for i in used], **_seeded(name, options))
            yield name, made

    return method


def dense(rule: Callable[..., Tensor]) -> Merge:
    """A rule for matrices as a method on ΔW itself, one dense module at a time."""

    @functools.wraps(rule)
    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, LowRank | Tensor]]:
        def view(updates: Sequence[LowRank]) -> tuple[Iterable[Tensor], Callable[[Tensor], Tensor]]:
            return (update.delta() for update in updates), lambda merged: merged

        return _by_rule(sources, rule, view, options, everyone=True)

    return method


def in_space(function: Callable[..., LowRank], space: Callable[..., subspaces.Space]) -> Merge:
    """A merge by an inner rule in shared bases as a method of all modules."""

    @functools.wraps(function)
    def method(sources: Sources, *, inner: str = "ties", **options: Any) -> Iterator[tuple[str, LowRank | Tensor]]:
        own = {name: options.pop(name, default) for name, default in _keywords(space).items()}

        def view(updates: Sequence[LowRank]) -> tuple[Iterable[Tensor], Callable[[Tensor], LowRank]]:
            made = space(updates, **own)
            return made.cores, made.back

        return _by_rule(sources, RULES[inner], view, options, everyone=False)

    return method


View = Callable[[Sequence[LowRank]], tuple[Iterable[Tensor], Callable[[Tensor], LowRank | Tensor]]]
"""Function (updates of a module) → a matrix of each, and the way back from the merged one."""


def _by_rule(
    sources: Sources, rule: Callable[..., Tensor], view: View, options: Mapping[str, Any], *, everyone: bool
) -> Iterator[tuple[str, LowRank | Tensor]]:
    """A rule on what `view` makes of every module, of all adapters or of those with a weight there."""

    def used(name: str) -> list[int]:
        return [i for i, weight in enumerate(sources.weights_of(name)) if weight or everyone]

    options = {**_keywords(rule), **options}
    cuts = None
    if options.get("scope") == "global":
        cuts = _cuts(sources, view, used, options["density"], torch.float32 if everyone else torch.float64)
    for name in sources.modules:
        updates, weights, chosen = sources.updates_of(name), sources.weights_of(name), used(name)
        if not chosen:
            yield name, 0.0 * updates[0]
            continue
        with _naming(name):
            matrices, back = view([updates[i] for i in chosen])
            known = [] if cuts is None else [[cuts.get(i, elementwise.NO_ENTRY) for i in chosen]]
            made = back(rule(matrices, [weights[i] for i in chosen], *known, **_seeded(name, options)))
        yield name, made


def _cuts(
    sources: Sources, view: View, used: Callable[[str], Sequence[int]], density: float, dtype: torch.dtype
) -> dict[int, elementwise.Cut]:
    """Adapter → where its largest entries end, over all modules that it changes; in `dtype` or what is wider."""

    def pieces() -> Iterator[dict[int, Tensor]]:
        for name in sources.modules:
            updates, chosen = sources.updates_of(name), used(name)
            if chosen:
                matrices, _ = view([updates[i] for i in chosen])
                yield {i: matrix for i, matrix in zip(chosen, matrices, strict=True) if updates[i].rank}

    given = (update.A.dtype for name in sources.modules for update in sources.updates_of(name))
    return elementwise.cuts_of(pieces, density, max(dtype, *given, key=lambda each: each.itemsize))


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """What does not fit together is said with the module's name."""
    try:
        yield
    except MismatchError as error:
        raise MismatchError(f"{module}: {error}") from error


def summed(coefficients: Callable[..., list[float]]) -> Merge:
    """A weighted sum as a method: exact by concatenation, the coefficients from r × r cores."""

    @functools.wraps(coefficients)
    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, LowRank]]:
        for name in sources.modules:
            updates = sources.updates_of(name)
            gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
            if coefficients is elementwise.slerp:  # the others are the same whatever is summed
                gram = torch.tensor([[a.inner(b) for b in updates] for a in updates], dtype=torch.float64)
            yield name, combine(updates, coefficients(gram, sources.weights_of(name), **options))

    return method


def cat(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ by concatenation: what PEFT calls cat.

    Variant: PEFT's cat, which is task arithmetic by another name.
    """
    return combine(updates, weights)


def factor_average(updates: Sequence[LowRank], weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """λ (Σ wᵢBᵢ)(Σ wᵢAᵢ) / (Σ wᵢ)²: averaged factors, which have cross terms BᵢAⱼ.

    Not an average of ΔW: it hangs on the gauge, and independent adapters lose most of their norm. The literature's
    "fusion". Adapters that leave a module alone count as 0.

    Variant: the CoTo paper's fusion of factors.
    """
    present = [update for update in updates if update.rank]
    if not present:
        return updates[0]
    rank = present[0].rank
    filled = [update if update.rank else present[0] * 0.0 for update in updates]
    if any(update.rank != rank for update in filled):
        raise MismatchError(f"factors of ranks {some(u.rank for u in present)} cannot be averaged; ΔW can (average)")
    shares = elementwise.average(torch.zeros(0), weights)
    zeroed = [u if u_.rank else LowRank(u.A * 0.0, u.B, u.shape) for u, u_ in zip(filled, updates, strict=True)]
    return scale * combine_factors(zeroed, shares)


def _seeded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a seed of this module's own, so that modules of one shape are not thinned alike."""
    if "seed" not in options:
        return dict(options)
    return {**options, "seed": (int(options["seed"]) * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**32}


MERGES: dict[str, Merge] = {
    "task-arithmetic": summed(SUMS["task-arithmetic"]),
    "average": summed(SUMS["average"]),
    "cat": each(cat),
    "factor-average": each(factor_average),
    "slerp": summed(SUMS["slerp"]),
    "magnitude": dense(elementwise.magnitude),
    "ties": dense(elementwise.ties),
    "dare": dense(elementwise.dare),
    "dare-ties": dense(elementwise.dare_ties),
    "della": dense(elementwise.della),
    "breadcrumbs": dense(elementwise.breadcrumbs),
    "knots": in_space(subspaces.knots, subspaces.column_space),
    "core-space": in_space(subspaces.core_space, subspaces.both_spaces),
    "lego": each(subspaces.lego),
    "tsv": each(subspaces.tsv),
    "iso-c": each(subspaces.iso_c),
    "iso-cts": each(subspaces.iso_cts),
    **data_driven.METHODS,
}
"""Name → method; its keyword-only arguments are its options, its first line says what it is."""

NEEDS_DATA = tuple(data_driven.METHODS)
"""Methods that look at the tasks of the sources."""
