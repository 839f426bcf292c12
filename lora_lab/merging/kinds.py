"""What the function of a merge may be: what it is given, and how it becomes a method of all modules.

A `Kind` turns such a function into a method, and where it can be one, into a rule for matrices, which merges inside of
shared bases as well. Modules are merged in factor space where that is exact, and on a dense ΔW, one module at a time,
where a method works on single entries.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.errors import MismatchError
from lora_lab.merging.rules import elementwise, subspaces, trimming
from lora_lab.merging.rules.rows import Matrices, Matrix, dense
from lora_lab.merging.sources import Sources

Delta = LowRank | Tensor
"""A merged ΔW, dense where the method works on entries."""

Method = Callable[..., Iterable[tuple[str, Delta | Callable[[], Delta]]]]
"""Function (sources, options) → (module, merged ΔW), or the call still to make where no other module matters."""

Rule = Callable[..., Tensor]
"""Function (matrices, weights, options) → merged matrix."""


class Inner(Protocol):
    """The entry of a method that merges within another one."""

    @property
    def rule(self) -> Rule | None:
        """The rule for matrices that it is, if it is one."""

    def calls(self, sources: Sources, **options: Any) -> Iterable[tuple[str, Delta | Callable[[], Delta]]]:
        """(module, merged ΔW, or the call that makes it) pairs."""


def by_sources(function: Method) -> Method:
    """A method of the sources as a whole, with their ΔW on the CPU."""

    def method(sources: Sources, **options: Any) -> Iterable[tuple[str, Delta | Callable[[], Delta]]]:
        return function(sources.placed(torch.device("cpu")), **options)

    return method


def by_updates(function: Callable[..., LowRank], *, sided: bool = False) -> Method:
    """A method of one module's (updates, weights) as a method of all modules; `sided` as in `SIDED_UPDATES`."""

    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, Callable[[], Delta]]]:
        turned = stored_turned(sources) if sided else frozenset()

        def merged(name: str) -> LowRank:
            updates, weights = sources.updates_of(name), sources.weights_of(name)
            used = [i for i, weight in enumerate(weights) if weight]
            if not used:
                return 0.0 * updates[0]
            given = [turn(updates[i]) if name in turned else updates[i] for i in used]
            with _naming(name):
                made = function(given, [weights[i] for i in used], **_seeded(name, options))
            return turn(made) if name in turned else made

        return _each(sources, merged)

    return method


def stored_turned(sources: Sources) -> frozenset[str]:
    """Modules whose weight, and so their ΔW, is stored as [inputs, outputs]: GPT-2's Conv1D, and embeddings."""
    like = sources.like
    kinds = ("embedding", "linear") if like.config.get("fan_in_fan_out") else ("embedding",)
    return frozenset(name for name, site in like.sites.items() if site.kind in kinds)


def turn(update: LowRank) -> LowRank:
    """ΔWᵀ."""
    return LowRank(update.B.T, update.A.T)


def by_sums(coefficients: Callable[..., list[float]]) -> Method:
    """A weighted sum as a method: exact by concatenation, its coefficients from r × r cores."""

    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, Callable[[], Delta]]]:
        def merged(name: str) -> LowRank:
            updates = sources.updates_of(name)

            def gram() -> Tensor:
                return torch.tensor([[a.inner(b) for b in updates] for a in updates], dtype=torch.float64)

            return combine(updates, coefficients(gram, sources.weights_of(name), **options))

        return _each(sources, merged)

    return method


def _each(sources: Sources, merged: Callable[[str], Delta]) -> Iterator[tuple[str, Callable[[], Delta]]]:
    """Every module with the call that merges it."""
    return ((name, functools.partial(merged, name)) for name in sources.modules)


def by_matrices(rule: Rule) -> Method:
    """A checked rule for matrices as a method on ΔW itself, one dense module at a time."""

    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, Delta | Callable[[], Delta]]]:
        def view(updates: Sequence[LowRank]) -> tuple[Matrices, Callable[[Tensor], Tensor]]:
            return updates, lambda merged: merged

        return _by_rule(sources, rule, view, options, everyone=True)

    return method


