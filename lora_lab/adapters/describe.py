"""What is said of adapters elsewhere: names that tell them apart, their methods, and all that their scores hang on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import TunerError


def labels_of(adapters: Sequence[Adapter]) -> list[str]:
    """A different name for each adapter: its label, with the folder before it where labels are the same."""
    labels = [adapter.label for adapter in adapters]
    for i, adapter in enumerate(adapters):
        if [a.label for a in adapters].count(adapter.label) > 1:
            labels[i] = "/".join(Path(adapter.source).parts[-2:]).removesuffix(".safetensors")
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


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


def identity(adapter: Adapter) -> list[Any]:
    """All that an adapter's scores hang on, every bit of it hashed; for run ids."""
    return [described(adapter), adapter.config, sorted(adapter.tensors), tensor_digest(adapter.tensors.values())]


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """A hash of every bit of some tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
