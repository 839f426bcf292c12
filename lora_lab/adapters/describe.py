"""What is said of adapters elsewhere: names that tell them apart, their methods, a line or table of each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import TunerError
from lora_lab.escape import visible
from lora_lab.results.tables import html_table

_LONGEST = 60
"""Characters of a name from a file within a line."""


def labels_of(adapters: Sequence[Adapter]) -> list[str]:
    """A different name for each adapter: its label, after the folders that tell it apart where labels are the same."""
    plain = [adapter.label for adapter in adapters]
    folders = [list(Path(adapter.source).parts[-2::-1]) for adapter in adapters]  # the nearest first
    labels = list(plain)
    for i, label in enumerate(plain):
        twins = [j for j, other in enumerate(plain) if other == label and j != i]
        if twins:
            labels[i] = "/".join([*_distinct(folders[i], [folders[j] for j in twins]), label])
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _distinct(folders: Sequence[str], others: Sequence[Sequence[str]]) -> list[str]:
    """The nearest folder for each of the others that tells the two apart; what lies between them is an ellipsis."""
    depths = set()
    for other in others:
        apart = [k for k, folder in enumerate(folders) if k >= len(other) or other[k] != folder]
        depths.update(apart[:1])
    shown: list[str] = []
    for depth in sorted(depths, reverse=True):
        shown.append(folders[depth])
        if depth > 0 and depth - 1 not in depths:
            shown.append("…")
    return shown


def method_of(adapter: Adapter, label: str) -> str:
    """The training method that an adapter records, else its own label: adapters of unknown methods are no group."""
    return str(adapter.record.get("method") or label)


def described(adapter: Adapter) -> dict[str, Any]:
    """What a result's parameters say of an adapter: label, method, seed, ‖ΔW‖ (None where there is no ΔW)."""
    try:
        norm = adapter.total_norm
    except TunerError:
        norm = None
    return {
        "label": adapter.label,
        "method": adapter.record.get("method"),
        "seed": adapter.record.get("seed"),
        "norm": norm,
    }


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A hash of every bit of some tensors, in order, with their dtypes and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def one_line(adapter: Adapter) -> str:
    """What the adapter is, in a line without control characters: label, tuner, ranks, modules, base, training."""
    record = adapter.record
    task = record.get("task")
    name = task.get("name", task.get("kind")) if isinstance(task, Mapping) else None
    told = [
        ("trained by", record.get("method")),
        ("on", name),
        ("with seed", record.get("seed")),
    ]
    training = " ".join(f"{words} {_cut(value)}" for words, value in told if value is not None)
    ranks = _range(site.rank for site in adapter.sites.values())
    count = len(adapter.sites)
    of_rank = f" of rank {ranks}" if ranks else ""
    base = f" of {_cut(adapter.base_model)}" if adapter.base_model else ""
    what = f"{_cut(adapter.tuner)}{of_rank} in {count} module{'s' * (count != 1)}{base}"
    return f"{_cut(adapter.label)}: {what}{', ' * bool(training)}{training}"


def html_of(adapter: Adapter) -> str:
    """A small table for notebooks, a row for each type of module; the norm is that of its modules together."""
    types: dict[str, list[str]] = {}
    for name in adapter.sites:
        types.setdefault(name.rpartition(".")[2], []).append(name)
    norms = {} if adapter.why_not_additive else {name: update.norm() for name, update in adapter.updates.items()}
    rows = [
        (
            kind,
            len(names),
            _range(adapter.sites[name].rank for name in names) or None,
            sum(adapter.tensors[key].numel() for name in names for key in adapter.sites[name].keys.values()),
            math.hypot(*(norms[name] for name in names)) if norms else None,
        )
        for kind, names in types.items()
    ]
    return html_table(one_line(adapter), ("type", "modules", "rank", "parameters", "‖ΔW‖"), rows)


def _cut(value: object) -> str:
    text = visible(str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _range(ranks: Iterable[int | None]) -> str:
    positive = [rank for rank in ranks if rank]
    low, high = min(positive, default=0), max(positive, default=0)
    return f"{low} to {high}" if low != high else str(high or "")
