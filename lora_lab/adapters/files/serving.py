"""Adapters made so that a server or a tool takes them: one rank, one scale, a configuration that it reads.

What each one takes is a table, data/servers.toml, with the version in which it was read from the source.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files as resources
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.converting import converted
from lora_lab.adapters.formats.keys import natural_key
from lora_lab.brief import Brief
from lora_lab.errors import AdapterError, OptionError, TunerError, shorten, unknown


@dataclass(frozen=True)
class Server:
    """What a server or a tool takes of an adapter; the fields are told in data/servers.toml."""

    version: str
    format: str
    folder: bool
    uniform: bool
    listed: bool
    dora: bool
    source: str
    notes: str
    ranks: tuple[int, ...] = ()
    limit: str = ""
    default_rank: int | None = None
    saved: tuple[str, ...] | None = None
    """None: all."""
    modules: tuple[str, ...] = ()
    layers: bool = False


@dataclass(frozen=True, repr=False)
class Fitted(Brief):
    """An adapter that a server takes, and what was changed for it."""

    adapter: Adapter
    changes: Sequence[str] = ()
    """What differs from the adapter that it was made of, in words."""
    advice: Sequence[str] = ()
    """How the server is to be started, or what it does with the adapter."""


SERVERS = ("vllm", "sglang", "llamacpp", "mlx", "diffusers", "peft")
"""Their names."""


@cache
def servers() -> Mapping[str, Server]:
    """The servers by name."""
    table: dict[str, dict[str, Any]] = tomllib.loads(
        resources("lora_lab").joinpath("data", "servers.toml").read_text(encoding="utf-8")
    )
    return {name: Server(**{key: _value(value) for key, value in facts.items()}) for name, facts in table.items()}


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def server(name: str) -> Server:
    """The facts of one server; OptionError with the nearest name where there is none."""
    if name not in SERVERS:
        raise unknown("server", name, SERVERS)
    return servers()[name]


def fitted(adapter: Adapter, name: str) -> Fitted:
    """The adapter as the server takes it, with the same ΔW; what was changed is said.

    Raises TunerError, AdapterError or OptionError, naming the server, for what it cannot take at all.
    """
    facts = server(name)
    _check(adapter, facts, name)
    changes: list[str] = []
    if facts.uniform:
        adapter, changes = uniform(adapter)
    config = dict(adapter.config)
    if facts.listed and not isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(adapter.sites, key=natural_key)
        changes.append("target_modules is a list of the modules' names")
    if isinstance(config.get("init_lora_weights"), str):
        config["init_lora_weights"] = True
        changes.append("init_lora_weights is true: the weights are in the file")
    record = {**adapter.record, "fitted": {"for": name, "version": facts.version, "changes": changes}}
    made = converted(replace(adapter, config=config, record=record), facts.format)
    return Fitted(made.adapter, (*changes, *made.changes), _advice(adapter, facts))


def _check(adapter: Adapter, facts: Server, name: str) -> None:
    where = f"{adapter.label}: {name} {facts.version}"
    if facts.uniform:
        reason = None if adapter.config.get("use_dora") and facts.dora else adapter.why_not_additive
        if reason:
            raise TunerError(f"{where} takes plain LoRA only: {reason}")
        strange = sorted({site.kind for site in adapter.sites.values()} - {"linear", "embedding"})
        if strange:
            raise TunerError(f"{where} takes linear layers and embeddings only, and this adapter has {strange[0]}")
    if facts.saved is not None:
        saved = sorted(key for key in adapter.others if not any(f".{part}." in f".{key}" for part in facts.saved))
        if saved:
            raise AdapterError(
                f"{where} takes no whole tensors{f' but of {shorten(facts.saved)}' if facts.saved else ''}, and this "
                f"adapter has {shorten(saved)}; fused into the base model (fuse) it can be served"
            )
    if facts.modules:
        odd = [module for module in adapter.sites if module.rpartition(".")[2] not in facts.modules]
        if odd:
            raise AdapterError(f"{where} knows no module {shorten(odd)}; it adapts {shorten(facts.modules, 12)}")
    outside = [m for m in adapter.sites if ".layers." not in f".{m}"] if facts.layers else []
    if outside:
        raise AdapterError(f"{where} adapts modules of numbered blocks (layers.N) only, not {shorten(outside)}")
    largest = max((site.rank or 0 for site in adapter.sites.values()), default=0)
    if facts.ranks and largest > facts.ranks[-1]:
        raise OptionError(f"{where} takes ranks up to {facts.ranks[-1]}; this adapter has {largest}: prune it first")


def _advice(adapter: Adapter, facts: Server) -> tuple[str, ...]:
    rank = max((site.rank or 0 for site in adapter.sites.values()), default=0)
    if not facts.limit or (facts.default_rank and rank <= facts.default_rank):
        return ()
    wanted = next((choice for choice in facts.ranks if choice >= rank), rank)
    return (f"start it with {facts.limit} {wanted}, since the rank is {rank}",)


def uniform(adapter: Adapter, rank: int | None = None) -> tuple[Adapter, list[str]]:
    """The adapter with one rank and one scale in all modules, and what was changed: ΔW stays.

    Smaller ranks are filled with zeros up to `rank`, by default the largest there is. lora_alpha / r is the commonest
    scale; a module of another scale s' has its B multiplied by s'/s, rounded to the file's dtype. Raises OptionError
    where a module has a larger rank, TunerError for a tuner without factors.
    """
    pairs = {name: site for name, site in adapter.sites.items() if site.scale is not None and site.kind != "parameter"}
    if len(pairs) < len(adapter.sites) or not pairs:
        raise TunerError(f"{adapter.label}: one rank for all modules needs LoRA factors; this is {adapter.tuner}")
    largest = max(site.rank or 0 for site in pairs.values())
    rank = largest if rank is None else rank
    if rank < largest:
        raise OptionError(f"{adapter.label}: a module has rank {largest}, more than {rank}; prune it first")
    # of scales that are as common, the larger: B shrinks then, and stays within its dtype
    counts = Counter(site.scale or 0.0 for site in pairs.values())
    scale = max(counts, key=lambda value: (bool(value), counts[value], value))
    tensors, sites = dict(adapter.tensors), {}
    padded, scaled, error = [], [], 0.0
    for name, site in pairs.items():
        A, B = (site.keys[part] for part in site.pair)
        if site.rank != rank:
            padded.append(name)
            tensors[A], tensors[B] = _padded(tensors[A], 0, rank), _padded(tensors[B], 1, rank)
        if site.scale != scale:
            scaled.append(name)
            exact = tensors[B].double() * ((site.scale or 0.0) / scale if scale else 0.0)
            tensors[B] = exact.to(tensors[B].dtype)
            size = float(exact.norm())
            error = max(error, float((tensors[B].double() - exact).norm()) / size if size else 0.0)
        sites[name] = replace(site, rank=rank, scale=scale * rank / rank)  # as lora_alpha / r will be read
    alpha = scale * rank
    plain: dict[str, Any] = {
        **adapter.config,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    changes = []
    if padded:
        changes.append(f"{len(padded)} of {len(pairs)} modules are filled with zeros to rank {rank}")
    if scaled:
        changes.append(
            f"{len(scaled)} of {len(pairs)} modules hold in B how their scale differs from {scale:g} "
            + (f"(rounded by at most {error:.1g} of it)" if error else "(exactly)")
        )
    if adapter.config.get("use_rslora"):
        changes.append(f"use_rslora is off, and lora_alpha {plain['lora_alpha']:g} gives the same scale")
    return replace(adapter, tensors=tensors, sites=sites, config=plain), changes


def _padded(tensor: Tensor, dim: int, rank: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
