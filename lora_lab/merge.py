"""Adapters merged into one: every method in one place, what it cost, and the file that PEFT loads.

A method is a function of `MERGES`. Those of one module take its updates and weights; they run in factor space where
that is exact, and on a dense ΔW, one module at a time, where they work on single entries.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab import files, fitted, rules, subspaces
from lora_lab.adapter import Adapter, from_updates
from lora_lab.errors import FileError, LoraLabWarning, MismatchError, OptionError, some, unknown
from lora_lab.evaluate import labels_of, task_of
from lora_lab.lowrank import LowRank, combine, combine_factors, factored
from lora_lab.models import base_model
from lora_lab.peft_format import PREFIX
from lora_lab.result import provenance
from lora_lab.rules import RULES, SUMS
from lora_lab.sources import Sources

Merge = Callable[..., Iterable[tuple[str, LowRank | Tensor]]]
"""Function (sources, options) → (module, merged ΔW), dense where the method works on entries."""

HEADS = ("keep-own", "average", "first")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED = 1e-6
"""Relative difference of ΔW, beyond rounding to the file's dtype, at which a written file is refused."""


@dataclass(frozen=True)
class Merged:
    """A merged adapter and how it came to be."""

    adapter: Adapter
    method: str
    options: Mapping[str, Any]
    weights: Any
    error: float
    """Relative Frobenius error of ΔW over all modules, from the rank and the dtype asked for; 0: exact."""
    errors: Mapping[str, float]
    """Module → its relative error."""
    heads: Mapping[str, Mapping[str, Tensor]]
    """With keep-own: label of a source → its own whole tensors, written beside the adapter."""
    absent: Sequence[Sequence[str]]
    """For each source, the modules that it leaves alone, where its ΔW is 0."""


