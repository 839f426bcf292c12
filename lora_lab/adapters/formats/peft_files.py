"""Files in PEFT's own format: their configuration completed when read, and what is written of an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lab.adapters.formats.layout import Content, Part, Raw, Writable
from lora_lab.adapters.formats.peft_config import assumed_config, complete_config
from lora_lab.errors import AdapterError


def matches(raw: Raw) -> bool:
    """PEFT's is what everything is taken for that is in no other format."""
    return True


def read(raw: Raw) -> Content:
    """The tensors as they are, with the configuration that belongs to them or is assumed."""
    if "lora_adapter_metadata" in raw.header:
        return Content({}, {}, problems=["a diffusers file (its header says so); PEFT's format is needed"])
    notes: list[str] = []
    if raw.settings is None:
        config, notes = assumed_config(raw.tensors, raw.alpha, raw.adapter_name)
    else:
        config = dict(raw.settings)
        if raw.alpha is not None and config.get("lora_alpha") is None:
            config["lora_alpha"] = raw.alpha
        elif raw.alpha is not None and config["lora_alpha"] != raw.alpha:
            notes = [f"alpha {raw.alpha:g} is not used, the config says {config['lora_alpha']!r}"]
    try:
        config, more = complete_config(config, raw.tensors, raw.adapter_name)
    except AdapterError as error:
        return Content({}, config, problems=[str(error)])
    return Content(raw.tensors, config, notes=[*notes, *more])


def write(adapter: Writable) -> Mapping[str, Part]:
    """One file with everything in it, and its configuration."""
    return {"": Part(adapter.tensors, {}, adapter.config)}
