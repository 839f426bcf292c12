"""Every method of merging in one place: a name, and an entry that carries all that is asked of it.

What an entry's function works on is its `Kind`: single entries and sums of matrices (which are rules for the inner
matrices of KnOTS and core space, too), the low-rank updates of one module, a subspace, or the sources as a whole.
Modules are merged in factor space where that is exact, and on a dense ΔW, one module at a time, where a method works on
single entries.
"""

from __future__ import annotations

import functools
import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank, combine, combine_factors
from lora_lab.errors import MismatchError, OptionError, shorten, unknown
from lora_lab.merging import data_driven, elementwise, subspaces, sums, trimming
from lora_lab.merging.rows import Matrices, Matrix, dense
from lora_lab.merging.sources import Sources
from lora_lab.options import check_type
from lora_lab.registry import Registry
from lora_lab.tasks.task import Task

Delta = LowRank | Tensor
"""A merged ΔW, dense where the method works on entries."""

Method = Callable[..., Iterable[tuple[str, Delta | Callable[[], Delta]]]]
"""Function (sources, options) → (module, merged ΔW), or the call still to make where no other module matters."""

Rule = Callable[..., Tensor]
"""Function (matrices, weights, options) → merged matrix."""


def by_updates(function: Callable[..., LowRank]) -> Method:
    """A method of one module's (updates, weights) as a method of all modules."""

    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, Callable[[], Delta]]]:
        def merged(name: str) -> LowRank:
            updates, weights = sources.updates_of(name), sources.weights_of(name)
            used = [i for i, weight in enumerate(weights) if weight]
            if not used:
                return 0.0 * updates[0]
            with _naming(name):
                return function([updates[i] for i in used], [weights[i] for i in used], **_seeded(name, options))

        return _each(sources, merged)

    return method


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

    def method(sources: Sources, *, inner: str, **options: Any) -> Iterator[tuple[str, Delta | Callable[[], Delta]]]:
        bases = {name: options.pop(name, default) for name, default in keywords(subspace).items()}

        def view(updates: Sequence[LowRank]) -> tuple[Matrices, Callable[[Tensor], LowRank]]:
            shared = subspace(updates, **bases)
            return shared.cores, shared.back

        return _by_rule(sources, rule_of(inner), view, options, everyone=False)

    return method


def summed(coefficients: Callable[..., list[float]]) -> Rule:
    """Coefficients of a sum as a rule for matrices."""

    @functools.wraps(coefficients)
    def rule(stack: Matrices, weights: Sequence[float], **options: Any) -> Tensor:
        matrices = [dense(matrix) for matrix in stack]

        def gram() -> Tensor:
            flat = torch.stack([matrix.flatten() for matrix in matrices]).double()
            return flat @ flat.T

        factors = coefficients(gram, weights, **options)
        return torch.stack([matrix * f for matrix, f in zip(matrices, factors, strict=True)]).sum(0)

    return elementwise.checked(rule)


@dataclass(frozen=True)
class Kind:
    """What the function of an entry is given and gives back."""

    method: Callable[[Callable[..., Any]], Method]
    """The function → a method of all modules."""
    rule: Callable[[Callable[..., Any]], Rule] | None = None
    """The function → a rule for matrices, where it can be one inside of a subspace."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options with their defaults that are added to the function's own."""
    dense: bool = False
    """Whether it works on ΔW whole, and gives it whole."""
    pace: float = 30.0
    """About how many nanoseconds a core of 2024 takes: an entry of each ΔW where it is dense, else of the factors."""


