"""What the verbs on files of weights say as JSON: not results, but documented like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.schema import column


@dataclass
class MergeReport:
    """What was merged, and how."""

    path: str = column("the adapter that was written")
    method: str = column("name of the merge")
    options: dict[str, Any] = column("its options")
    coefficient: float = column("factor of the merged ΔW")
    weights: list[Any] | dict[str, Any] = column("weight of each adapter, or of each of its blocks")
    rank: int | None = column("the rank asked for; null for the one that the merge needs")
    exact: bool = column("whether it was asked for that nothing be cut")
    heads: str | None = column("how trained heads were treated")
    dtype: str = column("type of the tensors written")
    error: float = column("‖ΔW cut or rounded away‖ / ‖ΔW‖ over all modules", "share")
    ranks: str = column("ranks of the modules, from and to")
    trials: list[Any] | None = column("what a search has tried; null without one")
    inputs: list[Any] = column("name, task, method, seed and hash of each adapter")
    absent: dict[str, Any] = column("adapter → modules that it leaves alone")
    versions: dict[str, Any] = column("versions of Python and of the packages that numbers hang on")
    commit: str | None = column("commit of the checkout that it ran from")
    errors: dict[str, Any] = column("module → ‖ΔW cut away‖ / ‖ΔW‖", "share")
    changes: list[Any] = column("what was changed for the server that it is written for")
    advice: list[Any] = column("how that server is to be started")


@dataclass
class MergeMethodReport:
    """A method of merging, of all that there are."""

    name: str = column("name of the method")
    about: str = column("what comes out, in a line")
    formula: str = column("the same as a formula; empty of a method that tells none")
    works_on: str = column("what it works on: a weighted sum, factors, single entries, shared bases …")
    options: dict[str, Any] = column("its options, each with its default; null is none")
    data: str = column("what of the tasks' examples it looks at: none, inputs, or labels")
    gauge_free: bool = column(
        "whether all factors (BR, R⁻¹A) of one ΔW give the same merge, with the options at their defaults"
    )
    source: str = column("where it was published")
    variant: str = column("which published variant it is, and what is ours")


@dataclass
class PruneReport:
    """What was pruned, and what it cost."""

    path: str = column("the adapter that was written")
    modules: list[Any] = column("modules kept, and there before")
    ranks: list[Any] | None = column("sum of the ranks kept, and before; null of an adapter without ranks")
    sparsity: float = column("share of the entries of ΔW that are 0; null where none was asked for", "share")
    error: float = column("‖ΔW taken away‖ / ‖ΔW‖ over all modules", "share")
    errors: dict[str, Any] = column("module → ‖ΔW taken away‖ / ‖ΔW‖", "share")
    intruders: dict[str, Any] | None = column("module → its intruders, of those that have any; null without intruders")
    cut: float = column("‖exact − written‖ / ‖exact‖ of ΔW with smaller intruders; null without intruders", "share")
    bytes: list[Any] = column("size of the tensors before and after", "bytes")
    changes: list[Any] = column("what was changed for the server that it is written for")
    advice: list[Any] = column("how that server is to be started")


@dataclass
class RecordReport:
    """What an adapter's file records now."""

    path: str = column("the adapter")
    record: dict[str, Any] = column("how it came to be: task, method, seed …")
    dropped: list[Any] = column("keys of a stranger's record that were not taken over")


@dataclass
class FuseReport:
    """What was fused, and what rounding took."""

    path: str = column("the folder that was written")
    base: str = column("the base that it is made of")
    adapters: list[Any] = column("labels of the adapters")
    coefficients: list[Any] = column("factor of each adapter's ΔW")
    parameters: int = column("parameters that the adapters change")
    error: float = column("‖stored − (W + ΔW)‖ / ‖ΔW‖ over all parameters: what rounding took", "share")
    errors: dict[str, Any] = column("parameter → the same for it", "share")
    notes: list[Any] = column("what is otherwise than in the base, in words")
    bytes: int = column("size of the tensors", "bytes")
    files: list[Any] = column("names of the files in the folder")
    resumed: int = column("files that an earlier run had finished")


