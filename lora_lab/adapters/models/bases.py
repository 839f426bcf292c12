"""Base models under several names: a hub id, its copy in a folder and a quantised twin are one base.

An adapter's configuration names its base by where it lay. Whether two names mean one base is told from the bases' own
configurations and norms, and these are read only where the adapter may lead: into the hub's cache under the id that it
names, into its own folder, and anywhere if it is the user's own (see files/trust.py). Nothing is fetched.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.peft.peft_format import shape_of
from lora_lab.errors import FileError, LoraLabNote, LoraLabWarning, MismatchError, TrustError, shorten
from lora_lab.files.trust import Origin, Reach
from lora_lab.hub import cached_folder

NO_MATTER = ("id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "use_cache", "quantization_config")
"""Fields of a configuration in which one base may differ: labels, and how weights are kept."""
_BETWEEN_COPIES = (*NO_MATTER, "compression_config", "architectures", "name_or_path", "model_name")
"""And those in which copies of it do: the class that reads it, and names."""
_NAMES_AND_VERSIONS = ("_", "transformers", "torch_dtype", "dtype")
_LARGEST = 2**20
"""Bytes of a config.json."""
_PLACES = re.compile(r"^[./~]|/.*/|\\")
"""What no hub id has."""


def same_modules(adapters: Sequence[Adapter]) -> None:
    """MismatchError unless all adapters use one tuner, adapt the same modules, and act alike on one base model."""
    first = adapters[0]
    for other in adapters[1:]:
        pair = f"{first.source} and {other.source}"
        if other.tuner != first.tuner:
            raise MismatchError(f"{pair} are of different tuners: {first.tuner} and {other.tuner}")
        odd = sorted(set(first.sites) ^ set(other.sites))
        if odd:
            raise MismatchError(f"{pair} update different modules: {shorten(odd)}")
    same_base(adapters)


def same_base(adapters: Sequence[Adapter], *, given: bool = False) -> None:
    """MismatchError unless ΔW of all adapters can be added: at the same tokens, to the same layers, in one layout.

    That one base has two names (a hub id, a folder, a quantised copy) is told as a note where both are at hand to be
    compared, and where they differ or are not, as a warning; not where the base is `given`.
    """
    named = next((adapter for adapter in adapters if adapter.base_model), adapters[0])
    plain = next((adapter for adapter in adapters if adapter.why_not_additive is None), adapters[0])
    for other in adapters:
        for field_name, what in _CONDITIONS.items():
            mine, theirs = (adapter.config.get(field_name) or None for adapter in (adapters[0], other))
            if mine != theirs:
                raise MismatchError(
                    f"{adapters[0].source} and {other.source} {what}: {field_name} is {mine} and {theirs}"
                )
        same_layout = bool(other.config.get("fan_in_fan_out")) == bool(plain.config.get("fan_in_fan_out"))
        if other.why_not_additive is None and not same_layout:
            raise MismatchError(
                f"{plain.source} and {other.source} store their weights in different layouts: fan_in_fan_out is not "
                "the same"
            )
        if not given and str(other.base_model or named.base_model).rstrip("/") != str(named.base_model).rstrip("/"):
            _tell(named, other)


_CONDITIONS = {
    "alora_invocation_tokens": "act after different tokens",
    "layer_replication": "adapt models with different layers",
}
"""Field → what adapters that differ in it do: their ΔW is no ΔW of one model."""


def _tell(named: Adapter, other: Adapter) -> None:
    odd, pair = difference(named, other), f"{named.base_model!r} and {other.base_model!r}"
    if odd is None:
        warnings.warn(
            f"{pair} are one base under two names: configuration and norms are the same", LoraLabNote, stacklevel=4
        )
        return
    warnings.warn(
        f"{named.source} and {other.source} name different base models, {pair}, and {odd}: taken for two names of one",
        LoraLabWarning,
        stacklevel=4,
    )


def check_shapes(adapters: Sequence[Adapter], base: str) -> None:
    """MismatchError for an adapter whose ΔW has another shape than the weight in a base's checkpoint, or finds none.

    Of a base that is not on this machine nothing is known. Codes of quantised weights have shapes of their own.
    """
    folder = Path(base) if os.path.isdir(base) else None if _PLACES.search(base) else cached_folder(base)
    weights = {name.removesuffix(".weight"): tensor for name, tensor in _tensors(folder).items()}
    owners: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        parts = name.split(".")  # a head's class and its body begin names differently
        for i in range(len(parts)):
            owners.setdefault(".".join(parts[i:]), []).append(tensor)
    for adapter in adapters if weights else []:
        there = {name: _of_module(owners, name) for name in adapter.sites}
        if adapter.why_not_additive is None and not any(weight is not None for weight in there.values()):
            raise MismatchError(f"{adapter.source}: {base} has no weight of {shorten(there)}; another base is needed")
        for name, site in adapter.sites.items():
            weight = there[name]  # of layers that transformers joins, a checkpoint has only the parts
            if weight is None or site.kind == "parameter" or adapter.why_not_additive is not None:
                continue
            shape = shape_of(site, adapter.tensors, adapter.config)
            if weight.is_floating_point() and tuple(weight.shape) not in (shape, shape[::-1]):
                raise MismatchError(
                    f"{adapter.source}: ΔW of {name} is {list(shape)}, its weight in {base} is {list(weight.shape)}; "
                    "another base is needed"
                )


def _of_module(owners: Mapping[str, Sequence[Tensor]], name: str) -> Tensor | None:
    """The one weight whose name ends as the module's does, or as that without its first part."""
    for end in (name, name.partition(".")[2]):
        if len(found := owners.get(end, ())) == 1:
            return found[0]
    return None


