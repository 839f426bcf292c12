"""Every method of merging in one place: a name, and an entry that carries all that is asked of it.

What an entry's function works on is its `Kind`: single entries and sums of matrices (which are rules for the inner
matrices of KnOTS and core space, too), the low-rank updates of one module, a subspace, or the sources as a whole.
Modules are merged in factor space where that is exact, and on a dense ΔW, one module at a time, where a method works on
single entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_lab.errors import OptionError, unknown
from lora_lab.merging.kinds import (
    CALIBRATION,
    ENTRIES,
    SIDED_UPDATES,
    SOURCES,
    SUBSPACE,
    SUM,
    UPDATES,
    Delta,
    Kind,
    Rule,
    keywords,
)
from lora_lab.merging.rules import (
    calibrating,
    data_driven,
    elementwise,
    factors,
    interference,
    learned,
    subspaces,
    sums,
)
from lora_lab.merging.sources import Sources
from lora_lab.options import check_type
from lora_lab.registry import Registry
from lora_lab.tasks.task import Task

DATA = ("none", "inputs", "labels")
"""What of the tasks' examples a method looks at: nothing, the inputs alone, or their labels, too."""


@dataclass(frozen=True)
class Merge:
    """A method of merging; the keyword-only arguments of its function are its options."""

    function: Callable[..., Any]
    """The first line of its docstring says what comes out."""
    kind: Kind = SOURCES
    variant: str = ""
    """Which published variant it is."""
    source: str = ""
    """Where it was published."""
    data: str = "none"
    """What of the tasks' examples it looks at, one of DATA."""
    formula: str = ""
    """What comes out of a module's ΔWᵢ = BᵢAᵢ with weights wᵢ, i = 1 … T, λ = scale; `inner` is the method within."""
    gauge_free: bool = True
    """Whether any factors (BR, R⁻¹A) of one ΔW give the same merge, with the options at their defaults."""
    cost: Callable[[Mapping[str, Any], Sequence[Task]], float] | None = None
    """(options with their defaults, tasks) → about how many forward passes of one example it takes."""
    divisor: Callable[[Sequence[float]], float] | None = None
    """Of weights wᵢ: the d with which it is Σ wᵢΔWᵢ / d without options; None where it is no point of that line."""

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise unknown("kind of data", self.data, DATA)

    def __call__(self, sources: Sources, **options: Any) -> Iterator[tuple[str, Delta]]:
        """(module, merged ΔW) pairs; options that are not given have their defaults."""
        for name, merged in self.calls(sources, **options):
            yield name, merged() if callable(merged) else merged

    def calls(self, sources: Sources, **options: Any) -> Iterable[tuple[str, Delta | Callable[[], Delta]]]:
        """The same, where a module that hangs on no other is a call that is still to be made, in any thread."""
        given = {**self.kind.options, **options}
        if "inner" in self.kind.options:
            given["inner"] = self.within(given["inner"])
        return self.kind.method(self.function)(sources, **given)

    def within(self, name: object) -> Merge:
        """The method of this name that merges within this one; OptionError for one that cannot."""
        entry: Merge | None = MERGES.get(name)
        if entry is None or not self.kind.takes(entry):
            raise unknown("inner rule", str(name), [n for n, other in MERGES.items() if self.kind.takes(other)])
        return entry

    @property
    def reads_data(self) -> bool:
        """Whether it looks at the tasks of the sources."""
        return self.data != "none"

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
            hidden = {*names, *self.kind.without}
            of_inner = keywords(self.within(inner).function)
            names |= {name: value for name, value in of_inner.items() if name not in hidden}
        return names

    def kind_with(self, options: Mapping[str, Any]) -> Kind:
        """The kind that these options make of it: what changes updates alone works as the method within it does."""
        if not self.kind.passes_on:
            return self.kind
        return self.within({**self.defaults(options), **options}["inner"]).kind

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