def by_subspace(subspace: Callable[..., subspaces.Subspace]) -> Method:
    """A merge by an inner rule in shared bases as a method of all modules."""

    def method(sources: Sources, *, inner: Inner, **options: Any) -> Iterator[tuple[str, Delta | Callable[[], Delta]]]:
        rule = inner.rule
        assert rule is not None
        bases = {name: options.pop(name, default) for name, default in keywords(subspace).items()}

        def view(updates: Sequence[LowRank]) -> tuple[Matrices, Callable[[Tensor], LowRank]]:
            shared = subspace(updates, **bases)
            return shared.cores, shared.back

        return _by_rule(sources, rule, view, options, everyone=False)

    return method


def by_calibration(calibrated: Callable[..., list[LowRank]]) -> Method:
    """A merge by another method of updates that are changed first, each module brought back to the mean norm."""

    def method(sources: Sources, *, inner: Inner, **options: Any) -> Iterator[tuple[str, Callable[[], Delta]]]:
        own = {name: options.pop(name, default) for name, default in keywords(calibrated).items()}
        turned = stored_turned(sources)

        def changed(name: str, updates: list[LowRank]) -> list[LowRank]:
            used = [i for i, weight in enumerate(sources.weights_of(name)) if weight and updates[i].rank]
            given = [turn(updates[i]) if name in turned else updates[i] for i in used]
            for i, update in zip(used, calibrated(given, **own) if given else (), strict=True):
                updates[i] = turn(update) if name in turned else update
            return updates

        def rescaled(name: str, made: Delta | Callable[[], Delta]) -> Delta:
            merged = made() if callable(made) else made
            updates, weights = sources.updates_of(name), sources.weights_of(name)
            norms = [abs(w) * update.norm() for update, w in zip(updates, weights, strict=True) if w and update.rank]
            size = float(merged.norm())
            # γ = mean ‖wᵢΔWᵢ‖ / ‖merged‖, with the ΔW as they were before
            return merged * (sum(norms) / len(norms) / size) if size and norms else merged

        calls = inner.calls(_Changed(sources, changed), **options)
        return ((name, functools.partial(rescaled, name, made)) for name, made in calls)

    return method


class _Changed(Sources):
    """The same sources with other ΔW: (module, its updates) → the updates in their place."""

    def __init__(self, sources: Sources, change: Callable[[str, list[LowRank]], list[LowRank]]) -> None:
        self.__dict__.update(sources.__dict__)
        self._change = change

    def updates_of(self, name: str) -> list[LowRank]:
        """The changed ΔW of every adapter in a module."""
        return self._change(name, super().updates_of(name))


def summed(coefficients: Callable[..., list[float]]) -> Rule:
    """Coefficients of a sum as a rule for matrices."""

    @functools.wraps(coefficients)
    def rule(stack: Matrices, weights: Sequence[float], **options: Any) -> Tensor:
        matrices = [dense(matrix) for matrix in stack]

        def gram() -> Tensor:
            flat = torch.stack([matrix.flatten() for matrix in matrices]).double()
            return (flat @ flat.T).cpu()

        factors = coefficients(gram, weights, **options)
        return torch.stack([matrix * f for matrix, f in zip(matrices, factors, strict=True)]).sum(0)

    return elementwise.checked(rule)


@dataclass(frozen=True)
class Kind:
    """What the function of an entry is given and gives back."""

    method: Callable[[Callable[..., Any]], Method]
    """The function → a method of all modules."""
    about: str
    """What it works on, in a few words."""
    rule: Callable[[Callable[..., Any]], Rule] | None = None
    """The function → a rule for matrices, where it can be one inside of a subspace."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options with their defaults that are added to the function's own; `inner` names the method within it."""
    takes: Callable[[Any], bool] = lambda entry: entry.rule is not None
    """Whether the entry of another method can be the one within it."""
    without: Collection[str] = ()
    """Options of the method within it that would change nothing."""
    passes_on: bool = False
    """Whether it is the method within it that makes the ΔW, whole or in factors."""
    dense: bool = False
    """Whether it works on ΔW whole, and gives it whole."""
    pace: float = 30.0
    """About how many nanoseconds a core of 2024 takes: an entry of each ΔW where it is dense, else of the factors."""


