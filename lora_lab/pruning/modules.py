"""Adapters with fewer modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_lab.adapters.adapter import Adapter, other_tensors
from lora_lab.adapters.formats.keys import PREFIX, anchored
from lora_lab.adapters.formats.peft.matching import by_whole
from lora_lab.adapters.formats.peft.peft_config import exact_targets, pattern_values
from lora_lab.adapters.formats.sites import Site
from lora_lab.errors import OptionError, TunerError, shorten
from lora_lab.pruning.cost import Pruned, measured


def structured(adapter: Adapter, names: Collection[str], *, pattern: str | None = None) -> Pruned:
    """The adapter with these modules only, see `keep_modules`; `pattern` is noted as what chose them."""
    options = {"modules": sorted(set(names))} | ({"keep": pattern} if pattern else {})
    return measured(adapter, keep_modules(adapter, names), options)


def keep_modules(adapter: Adapter, names: Collection[str], *, source: str | None = None) -> Adapter:
    """The adapter with these modules only, for every tuner that is placed by module names.

    Tensors, heads and scales stay bit for bit; the configuration names exactly the modules that are left, so that
    PEFT makes none of the others again. Raises OptionError for a module that is not there and where none is left,
    TunerError where the configuration cannot leave a module out.
    """
    absent = sorted(set(names) - set(adapter.sites))
    if absent:
        raise OptionError(f"{adapter.label} has no module {shorten(absent)}; there are: {shorten(adapter.sites)}")
    if not names:
        raise OptionError(
            f"no module of {adapter.label} would be left; at least one is needed of: {shorten(adapter.sites)}"
        )
    source = f"pruned {adapter.label}" if source is None else source
    sites = {name: site for name, site in adapter.sites.items() if name in set(names)}
    if len(sites) == len(adapter.sites):
        return replace(adapter, source=source, name="")
    _check_removable(adapter, sites)
    owned = {key: adapter.tensors[key] for site in sites.values() for key in site.keys.values()}
    tensors = {**owned, **other_tensors(adapter, sites)}
    return Adapter(
        tensors, _restricted(adapter, list(sites)), sites, adapter.record, source, adapter.origin, adapter.layout
    )


_BY_NAMES_ONLY = ("exclude_modules", "layers_pattern", "layers_to_transform")
# Tuners that look a module's own settings up as `peft_config.pattern_values` does: pattern → the default's field.
_PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha"), "lambda_pattern": ("delora_lambda",)}
_PATTERNED = {"LORA", "LOHA", "LOKR", "HIRA", "DELORA"}
# Tuners that are no layers, or whose layers are drawn or decomposed together: fewer of them are others
_TOGETHER = {"ADAPTION_PROMPT", "FROD", "SHADOW", "TINYLORA", "UNILORA", "XLORA"}
_SHARED_BY_SIZE = {"VERA", "PVERA", "RANDLORA"}


def _check_removable(adapter: Adapter, kept: Mapping[str, Site]) -> None:
    if adapter.config.get("target_parameters") or any(s.kind == "parameter" for s in adapter.sites.values()):
        raise TunerError(
            f"{adapter.label}: target_parameters names parameters by their endings, so no module can be left out; "
            "all of them must be kept"
        )
    if adapter.tuner in _TOGETHER:
        raise TunerError(f"{adapter.label}: {adapter.tuner} sets its modules up together, so none can be left out")
    if adapter.tuner not in _SHARED_BY_SIZE:
        return
    shared = [key for key in adapter.others if not key.startswith(PREFIX)]
    longest = [max(_lengths(adapter, sites, "_lambda_b"), default=0) for sites in (kept, adapter.sites)]
    if not shared or longest[0] != longest[1]:
        raise TunerError(
            f"{adapter.label}: {adapter.tuner} shares projections that are as large as its largest module, "
            f"{'which must be kept' if shared else 'and the file lacks them, so no module can be left out'}"
        )


def _lengths(adapter: Adapter, sites: Mapping[str, Site], ending: str) -> list[int]:
    keys = [key for site in sites.values() for part, key in site.keys.items() if part.endswith(ending)]
    return [adapter.tensors[key].numel() for key in keys]


def _restricted(adapter: Adapter, names: Sequence[str]) -> dict[str, Any]:
    """The configuration for these modules alone, each with the settings that it had."""
    config = {key: value for key, value in adapter.config.items() if key not in _BY_NAMES_ONLY}
    config["target_modules"] = exact_targets(names, adapter.sites)
    if adapter.tuner in _PATTERNED:
        for field, defaults in _PATTERNS.items():
            if config.get(field):
                default = next((config[key] for key in defaults if key in config), None)
                config[field] = _anchored_values(config[field], names, default)
    if adapter.tuner == "ADALORA" and config.get("rank_pattern"):
        gone = [name for name in adapter.sites if name not in names]
        config["rank_pattern"] = {
            key: ranks
            for key, ranks in config["rank_pattern"].items()
            if not any(key.startswith(f"{name}.lora_") for name in gone)
        }
    if adapter.tuner == "IA3" and config.get("feedforward_modules") is not None:
        forward = _feedforward(names, config["feedforward_modules"])
        # A pattern, since PEFT takes listed names as endings, even in the middle of a word
        config["feedforward_modules"] = f"^({'|'.join(map(re.escape, forward))})$" if forward else []
    return config


def _anchored_values(patterns: Mapping[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    values = pattern_values(patterns, list(names), default)
    return {anchored(name): value for name, value in values.items() if value != default}


def _feedforward(names: Sequence[str], said: str | Collection[str]) -> list[str]:
    if isinstance(said, str):
        return by_whole([said], names)[said]
    return [name for name in names if name.endswith(tuple(said))]