def folder_of(name: str | None, origin: Origin, revision: str | None = None) -> Path | None:
    """Where a base of this name lies on this machine, as far as who names it may lead there; None where it does not."""
    if not name:
        return None
    path = Path(name) if origin.own or origin.folder is None else Path(origin.folder, name)
    if os.path.isdir(path):
        if not origin.own:
            try:
                Reach(origin.folder or os.devnull).require(path, "the base")
            except TrustError:
                return None
        return path
    return None if _PLACES.search(name) or os.path.lexists(name) else cached_folder(name, revision)


def configuration_of(adapter: Adapter) -> dict[str, Any] | None:
    """The config.json of the base that an adapter names; None where it is not here, or not to be read."""
    return _configuration(_folder(adapter))


def difference(first: Adapter, other: Adapter) -> str | None:
    """In what the bases of two adapters differ, in words; None where they are one base under two names.

    Where there is nothing to compare them by, that is said.
    """
    return difference_of(_folder(first), _folder(other), str(first.base_model), str(other.base_model))


def difference_of(first: Path | None, other: Path | None, *names: str) -> str | None:
    """The same of two folders, by whose names it is told which of them is not here (None)."""
    found = [_configuration(first), _configuration(other)]
    for config, name in zip(found, names, strict=True):
        if config is None:
            return f"the configuration of {name!r} is not at hand to compare them by"
    mine, theirs = (_whole(config) for config in found if config is not None)
    for key in sorted(mine.keys() & theirs.keys()):  # what one alone has is of another version
        if mine[key] != theirs[key]:
            return f"their {key} is {mine[key]!r} and {theirs[key]!r}"
    odd = _odd_vector(first, other)
    return f"their weights differ, in {odd}" if odd else None


def _folder(adapter: Adapter) -> Path | None:
    revision = adapter.config.get("revision")
    return folder_of(adapter.base_model, adapter.origin, revision if isinstance(revision, str) else None)


def _configuration(folder: Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    with contextlib.suppress(FileError):
        return files.read_json(folder / "config.json", largest=_LARGEST)
    return None


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """What matters of a configuration, with the defaults of its kind of model where transformers knows it."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    with contextlib.suppress(Exception):  # a kind that is not known, or fields that do not fit it
        return _what_matters(AutoConfig.for_model(**plain).to_dict())
    return _what_matters(plain)


def _what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration without names, versions, labels, dtype and quantisation, those of its parts, too."""
    kept = {k: v for k, v in config.items() if not k.startswith(_NAMES_AND_VERSIONS) and k not in _BETWEEN_COPIES}
    return {key: _what_matters(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _odd_vector(first: Path | None, other: Path | None) -> str | None:
    """A norm's vector that is not the same in both checkpoints, if these are here: no quantisation touches norms.

    They are held against one another in bfloat16, the coarsest that a copy is kept in.
    """
    mine, theirs = _norms(first), _norms(other)
    for name in sorted(mine.keys() & theirs.keys()):
        pair = mine[name].to(torch.bfloat16), theirs[name].to(torch.bfloat16)
        if pair[0].shape != pair[1].shape or not torch.equal(*pair):
            return name
    return None


def _norms(folder: Path | None) -> dict[str, Tensor]:
    """Name → the vector of every norm in a checkpoint."""
    return {n: vector for n, vector in _tensors(folder).items() if vector.ndim == 1 and "norm" in n.lower()}


def _tensors(folder: Path | None) -> dict[str, Tensor]:
    """Name → tensor, unread as yet, of a checkpoint; none where there is none, or it is not sound."""
    with contextlib.suppress(FileError):
        return files.LazyTensors(*sorted(folder.glob("*.safetensors")) if folder else []).unread(held=False)
    return {}
