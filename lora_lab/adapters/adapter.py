"""An adapter: its tensors, its configuration, and the record of how it came to be."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab import files
from lora_lab.adapters.files.writing import write_adapter
from lora_lab.adapters.formats import products
from lora_lab.adapters.formats.keys import PREFIX, anchored
from lora_lab.adapters.formats.layout import Layout
from lora_lab.adapters.formats.peft import peft_config, peft_format
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import AdapterError, LoraLabWarning, TunerError
from lora_lab.files import trust
from lora_lab.options import checked
from lora_lab.results.result import finite


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One adapter, read-only: transforms return new ones."""

    tensors: Mapping[str, Tensor]
    """PEFT's canonical key → tensor, in the file's dtype; the tuner's own tensors and every other (heads …).

    Those of a large file are read whenever an operation needs them (`files.Unread`); `.clone()` is in memory.
    """
    config: Mapping[str, Any]
    """PEFT's adapter_config.json."""
    sites: Mapping[str, Site]
    """Module name in the base model → where its tensors are."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained on: task, method, seed, metrics. Empty for adapters from elsewhere."""
    source: str = ""
    """Where it was read from, or what made it."""
    origin: trust.Origin = trust.FOREIGN
    """Where its record comes from, which decides what that may do."""
    layout: Layout = field(default_factory=Layout)
    """How the file was laid out that it was read from; `save` writes in the same format."""
    name: str = ""
    """What the user calls it (see naming.py), in place of its file's name."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        alpha: float | None = None,
        adapter_name: str | None = None,
    ) -> Adapter:
        """Read a folder or a lone file in one of FORMATS, a Trainer checkpoint, or a hub id (org/name).

        `config` names an adapter_config.json for a file that has none in its header or beside it, `alpha` gives
        lora_alpha where no configuration is to be had, `adapter_name` chooses one of several in the keys.
        Raises FileError (missing, broken, foreign) or AdapterError (readable, but unusable: names every module).
        """
        from lora_lab.adapters.files.reading import inspect

        listing = inspect(path, config=config, alpha=alpha, adapter_name=adapter_name)
        if listing.problems:
            shown, count = listing.problems[:3], len(listing.problems)
            raise AdapterError("; ".join(shown) + (f" ({count} in all)" if count > len(shown) else ""))
        for note in listing.warnings:
            warnings.warn(f"{path}: {note}", LoraLabWarning, stacklevel=2)
        return listing.adapter

    def __repr__(self) -> str:
        from lora_lab.adapters.describe import one_line

        return f"Adapter({one_line(self)})"

    def _repr_html_(self) -> str:
        from lora_lab.adapters.describe import html_of

        return html_of(self)

    @property
    def tuner(self) -> str:
        """PEFT's tuner type in upper case."""
        return peft_config.tuner_of(self.config)

    @property
    def base_model(self) -> str | None:
        """What the configuration says the adapter was trained on."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def label(self) -> str:
        """A short name for tables and legends: the one given, or the file's, without folders and ending."""
        if self.name:
            return self.name
        name = Path(self.source).name
        return name.removesuffix(".safetensors").removesuffix(".bin") or self.source or "adapter"

    @property
    def others(self) -> list[str]:
        """Keys of the tensors that belong to no tuner layer: heads, biases, embeddings."""
        owned = {key for site in self.sites.values() for key in site.keys.values()}
        return [key for key in self.tensors if key not in owned]

    @cached_property
    def updates(self) -> Mapping[str, LowRank]:
        """Module name → ΔW as a LowRank; of LoHa and LoKr, of the rank that their products have.

        Raises TunerError, naming the tuner, where ΔW is not known without the base model (DoRA, PiSSA, OFT …).
        """
        if self.why_no_delta:
            raise TunerError(f"{self.source or 'adapter'}: no ΔW from the factors alone: {self.why_no_delta}")
        return products.Updates(self.sites, self.tensors, self.config)

    @cached_property
    def why_no_delta(self) -> str | None:
        """Why ΔW is not known from the adapter alone, or None where it is: of LoRA, LoHa and LoKr."""
        return products.why_no_delta(self.config, self.sites.values())

    @property
    def as_lora(self) -> Adapter:
        """The same ΔW as a plain LoRA: itself, or of LoHa and LoKr with factors of the rank that ΔW has.

        Raises TunerError where ΔW is not known without the base model.
        """
        return self if self.why_not_additive is None else self.with_updates(self.updates, source=self.source)

    @cached_property
    def why_not_additive(self) -> str | None:
        """Why ΔW is not scale · B A of two factors in the file, or None where it is."""
        return peft_format.why_not_additive(self.config, self.sites.values())

    def require_additive(self) -> None:
        """Raise TunerError if ΔW is not scale · B A."""
        if self.why_not_additive:
            raise TunerError(f"{self.source or 'adapter'}: no ΔW from the factors alone: {self.why_not_additive}")

    @property
    def scalable(self) -> bool:
        """Whether every module has a scale by which its update can be multiplied."""
        return all(site.scale is not None for site in self.sites.values())

    @cached_property
    def total_norm(self) -> float:
        """‖ΔW‖_F over all modules together."""
        return float(torch.tensor([u.norm() for u in self.updates.values()], dtype=torch.float64).norm())

    @cached_property
    def identity(self) -> Sequence[Any]:
        """All that its scores hang on, every bit of it hashed (once); for run ids."""
        from lora_lab.adapters.describe import described

        config = json.dumps(finite(self.config))  # unsorted: of its patterns, the first match counts
        sites = {name: repr(site) for name, site in self.sites.items()}
        return described(self), config, sites, *self.digest

    @cached_property
    def digest(self) -> tuple[list[str], str]:
        """The keys of all tensors in order, and a hash of every bit of them."""
        from lora_lab.adapters.describe import tensor_digest

        names = sorted(self.tensors)
        return names, tensor_digest(self.tensors[name] for name in names)

    @checked
    def with_updates(self, updates: Mapping[str, LowRank], *, source: str) -> Adapter:
        """A plain LoRA adapter with exactly these updates, everything else (heads, record, base) kept.

        Scales are 1 (alpha = rank), ranks may differ between modules, and each pattern names one module only.
        """
        return from_updates(updates, like=self, source=source)

    @checked
    def save(self, path: str | os.PathLike[str], *, format: str | None = None, force: bool = False) -> Path:  # noqa: A002
        """Write a folder, or for a path that ends in .safetensors one file with everything inside.

        `format` is one of FORMATS, by default the one that the adapter was read from. The target is whole or absent
        whatever happens; an existing one is replaced only with `force`. A record of the user's own is signed (see
        trust.py). Raises AdapterError for what the format cannot carry, OptionError for a path that it has no file for.
        """
        path = Path(path)
        files.refuse_existing(path, force=force)
        record = finite(trust.recordable(self.record))
        for note in write_adapter(path, format or self.layout.format, self, record, own=self.origin.own):
            warnings.warn(note, LoraLabWarning, stacklevel=2)
        return path


