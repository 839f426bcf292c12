"""Whole tensors beside the factors, heads above all: what becomes of them where adapters differ in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.brief import Brief
from lora_lab.errors import AdapterError, MismatchError, shorten

HEADS = ("keep-own", "average", "first")
"""What can become of whole tensors in which the adapters differ."""
_MEANS = ("average",)
"""Those of them that need tensors of one shape, of which there is a mean."""


TOKENS = ".token_adapter.trainable_tokens_delta"
"""How the key of trained tokens ends: the rows of an embedding that stand for some tokens, in place of the base's."""
_IDS = ".token_adapter.token_indices"
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


@dataclass(frozen=True, repr=False)
class Whole(Brief):
    """Whole tensors of a merged adapter."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    apart: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Label of a source → its own, kept beside the merged adapter."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Key of trained tokens → the ids that its rows stand for."""


def token_ids(adapter: Adapter, key: str) -> list[int] | None:
    """The tokens that the rows of a whole tensor stand for, by the configuration; None for any other tensor.

    Raises AdapterError where the configuration does not name as many as there are rows.
    """
    if not key.endswith(TOKENS):
        return None
    module = key.removeprefix(PREFIX).removesuffix(TOKENS)
    given = adapter.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((ids for name, ids in given.items() if f".{module}".endswith(f".{name}")), None)
    rows = len(adapter.tensors[key])
    if not isinstance(given, list) or len(given) != rows or len(set(map(str, given))) != rows:
        raise AdapterError(
            f"{adapter.source}: {key.removeprefix(PREFIX)} has {rows} rows; trainable_token_indices must name as many "
            f"different tokens for {module}, and is {given!r}"
        )
    return [int(token) for token in given]


def with_rows_of_the_first(adapters: Sequence[Adapter], key: str) -> list[Tensor]:
    """A whole tensor of every adapter, rows of trained tokens in the first one's order of tokens.

    Raises MismatchError where other tokens are trained, or where running statistics differ, which have no mean.
    """
    tensors = [adapter.tensors[key] for adapter in adapters]
    first = adapters[0]
    if key.endswith(_STATISTICS) and not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        raise MismatchError(f"{first.source} and others: {key.removeprefix(PREFIX)} differs, {_NO_MEAN}")
    wanted = token_ids(first, key)
    if wanted is None:
        return tensors
    for i, other in enumerate(adapters):
        ids = token_ids(other, key) or []
        if set(ids) != set(wanted):
            odd = sorted(set(ids) ^ set(wanted))
            raise MismatchError(f"{first.source} and {other.source} train different tokens: {shorten(odd)} in one only")
        tensors[i] = tensors[i][[ids.index(token) for token in wanted]]
    return tensors


_NO_MEAN = "and running statistics of a base at work are no weights to average"


def merge_heads(
    adapters: Sequence[Adapter], labels: Sequence[str], how: str | None, ways: Sequence[str] = HEADS
) -> Whole:
    """Whole tensors of the merged adapter, and those of each source that are kept apart.

    `ways` are those of HEADS that can be chosen; an error names them.

    Trained tokens go by their ids: those of all adapters are united, and what `how` says is done with a token whose
    rows differ.
    """
    everything = [
        {key: a.tensors[key] for key in a.others if key.startswith(PREFIX) and not key.endswith(TOKENS)}
        for a in adapters
    ]
    made = _merge_others(adapters, everything, labels, how, ways)
    for key in sorted({key for adapter in adapters for key in adapter.others if key.endswith(TOKENS)}):
        _merge_tokens(made, adapters, key, labels, how, ways)
    return made


def _offered(ways: Sequence[str], *, mean: bool = True) -> str:
    """The ways in words; without `mean`, those that need none, in short."""
    told = {"keep-own": "keep-own (each its own, beside the merged adapter)"} if mean else {}
    *others, last = [told.get(way, way) for way in ways if mean or way not in _MEANS]
    return f"{', '.join(others)} or {last}" if others else last


def token_settings(config: Mapping[str, Any], tokens: Mapping[str, list[int]]) -> dict[str, Any]:
    """The configuration of an adapter that trains these tokens (key → ids), and no others."""
    if not tokens:
        return {key: value for key, value in config.items() if key != "trainable_token_indices"}
    modules = {key.removeprefix(PREFIX).removesuffix(TOKENS): ids for key, ids in tokens.items()}
    listed = len(modules) == 1 and isinstance(config.get("trainable_token_indices"), list)
    return {**config, "trainable_token_indices": next(iter(modules.values())) if listed else modules}