@dataclass
class VerifyReport:
    """Whether a checkpoint is a base with adapters in it."""

    path: str = column("the checkpoint in question")
    right: bool = column("whether it is, up to rounding")
    verdict: str = column("the answer in one sentence")
    unchanged: int = column("parameters that no adapter names, and that are as in the base")
    notes: list[Any] = column("what else there is to tell, in words")
    findings: list[Any] = column(
        "of each parameter that adapters name or that changed: parameter, kind (exact, rounding, scaled, missing, "
        "transposed, other, head, unnamed, absent, added), factor of ΔW, residual ‖W' − W − ΔW‖ / ‖ΔW‖, norm ‖ΔW‖, "
        "meaning, right"
    )


@dataclass
class ExtractReport:
    """Which adapter was found between two checkpoints."""

    path: str = column("the adapter that was written")
    modules: int = column("modules of it")
    ranks: dict[str, Any] = column("module → its rank")
    error: float = column("‖difference − ΔW‖ / ‖difference‖ over these modules", "share")
    errors: dict[str, Any] = column("module → the same for it", "share")
    left: list[Any] = column(
        "of each parameter that differs and is in no factor: parameter, why, share ‖difference‖ / ‖W‖, whole (whether "
        "the adapter has the tuned tensor)"
    )
    equal: int = column("parameters that are the same in both, up to rounding")
    bytes: int = column("size of the adapter's tensors", "bytes")


@dataclass
class ConvertReport:
    """What was converted, and what the other format made necessary."""

    path: str = column("the adapter that was written")
    read: str = column("format that was read")
    written: str = column("format that was written")
    tuner: str = column("type of the adapter, as PEFT names it")
    modules: int = column("number of its modules")
    ranks: list[Any] = column("smallest and largest rank; empty of a tuner without ranks")
    dtypes: list[Any] = column("types of the factors written")
    error: float = column("‖ΔW rounded away‖ / ‖ΔW‖ over all modules; 0 unless a type was asked for", "share")
    changes: list[Any] = column("what the format cannot carry, or holds in another way")
    advice: list[Any] = column("how the server is to be started that it is written for")


@dataclass
class ModuleOfAdapter:
    """One module of an adapter."""

    name: str = column("its name in the base model")
    type: str = column("linear, embedding, conv2d …; of another tuner its name")
    rank: int | None = column("rank of its factors; null where it has none")
    scale: float = column("what B A is multiplied by: lora_alpha / rank, with rsLoRA lora_alpha / √rank")
    dtype: str = column("type of its tensors")
    shape: list[Any] | None = column("shape of ΔW")
    norm: float = column("‖ΔW‖; null where it has none without the base model")
    effective_rank: float = column("exp of the entropy of ΔW's singular values, as shares of their sum")


@dataclass
class InspectReport:
    """What is in an adapter file; of several files, a list of these."""

    path: str = column("what was asked for")
    schema: int = column("version of this report")
    ok: bool = column("whether it can be used")
    problems: list[Any] = column("why not: one line each, with the tensor or field and what would be right")
    notes: list[Any] = column("what was assumed, left out or is odd")
    format: str | None = column("how it lies there; null of what could not be read")
    tuner: str | None = column("type of the adapter, as PEFT names it")
    base_model: str | None = column("the base model that its configuration names")
    modules: list[ModuleOfAdapter] = column("what it adapts")
    other_tensors: list[Any] = column("tensors of no tuner layer: heads, biases, embeddings")
    total_norm: float = column("‖ΔW‖ over all modules")
    hash: str | None = column(
        "hash of ΔW that no change of gauge (BR, R⁻¹A) changes, to 4 digits; null of what is no LoRA, or not usable"
    )
    record: dict[str, Any] = column("how it came to be, as its file says")


@dataclass
class CheckOfInstallation:
    """One thing that was looked at."""

    group: str = column("installation, package, extra NAME, device or folder")
    name: str = column("what was looked at")
    status: str = column(
        "right or broken; of an extra missing or outside (of the supported versions), which break nothing else"
    )
    found: str = column("what is there")
    wanted: str = column("versions that are supported, or what it is for")


@dataclass
class DoctorReport:
    """Whether the installation can work."""

    ok: bool = column("whether nothing is broken")
    checks: list[CheckOfInstallation] = column("everything that was looked at")


REPORTS = {
    "convert": ConvertReport,
    "doctor": DoctorReport,
    "extract": ExtractReport,
    "record": RecordReport,
    "fuse": FuseReport,
    "inspect": InspectReport,
    "merge": MergeReport,
    "merge-methods": MergeMethodReport,
    "prune": PruneReport,
    "verify": VerifyReport,
}
"""Name of the verb, or of what a verb lists → the class of its report."""