def merge(
    sources: Sources,
    method: str = "task-arithmetic",
    *,
    options: Mapping[str, Any] | None = None,
    coefficient: float = 1.0,
    rank: int | None = None,
    heads: str | None = None,
    dtype: str = "float32",
    trials: Sequence[Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """The adapter that a method of MERGES makes of the sources, times `coefficient`.

    Exact at the rank that the method needs, or cut to `rank` with its error. `heads` says what becomes of heads and
    other whole tensors where the sources differ in them: keep-own (each its own, beside the adapter), average, first.
    `trials` of a search (search.py) go into the record.
    """
    chosen = check(method, options or {})
    if heads is not None and heads not in HEADS:
        raise unknown("way with heads", heads, HEADS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if rank is not None and rank < 1:
        raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
    if not math.isfinite(coefficient):
        raise OptionError(f"the coefficient is {coefficient}; a finite number is needed")
    whole, own = _heads(sources.adapters, heads)
    updates: dict[str, LowRank] = {}
    lost: dict[str, float] = {}
    norms: dict[str, float] = {}
    whole_options = {n: v for n, v in {**defaults(method, chosen), **chosen}.items() if v is not None}
    for done, (name, result) in enumerate(MERGES[method](sources, **whole_options), 1):
        updates[name], lost[name], norms[name] = _finished(result, coefficient, rank, DTYPES[dtype], name, method)
        if progress:
            progress(done, len(sources.modules))
    names = labels_of(sources.adapters)
    total = math.sqrt(math.fsum(norm**2 for norm in norms.values()))
    gone = math.sqrt(math.fsum((lost[name] * norms[name]) ** 2 for name in norms))
    made = {
        "method": method,
        "options": whole_options,
        "coefficient": coefficient,
        "weights": sources.weights.record,
        "rank": rank,
        "heads": heads,
        "dtype": dtype,
        "error": gone / total if total else 0.0,
        "ranks": _range([update.rank for update in updates.values()]),
        "trials": trials,
        "inputs": [{"adapter": n, **_brief(a)} for n, a in zip(names, sources.adapters, strict=True)],
        "absent": {name: len(gone) for name, gone in zip(names, sources.absent, strict=True) if gone},
    }
    adapter = from_updates(updates, like=sources.like, source=f"{method} of {some(names)}")
    if own:  # PEFT would make heads anew that the file does not hold
        saved = [part for part in adapter.config.get("modules_to_save") or [] if any(f".{part}." in k for k in whole)]
        # by its task_type, too, PEFT would look for a head in the file
        headless: dict[str, Any] = {} if saved else {"task_type": None}
        adapter = replace(adapter, config={**adapter.config, "modules_to_save": saved or None, **headless})
    adapter = replace(adapter, tensors={**_in_dtype(adapter, DTYPES[dtype]), **whole}, record=_record(sources, made))
    return Merged(adapter, method, made["options"], made["weights"], made["error"], dict(lost), own, sources.absent)


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


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def save(merged: Merged, path: Path, *, inputs: Sequence[Path] = (), force: bool = False) -> Path:
    """Write the adapter, check that the file gives exactly its ΔW, and put it in its place.

    A folder gets a README.md that tells how it was made, and with keep-own `heads/LABEL.safetensors` for each source.
    """
    files.refuse_existing(path, force=force)
    if path.suffix in (".bin", ".pt", ".pth", ".json"):
        raise OptionError(f"{path}: NAME.safetensors, or a name without an ending for a PEFT folder, is needed")
    lone = path.suffix == ".safetensors"
    if lone and merged.heads:
        raise OptionError(f"{path}: with heads kept apart, -o must name a folder, not a lone file")
    found = provenance()
    made = {**merged.adapter.record["merge"], "versions": found["versions"], "commit": found["commit"]}
    if inputs:
        hashes = [files.file_hash(each) if each.exists() else None for each in inputs]
        made["inputs"] = [{**each, "sha256": h} for each, h in zip(made["inputs"], hashes, strict=True)]
    record = {**merged.adapter.record, "merge": made}
    adapter = replace(merged.adapter, record=record)
    with files.replacing(path) as beside:
        adapter.save(beside)
        if not lone:
            files.write_bytes(beside / "README.md", card(adapter).encode())
            for label, tensors in merged.heads.items():
                (beside / "heads").mkdir(exist_ok=True)
                files.write_safetensors(beside / "heads" / f"{label}.safetensors", tensors, {"format": "pt"})
        _verify(beside, adapter)
    return path


def card(adapter: Adapter) -> str:
    """The model card of a merged adapter."""
    made = adapter.record["merge"]
    lines = ["---", "library_name: peft"]
    if adapter.base_model:
        lines.append(f"base_model: {adapter.base_model}")
    lines += ["tags: [lora, merge, lora-lab]", "---", "", f"# A merge by {made['method']}", ""]
    lines += ["| | |", "|---|---|"]
    options = ", ".join(f"{name} = {value}" for name, value in made["options"].items()) or "none"
    lines.append(f"| options | {options} |")
    lines.append(f"| weights | {words(made['weights'])} |")
    if made["coefficient"] != 1:
        lines.append(f"| coefficient | {made['coefficient']:g} |")
    lines.append(f"| rank | {'as the method needs' if made['rank'] is None else made['rank']} |")
    lines.append(f"| relative error of ΔW | {made['error']:.3g} |")
    if made["heads"]:
        lines.append(f"| heads | {made['heads']} |")
    for version in ("lora-lab", "peft", "torch"):
        if made.get("versions", {}).get(version):
            lines.append(f"| {version} | {made['versions'][version]} |")
    lines += ["", "Merged from:", ""]
    for entry in made["inputs"]:
        task = entry["task"].get("name", entry["task"].get("kind")) if "task" in entry else None
        about = [entry.get("method"), task and f"on {task}", entry.get("sha256") and f"sha256 {entry['sha256']}"]
        lines.append(f"* {entry['adapter']}" + "".join(f", {part}" for part in about if part))
    return "\n".join(lines) + "\n"


def base_of(adapters: Sequence[Adapter], given: str | None) -> Callable[[], nn.Module] | None:
    """What builds the base model that is given, or that the record of an adapter without a plain ΔW leads to."""
    needy = [adapter for adapter in adapters if adapter.why_not_additive is not None]
    if given is not None:
        return lambda: base_model(given, [name for adapter in needy for name in adapter.sites])
    recorded = next((adapter for adapter in needy if adapter.record.get("task")), None)
    return task_of(recorded).build_model if recorded else None


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def words(weights: Any) -> str:
    """Weights as a line of text."""
    if isinstance(weights, Mapping):
        return "; ".join(f"{name}: {', '.join(f'{w:g}' for w in each)}" for name, each in weights.items())
    return ", ".join(w if isinstance(w, str) else f"{w:g}" for w in weights)


def _verify(path: Path, adapter: Adapter) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)  # of modules without a change, by a name that goes away
        found = Adapter.load(path)
    if set(found.updates) != set(adapter.updates):
        raise FileError(f"{path}: the file does not hold the modules that were written; it was not kept")
    for name, update in adapter.updates.items():
        if (found.updates[name] - update).norm() > CHECKED * update.norm():
            raise FileError(f"{path}: the file does not give the ΔW of {name} that was written; it was not kept")


def _finished(
    made: LowRank | Tensor, coefficient: float, rank: int | None, dtype: torch.dtype, name: str, method: str
) -> tuple[LowRank, float, float]:
    """The update as it will be stored, its relative error and its norm."""
    if isinstance(made, Tensor):
        norm = float(made.norm(dtype=torch.float64) if made.dtype == torch.float64 else made.norm()) * abs(coefficient)
        update, error = factored(made, rank)
    else:
        update, error = (made, 0.0) if rank is None or rank >= made.rank else made.truncate(rank)
        if update.rank > min(update.B.shape[0], update.A.shape[1]):
            update = factored(update.delta())[0]
        norm = made.norm() * abs(coefficient)
    if not math.isfinite(norm):
        raise MismatchError(
            f"{method}: ΔW of {name} is not finite: an adapter, a weight or an option is too large for it"
        )
    update = update * coefficient
    if update.rank == 0:  # nothing there, which PEFT has no rank for
        rows, columns = update.B.shape[0], update.A.shape[1]
        update = LowRank(torch.zeros(1, columns), torch.zeros(rows, 1), update.shape)
    wide = torch.float32
    kept = LowRank(update.A.to(dtype).to(wide), update.B.to(dtype).to(wide), update.shape)
    if not (torch.isfinite(kept.A).all() and torch.isfinite(kept.B).all()):
        raise OptionError(
            f"{name} has entries that {str(dtype).removeprefix('torch.')} cannot hold; --dtype float32 can"
        )
    if dtype != wide and norm:
        error = math.hypot(error, (kept - LowRank(update.A.to(wide), update.B.to(wide), update.shape)).norm() / norm)
    return kept, error, norm


def _in_dtype(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    owned = {key for site in adapter.sites.values() for key in site.keys.values()}
    return {key: tensor.to(dtype) for key, tensor in adapter.tensors.items() if key in owned}


def _heads(adapters: Sequence[Adapter], how: str | None) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Whole tensors of the merged adapter, and those of each source that are kept apart."""
    everything = [{key: a.tensors[key] for key in a.others if key.startswith(PREFIX)} for a in adapters]
    keys = sorted({key for each in everything for key in each}, key=lambda key: (-_entries(everything, key), key))
    whole: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for key in keys:
        found = [each.get(key) for each in everything]
        first = next(tensor for tensor in found if tensor is not None)
        if all(t is not None and t.shape == first.shape and torch.equal(t, first) for t in found):
            whole[key] = first
            continue
        if how is None or (how == "average" and _unlike(found)):
            _refuse_heads(adapters, found, key, how)
        if how == "first" and found[0] is not None:
            whole[key] = found[0]
        elif how == "first":
            raise MismatchError(f"{adapters[0].source}: has no {key.removeprefix(PREFIX)}, which others have")
        elif how == "average":
            present = [t.double() for t in found if t is not None]
            whole[key] = (torch.stack(present).sum(0) / len(present)).to(first.dtype)
        else:
            for label, tensor in zip(_labels(adapters), found, strict=True):
                if tensor is not None:
                    apart.setdefault(label, {})[key] = tensor
    return whole, apart


def _entries(everything: Sequence[Mapping[str, Tensor]], key: str) -> int:
    return max(each[key].numel() for each in everything if key in each)


def _unlike(found: Sequence[Tensor | None]) -> bool:
    return len({tensor.shape if tensor is not None else None for tensor in found}) > 1


def _refuse_heads(adapters: Sequence[Adapter], found: Sequence[Tensor | None], key: str, how: str | None) -> None:
    name = key.removeprefix(PREFIX)
    shapes = " and ".join(
        f"{tuple(tensor.shape)} in {adapter.source}" if tensor is not None else f"absent from {adapter.source}"
        for adapter, tensor in zip(adapters, found, strict=True)
    )
    if how == "average":
        raise MismatchError(f"{name} cannot be averaged: it is {shapes}; --heads keep-own or first can be had")
    ways = "keep-own (each its own, beside the merged adapter), average or first"
    if _unlike(found):
        raise MismatchError(f"{name} differs: it is {shapes}; say what becomes of it with --heads keep-own or first")
    raise MismatchError(
        f"{name} {tuple(found[0].shape)} differs between the adapters; --heads {ways} says what "  # type: ignore[union-attr]
        "becomes of it"
    )


def _labels(adapters: Sequence[Adapter]) -> list[str]:
    return [re.sub(r"[^\w.-]+", "_", label).strip("_") for label in labels_of(adapters)]


def _brief(adapter: Adapter) -> dict[str, Any]:
    record = adapter.record
    return {name: record[name] for name in ("task", "method", "seed") if record.get(name) is not None}


def _record(sources: Sources, made: Mapping[str, Any]) -> dict[str, Any]:
    """What all sources agree on, and the merge."""
    records = [adapter.record for adapter in sources.adapters]
    common = {
        name: records[0][name]
        for name in ("task", "method", "base_config")
        if all(name in record and record[name] == records[0].get(name) for record in records)
    }
    return {**common, "merge": dict(made)}


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
            try:
                chosen = [updates[i] for i in used], [weights[i] for i in used]
                yield name, function(*chosen, **_seeded(name, options))
            except MismatchError as error:
                raise MismatchError(f"{name}: {error}") from error

    return method


def dense(rule: Callable[..., Tensor]) -> Merge:
    """A rule for matrices as a method on ΔW itself, one dense module at a time."""

    @functools.wraps(rule)
    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, Tensor]]:
        for name in sources.modules:
            deltas = (update.delta() for update in sources.updates_of(name))
            yield name, rule(deltas, sources.weights_of(name), **_seeded(name, options))

    return method


def summed(coefficients: Callable[..., list[float]]) -> Merge:
    """A weighted sum as a method: exact by concatenation, the coefficients from r × r cores."""

    @functools.wraps(coefficients)
    def method(sources: Sources, **options: Any) -> Iterator[tuple[str, LowRank]]:
        for name in sources.modules:
            updates = sources.updates_of(name)
            gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
            if coefficients is rules.slerp:  # the others are the same whatever is summed
                gram = torch.tensor([[a.inner(b) for b in updates] for a in updates], dtype=torch.float64)
            yield name, combine(updates, coefficients(gram, sources.weights_of(name), **options))

    return method


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
    filled = [update if update.rank else present[0] * 0.0 for update in updates]
    if any(update.rank != rank for update in filled):
        raise MismatchError(f"factors of ranks {some(u.rank for u in present)} cannot be averaged; ΔW can (average)")
    shares = rules.average(torch.zeros(0), weights)
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
    "magnitude": dense(rules.magnitude),
    "ties": dense(rules.ties),
    "dare": dense(rules.dare),
    "dare-ties": dense(rules.dare_ties),
    "della": dense(rules.della),
    "breadcrumbs": dense(rules.breadcrumbs),
    "knots": each(subspaces.knots),
    "core-space": each(subspaces.core_space),
    "lego": each(subspaces.lego),
    "tsv": each(subspaces.tsv),
    "iso-c": each(subspaces.iso_c),
    "iso-cts": each(subspaces.iso_cts),
    **fitted.METHODS,
}
"""Name → method; its keyword-only arguments are its options, its first line says what it is."""

NEEDS_DATA = tuple(fitted.METHODS)
"""Methods that look at the tasks of the sources."""