def from_updates(updates: Mapping[str, LowRank], *, like: Adapter, source: str) -> Adapter:
    """See `Adapter.with_updates`; layouts (embedding, convolution, fan_in_fan_out) follow `like`'s sites."""
    sites: dict[str, Site] = {}
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        sites[name], own = plain_site(name, update, like)
        tensors |= own
    return of_sites(sites, tensors, like=like, source=source)


def plain_site(name: str, update: LowRank, like: Adapter) -> tuple[Site, dict[str, Tensor]]:
    """A module of scale 1 with this ΔW, in the layout that it has in `like`, and its tensors by their keys."""
    kind = _kind(update, like.sites.get(name))
    site = Site(name, kind, {}, update.rank, 1.0)
    end = "" if kind == "embedding" else ".weight"
    keys = {part: f"{PREFIX}{name}.{part}{end}" for part in site.pair}
    factors = stored(update, kind, bool(like.config.get("fan_in_fan_out")))
    return replace(site, keys=keys), dict(zip(keys.values(), factors, strict=True))


def of_sites(made: Mapping[str, Site], factors: Mapping[str, Tensor], *, like: Adapter, source: str) -> Adapter:
    """A plain LoRA adapter of such modules with these tensors, everything else kept from `like`."""
    if not made:
        raise AdapterError("an adapter needs at least one module")
    names = sorted(made)
    sites = {name: made[name] for name in names}
    ranks = {name: site.rank or 0 for name, site in sites.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    uneven = {anchored(name): rank for name, rank in ranks.items() if rank != common}
    config = {
        **{key: value for key, value in like.config.items() if key in _KEPT},
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": uneven,
        "alpha_pattern": dict(uneven),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": peft_config.exact_targets(names, like.sites),
    }
    tensors = {key: factors[key] for site in sites.values() for key in site.keys.values()}
    beside = {key: tensor for key, tensor in other_tensors(like, sites).items() if key.startswith(PREFIX)}
    tensors |= beside
    if config.get("modules_to_save"):  # PEFT cannot load a file that lacks what these name
        absent = peft_config.missing_saved(config, [key.removeprefix(PREFIX) for key in beside])
        config["modules_to_save"] = [name for name in config["modules_to_save"] if name not in absent] or None
    return Adapter(tensors, config, sites, like.record, source, like.origin, like.layout)


def other_tensors(adapter: Adapter, modules: Container[str]) -> dict[str, Tensor]:
    """The tensors of `adapter.others` under the keys that they have when only these modules stay adapted."""
    tensors = {}
    for key in adapter.others:
        module = key.removeprefix(PREFIX).rpartition(".base_layer.")[0]
        # an embedding saved along with its adapter, which is no PEFT layer any more without one
        name = key if module in modules or not module else key.replace(".base_layer.", ".")
        tensors[name] = adapter.tensors[key]
    return tensors


# What stays true of a new set of modules, ranks and factors: all but these.
_KEPT = peft_config.LORA_FIELDS.difference(
    peft_format.VARIANTS,
    {
        "lora_bias",
        "velora_config",
        "use_dora",
        "layers_to_transform",
        "layers_pattern",
        "exclude_modules",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_config",
        "target_parameters",
        "peft_version",
        "auto_mapping",
    },
)


def _kind(update: LowRank, old: Site | None) -> str:
    if len(update.shape) > 2:
        return f"conv{len(update.shape) - 2}d"
    return "embedding" if old and old.kind == "embedding" else "linear"


def stored_transposed(kind: str, fan_in_fan_out: bool) -> bool:
    """Whether PEFT keeps Bᵀ and Aᵀ in the places of A and B for this kind of layer."""
    return kind == "embedding" or (kind == "linear" and fan_in_fan_out)


def stored(update: LowRank, kind: str, fan_in_fan_out: bool) -> tuple[Tensor, Tensor]:
    """A and B as PEFT keeps them for this kind of layer."""
    if stored_transposed(kind, fan_in_fan_out):
        return update.B.T.contiguous(), update.A.T.contiguous()
    if kind == "linear":
        return update.A, update.B
    ones = (1,) * (len(update.shape) - 2)
    return update.A.reshape(update.rank, *update.shape[1:]), update.B.reshape(*update.B.shape, *ones)