def _merge_tokens(
    made: Whole, adapters: Sequence[Adapter], key: str, labels: Sequence[str], how: str | None, ways: Sequence[str]
) -> None:
    rows: dict[int, list[Tensor]] = {}
    for adapter in adapters:
        if key in adapter.others:
            for token, row in zip(token_ids(adapter, key) or [], adapter.tensors[key], strict=True):
                rows.setdefault(token, []).append(row)
    torn = sorted(token for token, own in rows.items() if not all(torch.equal(row, own[0]) for row in own))
    if torn and how is None:
        raise MismatchError(
            f"{key.removeprefix(PREFIX)}: rows of the tokens {shorten(torn)} differ between the adapters; `heads` "
            f"{_offered(ways)} says what becomes of them"
        )
    if torn and how == "keep-own":
        for label, adapter in zip(labels, adapters, strict=True):
            if key in adapter.others:
                ids = torch.tensor(token_ids(adapter, key))
                own = {key: adapter.tensors[key], key.removesuffix(TOKENS) + _IDS: ids}
                made.apart.setdefault(label, {}).update(own)
        return
    made.tokens[key] = list(rows)
    kind = next(adapter.tensors[key].dtype for adapter in adapters if key in adapter.others)
    merged = [
        own[0].double() if how != "average" else torch.stack([r.double() for r in own]).mean(0) for own in rows.values()
    ]
    made.tensors[key] = torch.stack(merged).to(kind)


def _merge_others(
    adapters: Sequence[Adapter],
    everything: Sequence[Mapping[str, Tensor]],
    labels: Sequence[str],
    how: str | None,
    ways: Sequence[str],
) -> Whole:
    keys = sorted({key for tensors in everything for key in tensors}, key=lambda key: (-_entries(everything, key), key))
    whole: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for key in keys:
        copies = [tensors.get(key) for tensors in everything]
        first = next(tensor for tensor in copies if tensor is not None)
        if all(t is not None and t.shape == first.shape and torch.equal(t, first) for t in copies):
            whole[key] = first
            continue
        if how == "average" and key.endswith(_STATISTICS):
            name = key.removeprefix(PREFIX)
            raise MismatchError(
                f"{name} differs between the adapters, {_NO_MEAN}; `heads` {_offered(ways, mean=False)} can be had"
            )
        if how is None or (how == "average" and _unlike(copies)):
            _refuse_heads(adapters, copies, key, how, ways)
        if how == "first" and copies[0] is not None:
            whole[key] = copies[0]
        elif how == "first":
            raise MismatchError(f"{adapters[0].source}: has no {key.removeprefix(PREFIX)}, which others have")
        elif how == "average":
            present = [t.double() for t in copies if t is not None]
            whole[key] = (torch.stack(present).sum(0) / len(present)).to(first.dtype)
        else:
            for label, tensor in zip(labels, copies, strict=True):
                if tensor is not None:
                    apart.setdefault(label, {})[key] = tensor
    return Whole(whole, apart)


def _entries(everything: Sequence[Mapping[str, Tensor]], key: str) -> int:
    return max(tensors[key].numel() for tensors in everything if key in tensors)


def _unlike(copies: Sequence[Tensor | None]) -> bool:
    return len({tensor.shape if tensor is not None else None for tensor in copies}) > 1


def _refuse_heads(
    adapters: Sequence[Adapter], copies: Sequence[Tensor | None], key: str, how: str | None, ways: Sequence[str]
) -> None:
    name = key.removeprefix(PREFIX)
    shapes = " and ".join(
        f"{tuple(tensor.shape)} in {adapter.source}" if tensor is not None else f"absent from {adapter.source}"
        for adapter, tensor in zip(adapters, copies, strict=True)
    )
    short = _offered(ways, mean=False)
    if how == "average":
        raise MismatchError(f"{name} cannot be averaged: it is {shapes}; `heads` {short} can be had")
    if _unlike(copies):
        raise MismatchError(f"{name} differs: it is {shapes}; say what becomes of it with `heads` {short}")
    assert copies[0] is not None
    shape = tuple(copies[0].shape)
    raise MismatchError(
        f"{name} {shape} differs between the adapters; `heads` {_offered(ways)} says what becomes of it"
    )