SOURCES = Kind(lambda function: function)
"""(sources, options) → (module, merged ΔW) pairs."""
UPDATES = Kind(by_updates)
"""(low-rank updates of one module, their weights, options) → low-rank update."""
MATRICES = Kind(lambda function: by_matrices(elementwise.checked(function)), elementwise.checked, dense=True, pace=10)
"""(matrices of one shape, their weights, options) → matrix."""
ENTRIES = Kind(
    lambda function: by_matrices(elementwise.checked_rows(function)), elementwise.checked_rows, dense=True, pace=5
)
"""The same for what hangs on single entries and their rows alone, so that it takes matrices or their factors."""
SUM = Kind(by_sums, summed, pace=5)
"""(what gives the inner products, weights, options) → coefficients of a sum."""
SUBSPACE = Kind(by_subspace, options={"inner": "ties"}, pace=150)
"""(low-rank updates of one module, options) → `Subspace`, where the option `inner` names the rule."""


@dataclass(frozen=True)
class Merge:
    """A method of merging; the keyword-only arguments of its function are its options."""

    function: Callable[..., Any]
    """The first line of its docstring says what comes out."""
    kind: Kind = SOURCES
    variant: str = ""
    """Which published variant it is."""
    reads_data: bool = False
    """Whether it looks at the tasks of the sources."""
    cost: Callable[[Mapping[str, Any], Sequence[Task]], float] | None = None
    """(options with their defaults, tasks) → about how many forward passes of one example it takes."""
    divisor: Callable[[Sequence[float]], float] | None = None
    """Of weights wᵢ: the d with which it is Σ wᵢΔWᵢ / d without options; None where it is no point of that line."""

    def __call__(self, sources: Sources, **options: Any) -> Iterator[tuple[str, Delta]]:
        """(module, merged ΔW) pairs; options that are not given have their defaults."""
        for name, merged in self.calls(sources, **options):
            yield name, merged() if callable(merged) else merged

    def calls(self, sources: Sources, **options: Any) -> Iterable[tuple[str, Delta | Callable[[], Delta]]]:
        """The same, where a module that hangs on no other is a call that is still to be made, in any thread."""
        return self.kind.method(self.function)(sources, **{**self.kind.options, **options})

    @property
    def about(self) -> str:
        """What comes out, in a line."""
        return (self.function.__doc__ or "").partition("\n")[0]

    @property
    def rule(self) -> Rule | None:
        """The rule for matrices that it is, if it is one."""
        return self.kind.rule(self.function) if self.kind.rule else None

    def defaults(self, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Its options with their defaults, those of the inner rule that is chosen among them."""
        names = {**self.kind.options, **keywords(self.function)}
        if "inner" in self.kind.options:
            inner = {**names, **(options or {})}["inner"]
            names |= {name: value for name, value in keywords(rule_of(inner)).items() if name not in names}
        return names

    def examples_read(self, options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
        """About how many forward passes of one example it takes on these tasks, a backward pass counted as two."""
        return self.cost({**self.defaults(options), **options}, tasks) if self.cost else 0.0


def check(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options to call a method with; OptionError for a method or an option that does not exist."""
    names = MERGES[method].defaults(options)
    for name, value in options.items():
        if name not in names:
            if not names:
                raise OptionError(f"{method} has no options to set")
            raise unknown(f"option of {method}", name, list(names))
        if names[name] is not None:
            check_type(name, value, type(names[name]))
        if isinstance(value, float) and not math.isfinite(value):
            raise OptionError(f"{name} is {value}; a finite number is needed")
    return dict(options)


def rules() -> dict[str, Rule]:
    """Name → rule for matrices, of all methods that are one."""
    return {name: rule for name, merge in MERGES.items() if (rule := merge.rule)}


def rule_of(name: object) -> Rule:
    """The rule for matrices of this name."""
    rule = MERGES[str(name)].rule if str(name) in MERGES else None
    if rule is None:
        raise unknown("inner rule", str(name), rules())
    return rule


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


def cat(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ by concatenation: what PEFT calls cat."""
    return combine(updates, weights)


def factor_average(updates: Sequence[LowRank], weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """λ (Σ wᵢBᵢ)(Σ wᵢAᵢ) / (Σ wᵢ)²: averaged factors, which have cross terms BᵢAⱼ.

    Not an average of ΔW: it hangs on the gauge, and independent adapters lose most of their norm. The literature's
    "fusion". Adapters that leave a module alone count as 0.
    """
    present = [update for update in updates if update.rank]
    if not present:
        return updates[0]
    rank = present[0].rank
    if any(update.rank != rank for update in present):
        raise MismatchError(f"factors of ranks {shorten(u.rank for u in present)} cannot be averaged; ΔW can (average)")
    filled = [
        update if update.rank else LowRank(present[0].A * 0.0, present[0].B * 0.0, update.shape) for update in updates
    ]
    return scale * combine_factors(filled, sums.normalised(weights))


MERGES = Registry(
    "method",
    "lora_lab.merges",
    Merge,
    {
        "task-arithmetic": Merge(sums.task_arithmetic, SUM, "the paper's.", divisor=lambda weights: 1.0),
        "average": Merge(
            sums.average, SUM, "the plain mean, a point on the line of task arithmetic.", divisor=math.fsum
        ),
        "cat": Merge(
            cat, UPDATES, "PEFT's cat, which is task arithmetic by another name.", divisor=lambda weights: 1.0
        ),
        "factor-average": Merge(factor_average, UPDATES, "the CoTo paper's fusion of factors."),
        "slerp": Merge(
            sums.slerp, SUM, "common practice, module by module; of more than two, the Karcher mean is ours."
        ),
        "magnitude": Merge(elementwise.magnitude, ENTRIES, "no paper's: the trimming of TIES without its election."),
        "ties": Merge(
            elementwise.ties,
            ENTRIES,
            "the paper's, trimmed over the whole task vector; on ΔW, where the paper has all trained parameters.",
        ),
        "dare": Merge(elementwise.dare, ENTRIES, "the paper's; on ΔW, where the paper has all trained parameters."),
        "dare-ties": Merge(elementwise.dare_ties, ENTRIES, "the paper's DARE before TIES; nothing is trimmed."),
        "della": Merge(elementwise.della, ENTRIES, "the paper's (MagPrune by rows, then election and fusion)."),
        "breadcrumbs": Merge(elementwise.breadcrumbs, ENTRIES, "the paper's, layer by layer."),
        "knots": Merge(
            subspaces.knots, SUBSPACE, "the paper's KnOTS-TIES, trimmed over the whole vector of all S Vᵢᵀ."
        ),
        "core-space": Merge(
            subspaces.core_space,
            SUBSPACE,
            "with bases=factors the paper's; by default bases that do not hang on the gauge, which are ours.",
        ),
        "lego": Merge(subspaces.lego, UPDATES, "the paper's."),
        "tsv": Merge(subspaces.tsv, UPDATES, "the paper's TSV-M."),
        "iso-c": Merge(subspaces.iso_c, UPDATES, "the paper's, within the span of the factors."),
        "iso-cts": Merge(subspaces.iso_cts, UPDATES, "the paper's, within the span of the factors."),
        "fisher": Merge(
            data_driven.fisher,
            variant="the paper's, on ΔW; its authors' code can normalise, which is normalize=true.",
            reads_data=True,
            cost=data_driven.fisher_cost,
        ),
        "regmean": Merge(
            data_driven.regmean,
            variant="the authors' code's, with means over rows; gram=sum is the paper's formula.",
            reads_data=True,
            cost=data_driven.regmean_cost,
        ),
        "lorahub": Merge(
            data_driven.lorahub,
            variant="ΔW where the paper mixes factors, and COBYLA where it has Shiwa.",
            reads_data=True,
            cost=data_driven.lorahub_cost,
        ),
        "adamerging": Merge(
            data_driven.adamerging,
            variant="the paper's, layer-wise, on validation inputs where it takes test inputs.",
            reads_data=True,
            cost=data_driven.adamerging_cost,
        ),
    },
)
"""Methods of merging by name."""
