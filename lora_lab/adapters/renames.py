"""Modules of adapters by the same names: which names differ by their first parts only, and how they are changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import PREFIX, anchored, natural_key
from lora_lab.adapters.formats.peft.peft_config import exact_targets, pattern_values
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.models.bases import difference
from lora_lab.errors import MismatchError, OptionError

# What names modules in a configuration, beside target_modules, which lists exactly those that there are.
_SELECTING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def renamed(adapter: Adapter, old: str, new: str) -> Adapter:
    """The adapter with the first parts `old` of its modules' names changed to `new`; '' stands for no parts.

    Whole tensors are renamed with the modules; names that do not begin with `old` stay. Raises OptionError where two
    modules would have one name.
    """
    names = {name: _changed(name, old, new) for name in adapter.sites}
    if len(set(names.values())) < len(names):
        raise OptionError(f"{adapter.source}: renaming {old!r} to {new!r} gives two modules one name")
    keys = {key: PREFIX + _changed(key[len(PREFIX) :], old, new) for key in adapter.tensors if key.startswith(PREFIX)}
    if len({keys.get(key, key) for key in adapter.tensors}) < len(adapter.tensors):
        raise OptionError(f"{adapter.source}: renaming {old!r} to {new!r} gives two tensors one name")
    sites = {
        names[name]: replace(site, name=names[name], keys={part: keys[key] for part, key in site.keys.items()})
        for name, site in adapter.sites.items()
    }
    config = {key: value for key, value in adapter.config.items() if key not in _SELECTING}
    config["target_modules"] = exact_targets(sites, ())
    for field, default in (("rank_pattern", config.get("r")), ("alpha_pattern", config.get("lora_alpha"))):
        if patterns := config.get(field):
            values = pattern_values(patterns, adapter.sites, default)
            config[field] = {anchored(names[name]): value for name, value in values.items()}
    tensors = {keys.get(key, key): tensor for key, tensor in adapter.tensors.items()}
    return replace(adapter, tensors=tensors, config=config, sites=sites)


def rename_all(adapters: Sequence[Adapter], renames: Sequence[tuple[str, str]]) -> list[Adapter]:
    """The adapters with every renaming (old, new) done where all modules begin with old, and not with new already.

    Raises OptionError for a renaming that no adapter has a use for.
    """
    adapted = list(adapters)
    for old, new in renames:
        concerned = [i for i, adapter in enumerate(adapted) if _wants(adapter, old, new)]
        if not concerned:
            shown = next((name for adapter in adapted for name in adapter.sites), "none")
            raise OptionError(f"`rename` {old}={new}: no adapter has modules that begin with {old!r}, such as {shown}")
        for i in concerned:
            adapted[i] = renamed(adapted[i], old, new)
    return adapted


def require_shared_modules(adapters: Sequence[Adapter]) -> None:
    """MismatchError where some adapters have no module in common with the others.

    It names a module of each, and the renaming that makes them one, where there is one.
    """
    joined = {0}
    while True:
        names = {name for i in joined for name in adapters[i].sites}
        more = {i for i, adapter in enumerate(adapters) if names & adapter.sites.keys()} - joined
        if not more:
            break
        joined |= more
    apart = [i for i in range(len(adapters)) if i not in joined and adapters[i].sites]
    if not apart or not adapters[0].sites:
        return
    first, other = adapters[0], adapters[apart[0]]
    examples = [min(adapter.sites, key=natural_key) for adapter in (first, other)]
    if first.base_model and other.base_model and first.base_model != other.base_model and difference(first, other):
        raise MismatchError(
            f"{first.source} and {other.source} have different base models: {first.base_model!r} and "
            f"{other.base_model!r}"
        )
    way = suggested([adapters[i] for i in sorted(joined)], other)
    raise MismatchError(
        f"{first.source} and {other.source} update no module together: {examples[0]}, and {examples[1]}; "
        + (f"`rename` {way[0]}={way[1]} makes them the same" if way else "adapters of one base model are needed")
    )


def suggested(adapters: Sequence[Adapter], other: Adapter) -> tuple[str, str] | None:
    """First parts (old, new) by which the modules of `other` become those of the adapters, one to one, or None.

    One side may have more modules than the other; all that they then share must be of one shape.
    """
    theirs = _shapes(other)
    mine = {name: shape for adapter in adapters for name, shape in _shapes(adapter).items()}
    fewer, more = (theirs, mine) if len(theirs) <= len(mine) else (mine, theirs)
    example = min(fewer, key=natural_key)  # which must be one of the others
    pairs = dict.fromkeys(pair for target in more for pair in _heads(example, target))
    for old, new in pairs if fewer is theirs else [pair[::-1] for pair in pairs]:
        moved = {_changed(name, old, new): shape for name, shape in theirs.items()}
        shared = moved.keys() & mine.keys()
        numbered = [any(part.isdigit() for part in head.split(".")) for head in (old, new)]
        if (
            not all(numbered)  # one layer is not another
            and _wants(other, old, new)
            and not any(_wants(adapter, old, new) for adapter in adapters)
            and len(shared) == min(len(moved), len(mine))
            and all(moved[name] == mine[name] for name in shared)
        ):
            return old, new
    return None


def _heads(name: str, target: str) -> Iterator[tuple[str, str]]:
    """What is left of two names without some last parts that they share, all of them first, at the least one."""
    parts, others = name.split("."), target.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts[::-1], others[::-1], strict=False)) if a != b), None)
    shared = min(len(parts), len(others)) if shared is None else shared
    for count in range(shared, 0, -1):
        yield ".".join(parts[:-count]), ".".join(others[:-count])


def _wants(adapter: Adapter, old: str, new: str) -> bool:
    done = _begins(new, old) and all(_begins(name, new) for name in adapter.sites)
    return bool(adapter.sites) and all(_begins(name, old) for name in adapter.sites) and not done


def _begins(name: str, head: str) -> bool:
    return not head or name == head or name.startswith(f"{head}.")


def _changed(name: str, old: str, new: str) -> str:
    if not _begins(name, old):
        return name
    rest = name[len(old) :].removeprefix(".")
    return f"{new}.{rest}" if new and rest else new or rest


def _shapes(adapter: Adapter) -> Mapping[str, tuple[int, ...]]:
    """Module → the sizes of its tensors that do not hang on the rank."""
    return {name: _shape(adapter, site) for name, site in adapter.sites.items()}


def _shape(adapter: Adapter, site: Site) -> tuple[int, ...]:
    sizes: list[int] = []
    for _, key in sorted(site.keys.items()):
        sizes += [size for size in adapter.tensors[key].shape if size != site.rank]
    return tuple(sizes)
