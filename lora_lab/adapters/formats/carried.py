"""What a format can carry: everything else is refused by name before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.layout import Writable
from lora_lab.adapters.formats.peft.peft_config import changes_base, tuner_of
from lora_lab.adapters.formats.peft.peft_format import why_not_additive
from lora_lab.errors import TunerError, shorten

_WAY = "; a LoRA that is extracted from its base and the base with it fused in comes near to it"
"""What can be done about a ΔW that is dense or hangs on the base."""
_SWITCH = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias"}
"""Part → the field of the configuration that goes with it."""


def require(
    adapter: Writable, what: str, *, kinds: Collection[str], parts: Collection[str] = (), whole: Collection[str] = ()
) -> None:
    """TunerError, naming modules or tensors, unless the format (`what`, as in "a diffusers file") can hold all of it.

    `kinds` are the kinds of modules (sites.py) that it has, `parts` what it has beside the two factors, and `whole`
    the keys of other tensors that it has a place for.
    """
    config: Mapping[str, Any] = {
        key: value for key, value in adapter.config.items() if key not in {_SWITCH[part] for part in parts}
    }
    sites = [
        replace(site, keys={part: key for part, key in site.keys.items() if part not in parts})
        for site in adapter.sites.values()
    ]
    reason = why_not_additive(config, sites)
    if reason:
        hangs_on_base = tuner_of(config) != "LORA" or config.get("use_dora") or changes_base(config)
        raise TunerError(f"{what} cannot hold this adapter: {reason}{_WAY if hangs_on_base else ''}")
    odd = [f"{site.name} ({site.kind})" for site in sites if site.kind not in kinds]
    if odd:
        raise TunerError(f"{what} has no place for {shorten(odd)}; it holds {' and '.join(kinds)} modules")
    owned = {key for site in adapter.sites.values() for key in site.keys.values()}
    beside = [key.removeprefix(PREFIX) for key in adapter.tensors if key not in owned and key not in whole]
    if beside:
        raise TunerError(
            f"{what} has no place for tensors beside the adapter's own (heads, embeddings): {shorten(beside)}"
        )
