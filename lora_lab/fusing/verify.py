"""Whether a checkpoint is a base with adapters in it: weight by weight, and in one sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.bases import same_base
from lora_lab.brief import Brief
from lora_lab.errors import OptionError
from lora_lab.fusing.adding import same_bits
from lora_lab.fusing.changes import Change, Changes
from lora_lab.fusing.checkpoints.layout import Layout
from lora_lab.fusing.fuse import layout_of
from lora_lab.fusing.measuring import RIGHT, Measured, Weight

BYTES_A_SECOND = 400e6
"""About as many of both checkpoints are read and compared, on one core and a plain disk."""
_CLOSE = 0.02
"""How near a factor must be to one that a known mistake makes, as a share of it."""


@dataclass(frozen=True)
class Finding:
    """One parameter that the adapters change, or that changed without them."""

    parameter: str
    kind: str
    """exact, rounding, scaled, missing, transposed, other; head (a whole tensor that is not the adapter's); unnamed
    (changed, and no adapter names it), absent (not in the checkpoint), added (not in the base)."""
    factor: float | None = None
    residual: float | None = None
    norm: float | None = None
    meaning: str = ""
    """What is likely to have happened; of a rounding, that of which dtype."""

    @property
    def right(self) -> bool:
        """Whether it is as it should be."""
        return self.kind in RIGHT


@dataclass(frozen=True, repr=False)
class Verified(Brief):
    """What was found."""

    findings: Sequence[Finding]
    """Of every parameter that the adapters name, and of those others that are not as in the base."""
    unchanged: int
    """Parameters that no adapter names, and that are as in the base."""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether the checkpoint is the base with the adapters in it, up to rounding."""
        return all(finding.right for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        named = [finding for finding in self.findings if finding.kind not in ("unnamed", "absent", "added")]
        if self.right:
            exact = all(finding.kind == "exact" for finding in named)
            rounding = {finding.meaning for finding in named if finding.meaning}
            how = "exactly" if exact else f"up to rounding {rounding.pop()}" if len(rounding) == 1 else "up to rounding"
            return f"yes: base + adapter, {how}, in all {len(named)} parameters that are adapted"
        wrong = Counter((f.kind, f.meaning) for f in self.findings if not f.right)
        parts = []
        for (kind, meaning), count in wrong.most_common(4):
            of = f" of {len(named)}" if kind not in ("unnamed", "absent", "added") else ""
            parts.append(f"{count}{of} {_WORDS[kind]}" + (f" ({meaning})" if meaning else ""))
        return f"no: {'; '.join(parts)}" + ("; and more" if len(wrong) > 4 else "")


_WORDS = {
    "scaled": "have ΔW times a factor",
    "missing": "are as in the base, without ΔW",
    "transposed": "have ΔW transposed",
    "other": "are neither",
    "head": "are not the adapter's whole tensor",
    "unnamed": "changed though no adapter names them",
    "absent": "are not in the checkpoint",
    "added": "are not in the base",
}


def verify(
    base: Path,
    adapters: Sequence[Adapter],
    merged: Path,
    *,
    coefficients: Sequence[float] = (),
    heads: str | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Whether the checkpoint `merged` is `base` + Σ coefficient · ΔW of the adapters; one weight at a time is read.

    Any dtype, sharding or naming of the checkpoint will do that transformers reads. Raises what `Fusion` raises where
    base and adapters do not fit, and FileError for what is no checkpoint.
    """
    if not adapters:
        raise OptionError("no adapter was given")
    if coefficients and len(coefficients) != len(adapters):
        raise OptionError(f"{len(adapters)} adapters and {len(coefficients)} coefficients; one an adapter is needed")
    same_base(adapters, given=True)
    before, after = layout_of(base, adapters), layout_of(merged, adapters)
    changes = Changes(before, adapters, coefficients or None, heads)
    named = set(changes.parameters)
    parameters = list(dict.fromkeys([*before.groups, *before.tied, *changes.parameters, *after.groups]))
    findings, unchanged, cast = [], 0, 0
    for done, name in enumerate(parameters, 1):
        change = changes.of(name) if name in named else Change()
        if change.adds or change.replaces:
            findings.append(_adapted(name, before, after, change, device or torch.device("cpu")))
        else:
            kind, finding = _untouched(name, before, after)
            unchanged, cast = unchanged + (finding is None), cast + (kind == "cast")
            findings += [finding] if finding is not None else []
        if progress:
            progress(done, len(parameters))
    notes = [f"{cast} of the parameters that are as in the base were rounded to another dtype"] if cast else []
    return Verified([_explained(finding, adapters, changes) for finding in findings], unchanged, notes)


def _adapted(name: str, before: Layout, after: Layout, change: Change, device: torch.device) -> Finding:
    if after.shape(name) is None:
        return Finding(name, "absent")
    merged = after.read(name)
    start = change.start(before.read(name) if before.shape(name) is not None else None)
    if start.shape != merged.shape:
        meaning = f"{list(merged.shape)}, and {list(start.shape)} with the adapter"
        return Finding(name, "other" if change.adds else "head", meaning=meaning)
    if not merged.is_floating_point() or merged.itemsize < 2:
        return Finding(name, "other", meaning=f"quantised: {_name(merged.dtype)}")
    if not change.adds:
        kind = _compared(start, merged)
        return Finding(name, {"same": "exact", "cast": "rounding"}.get(kind, "head"))
    found: Measured = Weight(start.contiguous(), merged.contiguous(), change, device).measure()
    meaning = f"of {found.rounding}" if found.rounding else ""
    return Finding(name, found.kind, found.factor, found.residual, found.norm, meaning)


def _untouched(name: str, before: Layout, after: Layout) -> tuple[str, Finding | None]:
    """How a parameter that no adapter names compares with the base's, and what there is to tell of it."""
    shapes = before.shape(name), after.shape(name)
    if shapes[0] is None:
        return "added", Finding(name, "added")
    if shapes[1] is None:
        return "absent", Finding(name, "absent")
    if shapes[0] != shapes[1]:
        return "changed", Finding(name, "unnamed", meaning=f"{list(shapes[1])}, {list(shapes[0])} in the base")
    base, merged = before.read(name), after.read(name)
    kind = _compared(base, merged)
    if kind != "changed":
        return kind, None
    wide = torch.promote_types(base.dtype, torch.float32)
    size = float(torch.linalg.vector_norm(base, dtype=torch.float64))
    off = float(torch.linalg.vector_norm(merged.to(wide) - base, dtype=torch.float64))
    share = off / size if size else math.inf
    return kind, Finding(name, "unnamed", residual=share)


def _compared(base: Tensor, merged: Tensor) -> str:
    """same (to the last bit), cast (the same in another dtype) or changed."""
    if same_bits(base, merged):
        return "same"
    kinds = (merged.dtype, torch.bfloat16, torch.float16)  # it may have been widened again
    return "cast" if any(same_bits(base.to(kind).to(merged.dtype), merged) for kind in kinds) else "changed"


def _explained(finding: Finding, adapters: Sequence[Adapter], changes: Changes) -> Finding:
    """The finding with what a factor is likely to mean."""
    if finding.kind not in ("scaled", "transposed") or finding.factor is None:
        return finding
    factor = finding.factor
    known = next((words for value, words in _known(finding, adapters, changes) if _near(factor, value)), None)
    meaning = f"× {factor:.{4 if round(factor, 2) == 1 else 3}g}" + (f", as if {known}" if known else "")
    return Finding(**{**vars(finding), "meaning": meaning if finding.kind == "scaled" or factor != 1 else ""})


def _known(finding: Finding, adapters: Sequence[Adapter], changes: Changes) -> Iterator[tuple[float, str]]:
    """Factors that known mistakes make, and the mistakes."""
    sites = changes.sites.get(finding.parameter.rpartition(".")[0], [])
    site = sites[0][1] if len(sites) == 1 else None
    if site is not None and site.scale and site.rank:
        root = math.sqrt(site.rank)
        rank_stabilised = adapters[sites[0][0]].config.get("use_rslora") is True
        if not _near(site.scale, 1):
            yield 1 / site.scale, f"the scale alpha / rank = {site.scale:.4g} were left out"
            yield site.scale, f"the scale alpha / rank = {site.scale:.4g} were applied twice"
        if site.rank > 1:
            yield (
                (1 / root, "alpha were divided by the rank, not by its root")
                if rank_stabilised
                else (
                    root,
                    "alpha were divided by the root of the rank",
                )
            )
    yield 2.0, "it were added twice"
    yield -1.0, "it were taken away"
    yield 0.5, "half of it were added"


def _near(factor: float, value: float) -> bool:
    return abs(factor - value) <= _CLOSE * abs(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
