"""Whole tensors beside the factors, heads above all: what becomes of them where adapters differ in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_lab.adapter import Adapter
from lora_lab.errors import MismatchError
from lora_lab.keys import PREFIX

HEADS = ("keep-own", "average", "first")
"""What can become of whole tensors in which the adapters differ."""


def merge_heads(
    adapters: Sequence[Adapter], labels: Sequence[str], how: str | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
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
            for label, tensor in zip(labels, found, strict=True):
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