SOURCES = Kind(by_sources, "all modules, and examples")
"""(sources, options) → (module, merged ΔW) pairs; ΔW is on the CPU, whatever models are run on."""
UPDATES = Kind(by_updates, "factors")
"""(low-rank updates of one module, their weights, options) → low-rank update."""
SIDED_UPDATES = Kind(functools.partial(by_updates, sided=True), "factors")
"""The same, for what treats inputs and outputs differently: rows of A are directions of inputs in every layer."""
MATRICES = Kind(
    lambda function: by_matrices(elementwise.checked(function)),
    "matrices ΔW",
    elementwise.checked,
    dense=True,
    pace=10,
)
"""(matrices of one shape, their weights, options) → matrix."""
ENTRIES = Kind(
    lambda function: by_matrices(elementwise.checked_rows(function)),
    "single entries",
    elementwise.checked_rows,
    dense=True,
    pace=5,
)
"""The same for what hangs on single entries and their rows alone, so that it takes matrices or their factors."""
SUM = Kind(by_sums, "a weighted sum", summed, pace=5)
"""(what gives the inner products, weights, options) → coefficients of a sum."""
SUBSPACE = Kind(by_subspace, "shared bases", options={"inner": "ties"}, pace=150)
"""(low-rank updates of one module, options) → `Subspace`, where the option `inner` names the rule."""
CALIBRATION = Kind(
    by_calibration,
    "before another method",
    options={"inner": "task-arithmetic"},
    takes=lambda entry: not entry.reads_data and "inner" not in entry.kind.options,
    without=("scale",),
    passes_on=True,
)
"""(low-rank updates of one module as in `SIDED_UPDATES`, options) → others, to be merged by the method `inner`."""


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


View = Callable[[Sequence[LowRank]], tuple[Matrices, Callable[[Tensor], LowRank | Tensor]]]
"""Function (updates of a module) → a matrix of each, and the way back from the merged one."""


def _by_rule(
    sources: Sources, rule: Rule, view: View, options: Mapping[str, Any], *, everyone: bool
) -> Iterator[tuple[str, Delta | Callable[[], Delta]]]:
    """A rule on what `view` makes of every module, of all adapters or of those with a weight there."""

    def used_in(name: str) -> list[int]:
        return [i for i, weight in enumerate(sources.weights_of(name)) if weight or everyone]

    options = {**keywords(rule), **options}
    cuts = None
    if options.get("scope") == "global" and "cuts" in inspect.signature(rule).parameters:
        cuts = _cuts(sources, view, used_in, options["density"], torch.float32 if everyone else torch.float64)

    def merged(name: str) -> Delta:
        updates, weights, used = sources.updates_of(name), sources.weights_of(name), used_in(name)
        if not used:
            return 0.0 * updates[0]
        with _naming(name):
            matrices, back = view([updates[i] for i in used])
            of_used = [] if cuts is None else [[cuts.get(i, trimming.NO_ENTRY) for i in used]]
            return back(rule(matrices, [weights[i] for i in used], *of_used, **_seeded(name, options)))

    # of entries of one size that are not all kept, the first modules have the first
    in_order = any(cut.first for cut in (cuts or {}).values())
    for name, call in _each(sources, merged):
        yield name, call() if in_order else call


def _cuts(
    sources: Sources, view: View, used_in: Callable[[str], Sequence[int]], density: float, dtype: torch.dtype
) -> dict[int, trimming.Cut]:
    """Adapter → where its largest entries end, over all modules that it changes; in `dtype` or what is wider."""

    known: dict[str, dict[int, Matrix]] = {}

    def pieces() -> Iterator[dict[int, Matrix]]:
        for name in sources.modules:
            made = known.get(name)
            if made is None:
                updates, used = sources.updates_of(name), used_in(name)
                matrices, _ = view([updates[i] for i in used]) if used else ((), None)
                made = {i: matrix for i, matrix in zip(used, matrices, strict=True) if updates[i].rank}
                if all(isinstance(matrix, Tensor) and matrix.numel() <= _FEW for matrix in made.values()):
                    known[name] = made  # cores of some dozens of directions, which take long to find
            yield made

    return trimming.cuts_of(pieces, density, max(dtype, sources.dtype, key=lambda dtype: dtype.itemsize))


_FEW = 1 << 14
"""Entries of a matrix that is kept for as long as the largest entries are looked for."""


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """What does not fit together is said with the module's name."""
    try:
        yield
    except MismatchError as error:
        raise MismatchError(f"{module}: {error}") from error


def _seeded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a seed of this module's own, so that modules of one shape are not thinned alike."""
    if "seed" not in options:
        return dict(options)
    return {**options, "seed": (int(options["seed"]) * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**32}