MERGES = Registry(
    "method",
    "lora_lab.merges",
    Merge,
    {
        "task-arithmetic": Merge(
            sums.task_arithmetic,
            SUM,
            "the paper's.",
            source="Ilharco et al. 2023, arXiv:2212.04089",
            formula="λ Σ wᵢΔWᵢ",
            divisor=lambda weights: 1.0,
        ),
        "average": Merge(
            sums.average,
            SUM,
            "the plain mean, a point on the line of task arithmetic.",
            source="Wortsman et al. 2022, arXiv:2203.05482",
            formula="λ Σ wᵢΔWᵢ / Σ wᵢ",
            divisor=math.fsum,
        ),
        "cat": Merge(
            factors.cat,
            UPDATES,
            "PEFT's cat, which is task arithmetic by another name.",
            source="PEFT, add_weighted_adapter",
            formula="Σ wᵢΔWᵢ = [w₁B₁ … w_TB_T][A₁; …; A_T]",
            divisor=lambda weights: 1.0,
        ),
        "factor-average": Merge(
            factors.factor_average,
            UPDATES,
            "the CoTo paper's fusion of factors.",
            source="Zhuang et al. 2025, arXiv:2506.05713",
            formula="λ (Σ wᵢBᵢ)(Σ wᵢAᵢ) / (Σ wᵢ)²",
            gauge_free=False,
        ),
        "procrustes-mean": Merge(
            factors.procrustes_mean,
            replace(UPDATES, pace=1000),  # likewise
            "ours; near to GeoMerge (arXiv:2604.27155), whose metric is another.",
            source="Gower 1975, doi:10.1007/BF02291478",
            formula="λ Z̄_top Z̄_botᵀ, Z̄ = Σ wᵢZᵢRᵢ / Σ wᵢ, Zᵢ = [Uᵢ√Sᵢ; Vᵢ√Sᵢ], Rᵢ orthogonal",
        ),
        "robustmerge": Merge(
            factors.robustmerge,
            SIDED_UPDATES,
            "the authors' code's; factors=aligned, which hangs on no gauge, is ours.",
            source="Zeng et al. 2025, arXiv:2502.17159",
            formula="λBA, A = 2 Σ A'ᵢ, each column k of B: Bₖ = 2 Σ cᵢₖwᵢB'ᵢₖ / Σ cᵢₖ",
            gauge_free=False,
        ),
        "slerp": Merge(
            sums.slerp,
            SUM,
            "common practice, module by module; of more than two, the Karcher mean is ours.",
            source="Shoemake 1985, doi:10.1145/325165.325242",
            formula="λ n (sin((1 − t)θ) u₁ + sin(tθ) u₂) / sin θ, uᵢ = ΔWᵢ / ‖ΔWᵢ‖, θ their angle, t = w₂ / Σ wᵢ",
        ),
        "magnitude": Merge(
            elementwise.magnitude,
            ENTRIES,
            "no paper's: the trimming of TIES without its election.",
            source="Yadav et al. 2023, arXiv:2306.01708",
            formula="λ Σ wᵢTᵢ, Tᵢ the share density of largest entries of ΔWᵢ, else 0",
        ),
        "ties": Merge(
            elementwise.ties,
            ENTRIES,
            "the paper's, trimmed over the whole task vector; on ΔW, where the paper has all trained parameters.",
            source="Yadav et al. 2023, arXiv:2306.01708",
            formula="λ Σ wᵢTᵢ / Σ |wᵢ| of each entry, over the i with the sign of Σ wᵢTᵢ; Tᵢ as in magnitude",
        ),
        "dare": Merge(
            elementwise.dare,
            ENTRIES,
            "the paper's; on ΔW, where the paper has all trained parameters.",
            source="Yu et al. 2023, arXiv:2311.03099",
            formula="λ Σ wᵢ mᵢ∘ΔWᵢ / p, entries of mᵢ 1 with chance p = density, else 0",
        ),
        "dare-ties": Merge(
            elementwise.dare_ties,
            ENTRIES,
            "the paper's DARE before TIES; nothing is trimmed.",
            source="Yu et al. 2023, arXiv:2311.03099",
            formula="as ties, of Tᵢ = mᵢ∘ΔWᵢ / p as in dare",
        ),
        "della": Merge(
            elementwise.della,
            ENTRIES,
            "the paper's (MagPrune by rows, then election and fusion).",
            source="Deep et al. 2024, arXiv:2406.11617",
            formula="as ties, of Tᵢ = mᵢ∘ΔWᵢ / pᵢ, mᵢ 1 with chance pᵢ, which rises with the size of the entry",
        ),
        "breadcrumbs": Merge(
            elementwise.breadcrumbs,
            ENTRIES,
            "the paper's, layer by layer.",
            source="Davari & Belilovsky 2023, arXiv:2312.06795",
            formula="λ Σ wᵢTᵢ, Tᵢ the share density of largest entries behind the share gamma of the very largest",
        ),
        "knots": Merge(
            subspaces.knots,
            SUBSPACE,
            "the paper's KnOTS-TIES, trimmed over the whole vector of all S Vᵢᵀ.",
            source="Stoica et al. 2024, arXiv:2410.19735",
            formula="U inner(UᵀΔW₁, …, UᵀΔW_T), U the left singular vectors of [ΔW₁ … ΔW_T]",
        ),
        "core-space": Merge(
            subspaces.core_space,
            SUBSPACE,
            "with bases=factors the paper's; by default bases that do not hang on the gauge, which are ours.",
            source="Panariello et al. 2025, arXiv:2509.17786",
            formula="U inner(UᵀΔW₁V, …, UᵀΔW_TV) Vᵀ, U and V bases of all columns and all rows",
        ),
        "ctm": Merge(
            subspaces.ctm,
            replace(SUBSPACE, pace=700),  # by turns, with a dozen rounds or hundreds
            "the authors' code's.",
            source="He et al. 2026, arXiv:2606.03723",
            formula="UP inner(PᵀM₁Q, …, PᵀM_TQ) (VQ)ᵀ, Mᵢ = UᵀΔWᵢV, P and Q of `rank` columns",
        ),
        "pico": Merge(
            calibrating.pico,
            CALIBRATION,
            "with calibration=raw the paper's; by default of balanced factors, which hang on no gauge: ours.",
            source="Tang & Yang 2026, arXiv:2604.16826",
            formula="γ inner(C ΔW₁, …, C ΔW_T), C = U diag(α) Uᵀ, [B₁ … B_T] = U diag(σ) Vᵀ",
        ),
        "lego": Merge(
            subspaces.lego,
            UPDATES,
            "the paper's.",
            source="Zhao et al. 2024, arXiv:2409.16167",
            formula="λ √(r/K) Σ bₖaₖᵀ, aₖ and bₖ the means of K clusters of all rank-1 terms",
            gauge_free=False,
        ),
        "tsv": Merge(
            subspaces.tsv,
            UPDATES,
            "the paper's TSV-M.",
            source="Gargiulo et al. 2024, arXiv:2412.00081",
            formula="λ P(U) diag(w₁S₁, …, w_TS_T) P(V)ᵀ, P(X) = X(XᵀX)^(−½), triplets U, S, V of all ΔWᵢ side by side",
        ),
        "iso-c": Merge(
            subspaces.iso_c,
            UPDATES,
            "the paper's, within the span of the factors.",
            source="Marczak et al. 2025, arXiv:2502.04959",
            formula="λ mean(S) UVᵀ, Σ wᵢΔWᵢ = USVᵀ",
        ),
        "iso-cts": Merge(
            subspaces.iso_cts,
            UPDATES,
            "the paper's, within the span of the factors.",
            source="Marczak et al. 2025, arXiv:2502.04959",
            formula="λ mean(S) P(U) P(V)ᵀ, triplets of Σ wᵢΔWᵢ, and beside them those of each wᵢΔWᵢ; P as in tsv",
        ),
        "wudi": Merge(
            interference.wudi,
            UPDATES,
            "the paper's objective, at its minimum, or after plain gradient steps where it has Adam's.",
            source="Cheng et al. 2025, arXiv:2503.08099",
            formula="λ argmin over W of Σ ‖(W − wᵢΔWᵢ)ΔWᵢᵀ‖² / ‖ΔWᵢ‖²",
        ),
        "fisher": Merge(
            data_driven.fisher,
            variant="the paper's, on ΔW; its authors' code can normalise, which is normalize=true.",
            source="Matena & Raffel 2021, arXiv:2111.09832",
            formula="λ Σ wᵢFᵢ∘ΔWᵢ / Σ wᵢFᵢ, Fᵢ = mean of Σ p(y|x) (∂ log p(y|x) / ∂W)²",
            data="inputs",
            cost=data_driven.fisher_cost,
        ),
        "regmean": Merge(
            data_driven.regmean,
            variant="the authors' code's, with means over rows; gram=sum is the paper's formula.",
            source="Jin et al. 2022, arXiv:2212.09849",
            formula="λ Σ ΔWᵢwᵢGᵢ (Σ wᵢGᵢ)⁻¹, Gᵢ = XᵢᵀXᵢ of the module's inputs on task i",
            data="inputs",
            cost=data_driven.regmean_cost,
        ),
        "lorahub": Merge(
            data_driven.lorahub,
            variant="ΔW where the paper mixes factors, and COBYLA where it has Shiwa.",
            source="Huang et al. 2023, arXiv:2307.13269",
            formula="λ Σ cᵢwᵢΔWᵢ, c = argmin of the validation loss + penalty · mean|cᵢ|",
            data="labels",
            cost=data_driven.lorahub_cost,
        ),
        "adamerging": Merge(
            learned.adamerging,
            variant="the paper's, layer-wise, on validation inputs where it takes test inputs.",
            source="Yang et al. 2023, arXiv:2310.02575",
            formula="λ Σ cᵢwᵢΔWᵢ, cᵢ = argmin of the entropy of predictions, for each module",
            data="inputs",
            cost=learned.learning_cost,
        ),
        "nsc": Merge(
            learned.nsc,
            variant="the authors' code's, on all adapted layers where it has some late ones.",
            source="Lee et al. 2026, arXiv:2603.26317",
            formula="λ Σ cᵢwᵢΔWᵢ, cᵢ = argmin of ‖(I − Pᵢ)x‖ / ‖x‖, Pᵢ the projection onto the rows of Aᵢ",
            data="inputs",
            cost=learned.learning_cost,
        ),
        "ziplora": Merge(
            learned.ziplora,
            variant="the paper's, of logits where it has denoised images, and of any number of adapters.",
            source="Shah et al. 2023, arXiv:2311.13600",
            formula="λ Σ wᵢΔWᵢ diag(mᵢ), m = argmin of ‖logits − those of the task's adapter‖² + penalty · |mᵢ∘mⱼ|",
            data="inputs",
            cost=learned.ziplora_cost,
        ),
        "cat-learned": Merge(
            learned.cat_learned,
            variant="the paper's, from equal shares; free=true, without its sum of 1, is ours.",
            source="Prabhakar et al. 2024, arXiv:2410.13025",
            formula="λ Σ cᵢwᵢΔWᵢ, c = softmax(z), z = argmin of the loss on labelled examples, for each module",
            data="labels",
            cost=learned.learning_cost,
        ),
    },
)
"""Methods of merging by name."""
