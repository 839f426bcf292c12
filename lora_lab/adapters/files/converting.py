"""Adapters in another format: the same ΔW, and what the format made necessary."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_lab import files, hub
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.diffusion.components import TOGETHER, by_component, clip_name
from lora_lab.adapters.formats.layout import Layout
from lora_lab.adapters.formats.peft.peft_format import update
from lora_lab.adapters.formats.registry import FORMATS, PEFT
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank, all_finite
from lora_lab.brief import Brief
from lora_lab.errors import FileError, LoraLabWarning, OptionError, shorten, unknown

DTYPES = {**hub.DTYPES, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of an adapter's file by name, in full and in short."""
CHECKED = 1e-6
"""Difference of ΔW, relative to the size of its factors, at which a written file is refused."""


@dataclass(frozen=True, repr=False)
class Converted(Brief):
    """An adapter in another format or type, not yet written."""

    adapter: Adapter
    changes: Sequence[str] = ()
    """What the other format cannot carry and what the type rounds, in words."""
    error: float = 0.0
    """‖ΔW rounded away‖ / ‖ΔW‖ over all modules, from the type asked for."""


def converted(adapter: Adapter, format_name: str | None = None, dtype: str | None = None) -> Converted:
    """The adapter as it will be saved in another format, its factors in another type.

    `format_name` is one of FORMATS that can be written, by default the adapter's own; `dtype` one of DTYPES, by default
    each tensor's own. Raises OptionError for other names and for a type that cannot hold an entry.
    """
    layout, changes = adapter.layout, []
    if format_name is not None and format_name not in FORMATS:
        raise unknown("format", format_name, FORMATS)
    if (format_name or layout.format) != PEFT and adapter.why_not_additive and adapter.why_no_delta is None:
        tuner, adapter = adapter.tuner, adapter.as_lora
        most = max(site.rank or 0 for site in adapter.sites.values())
        changes.append(f"{tuner} is written as a LoRA with the same ΔW, of ranks up to {most}")
    if format_name is not None and format_name != layout.format:
        if layout.apart:
            changes.append(f"{len(layout.apart)} tensors of no module are left out: {shorten(layout.apart)}")
        layout = Layout(format_name, "" if format_name == PEFT else None)
        renamed = FORMATS[format_name].renamed
        before, adapter = adapter, renamed(adapter) if renamed else adapter
        if adapter is not before:
            changes.append(
                f"{len(before.sites)} modules are {len(adapter.sites)} under the names that the format has for them"
            )
    apart = by_component(adapter.sites) if format_name == PEFT else None
    if apart and (adapter.layout != Layout() or apart.keys() != {"transformer"}):  # which language models have, too
        layout = replace(layout, names=TOGETHER)
    made, error = (replace(adapter, layout=layout), 0.0) if dtype is None else _cast(adapter, layout, dtype)
    if error:
        changes.append(f"{dtype} rounds ΔW by {error:.2g} of its norm")
    return Converted(made, changes, error)


def require_writable(adapter: Adapter, format_name: str) -> None:
    """Raise what writing the adapter in a format would raise (TunerError, AdapterError); nothing is written."""
    made, form = converted(adapter, format_name).adapter, FORMATS[format_name]
    if form.write is not None:
        form.write(made)


def _cast(adapter: Adapter, layout: Layout, dtype: str) -> tuple[Adapter, float]:
    """The adapter with its factors in this type, and ‖ΔW rounded away‖ / ‖ΔW‖ over all modules."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed")
    tensors = dict(adapter.tensors)
    for site in adapter.sites.values():
        for key in site.keys.values():
            if tensors[key].is_floating_point():
                tensors[key] = files.later(lambda tensor: tensor.to(DTYPES[dtype]), tensors[key])
            if not all_finite(tensors[key]):
                raise OptionError(f"{site.name} has entries that {dtype} cannot hold; float32 can")
    made = replace(adapter, tensors=tensors, layout=layout)
    pairs = [site.name for site in adapter.sites.values() if site.scale]
    rounded = [name for name in pairs if _differ(made, adapter, adapter.sites[name].pair, name)]
    lost = math.hypot(*((_product(made, name) - _product(adapter, name)).norm() for name in rounded))
    return made, lost / math.hypot(*(_product(adapter, name).norm() for name in pairs)) if lost else 0.0


def _differ(one: Adapter, other: Adapter, parts: Iterable[str], name: str) -> bool:
    keys = [other.sites[name].keys[part] for part in parts]
    return not all(torch.equal(one.tensors[key].double(), other.tensors[key].double()) for key in keys)


def _product(adapter: Adapter, name: str) -> LowRank:
    """scale · B A of a module; with DoRA, which has the same factors, that is not yet ΔW."""
    return update(adapter.sites[name], adapter.tensors, adapter.config)


def save(
    adapter: Adapter, path: Path, *, inputs: Sequence[Path] = (), force: bool = False
) -> tuple[Adapter, list[str]]:
    """The adapter as it is read again from where it was written, and what its format made necessary.

    Raises FileError for a file that does not, of which nothing is kept.
    """
    files.refuse_existing(path, force=force, inputs=inputs)
    with files.replacing(path) as beside:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            adapter.save(beside)
        read = verify(beside, adapter)
    return read, [str(warning.message) for warning in told]


def same_bits(path: Path, adapter: Adapter) -> bool:
    """Whether a file in PEFT's format holds the adapter's very tensors, each to the bit."""
    file = path if path.is_file() else path / "adapter_model.safetensors"
    if not file.is_file():
        return False
    written = files.LazyTensors(file)
    if written.keys() != adapter.tensors.keys():
        return False
    return all(_same_bits(written[key], adapter.tensors[key]) for key in written)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pair = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    if not pair[0].numel() % 8:  # eight bytes are compared in the time of one
        pair = [tensor.view(torch.int64) for tensor in pair]
    return torch.equal(*pair)


def _same_factors(one: Site, other: Site, first: Adapter, second: Adapter) -> bool:
    pairs = [(first.tensors[one.keys[part]], second.tensors[other.keys[part]]) for part in other.pair]
    return all(_same_bits(a, b) for a, b in pairs)


def verify(path: Path, adapter: Adapter) -> Adapter:
    """What was written to `path`; FileError unless it has the same modules as the adapter, each with its ΔW."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLabWarning)  # of modules without a change, by a name that goes away
        read = Adapter.load(path)
    names = {clip_name(name): name for name in read.sites}
    if names.keys() != {clip_name(name) for name in adapter.sites}:
        raise FileError(f"{path}: the file does not hold the modules that were written; it was not kept")
    for name, site in adapter.sites.items():
        found = names[clip_name(name)]
        if site.scale is None:
            same = all(torch.equal(read.tensors[key], adapter.tensors[key]) for key in site.keys.values())
        else:
            same = site.scale == read.sites[found].scale and _same_factors(read.sites[found], site, read, adapter)
            if not same:
                wanted = _product(adapter, name)
                same = (_product(read, found) - wanted).norm() <= CHECKED * wanted.bound()  # not of NaN
        magnitudes = [
            each.tensors[key].flatten()
            for each, own in ((adapter, site), (read, read.sites[found]))
            if (key := own.keys.get("lora_magnitude_vector"))
        ]
        if not same or (magnitudes and not (len(magnitudes) == 2 and torch.equal(*magnitudes))):
            raise FileError(f"{path}: the file does not give the ΔW of {name} that was written; it was not kept")
    return read
