"""Adapters merged into one by a method of methods.py: what it cost, and the file that PEFT loads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab import escape, files
from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.describe import labels_of
from lora_lab.adapters.lowrank import LowRank, factored, is_finite
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.adapters.whole import HEADS, merge_heads, token_settings
from lora_lab.errors import FileError, LoraLabWarning, MismatchError, OptionError, some, unknown
from lora_lab.files.ownership import METADATA
from lora_lab.files.trust import Origin
from lora_lab.hub import base_model
from lora_lab.merging.methods import MERGES, check, defaults
from lora_lab.merging.sources import Sources
from lora_lab.results.result import provenance
from lora_lab.tasks.choosing import task_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKED = 1e-6
"""Difference of ΔW, relative to the size of its factors, at which a written file is refused."""
_CANCELLED = 1e-12
"""Norm of ΔW, relative to the size of its factors, at which it is rounding and stands for 0."""


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
    require_shared_modules(sources.adapters)
    if heads is not None and heads not in HEADS:
        raise unknown("way with heads", heads, HEADS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if rank is not None and rank < 1:
        raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
    if not math.isfinite(coefficient):
        raise OptionError(f"the coefficient is {coefficient}; a finite number is needed")
    whole = merge_heads(sources.adapters, _file_names(sources.adapters), heads)
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
    adapter = replace(adapter, config=token_settings(adapter.config, whole.tokens))
    if whole.apart:  # PEFT would make heads anew that the file does not hold
        parts = adapter.config.get("modules_to_save") or []
        saved = [part for part in parts if any(f".{part}." in key for key in whole.tensors)]
        # by its task_type, too, PEFT would look for a head in the file
        headless: dict[str, Any] = {} if saved else {"task_type": None}
        adapter = replace(adapter, config={**adapter.config, "modules_to_save": saved or None, **headless})
    tensors = {**_in_dtype(adapter, DTYPES[dtype]), **whole.tensors}
    adapter = replace(adapter, tensors=tensors, record=_record(sources, made), origin=_origin(sources.adapters))
    return Merged(
        adapter, method, made["options"], made["weights"], made["error"], dict(lost), whole.apart, sources.absent
    )


def save(merged: Merged, path: Path, *, inputs: Sequence[Path] = (), force: bool = False) -> Path:
    """Write the adapter, check that the file gives exactly its ΔW, and put it in its place.

    A folder gets a README.md that tells how it was made, and with keep-own `heads/LABEL.safetensors` for each source.
    """
    files.refuse_existing(path, force=force, inputs=inputs)
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
                mark = {"format": "pt", f"{METADATA}head": label}
                files.write_safetensors(beside / "heads" / f"{label}.safetensors", tensors, mark)
        _verify(beside, adapter)
    return path


def card(adapter: Adapter) -> str:
    """The model card of a merged adapter."""
    import yaml

    made = adapter.record["merge"]
    front: dict[str, Any] = {
        "library_name": "peft",
        **({"base_model": adapter.base_model} if adapter.base_model else {}),
    }
    front["tags"] = ["lora", "merge", "lora-lab"]
    lines = [
        "---",
        *yaml.safe_dump(front, sort_keys=False, default_flow_style=None, width=4096).splitlines(),
        "---",
        "",
    ]
    lines += [f"# A merge by {made['method']}", "", "| | |", "|---|---|"]
    rows = {"options": ", ".join(f"{name} = {value}" for name, value in made["options"].items()) or "none"}
    rows["weights"] = words(made["weights"])
    if made["coefficient"] != 1:
        rows["coefficient"] = f"{made['coefficient']:g}"
    rows["rank"] = "as the method needs" if made["rank"] is None else str(made["rank"])
    rows["relative error of ΔW"] = f"{made['error']:.3g}"
    if made["heads"]:
        rows["heads"] = made["heads"]
    rows |= {
        name: made["versions"][name] for name in ("lora-lab", "peft", "torch") if made.get("versions", {}).get(name)
    }
    lines += [f"| {name} | {escape.markdown(text)} |" for name, text in rows.items()]
    lines += ["", "Merged from:", ""]
    for entry in made["inputs"]:
        task = entry.get("task")
        named = task.get("name", task.get("kind")) if isinstance(task, Mapping) else None
        about = [entry.get("method"), named and f"on {named}", entry.get("sha256") and f"sha256 {entry['sha256']}"]
        lines.append(f"* {escape.markdown(', '.join(str(part) for part in (entry['adapter'], *about) if part))}")
    return "\n".join(lines) + "\n"


def base_of(
    adapters: Sequence[Adapter], given: str | None, *, trust_record: bool = False
) -> Callable[[], nn.Module] | None:
    """What builds the base model that is given, or that the record of an adapter without a plain ΔW leads to."""
    needy = [adapter for adapter in adapters if adapter.why_not_additive is not None]
    if given is not None:
        return lambda: base_model(given, [name for adapter in needy for name in adapter.sites])
    recorded = next((adapter for adapter in needy if adapter.record.get("task")), None)
    return task_of(recorded, trust_record=trust_record).build_model if recorded else None


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
        if not (found.updates[name] - update).norm() <= CHECKED * update.bound():  # of NaN, too
            raise FileError(f"{path}: the file does not give the ΔW of {name} that was written; it was not kept")


def _finished(
    made: LowRank | Tensor, coefficient: float, rank: int | None, dtype: torch.dtype, name: str, method: str
) -> tuple[LowRank, float, float]:
    """The update as it will be stored, its relative error and its norm."""
    too_large = f"{method}: ΔW of {name} is not finite: an adapter, a weight or an option is too large for it"
    if not is_finite(made):
        raise MismatchError(too_large)
    if isinstance(made, Tensor):
        norm = float(made.norm(dtype=torch.float64) if made.dtype == torch.float64 else made.norm()) * abs(coefficient)
        update, error = factored(made, rank)
    else:
        update, error = (made, 0.0) if rank is None or rank >= made.rank else made.truncate(rank)
        if update.rank > min(update.B.shape[0], update.A.shape[1]):
            update = factored(update.delta())[0]
        norm = made.norm() * abs(coefficient)
    update = update * coefficient
    if not is_finite(update):
        raise MismatchError(too_large)
    if norm <= _CANCELLED * update.bound():  # or no factors at all, which PEFT has no rank for
        norm = 0.0
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


def _file_names(adapters: Sequence[Adapter]) -> list[str]:
    """A different name for a file for each adapter; letters of one case are one letter to some file systems."""
    names = [escape.file_name(label) for label in labels_of(adapters)]
    if len({name.lower() for name in names}) == len(names):
        return names
    return [f"{name}-{i}" for i, name in enumerate(names)]


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


def _origin(adapters: Sequence[Adapter]) -> Origin:
    """Of what is merged of these: the user's own where every task among their records is."""
    return Origin.of_all(adapter.origin for adapter in adapters if adapter.record.get("task"))
