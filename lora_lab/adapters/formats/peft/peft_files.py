"""Files in PEFT's own format: their configuration completed when read, and what is written of an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lab.adapters.formats.diffusion.components import alone, by_component, component_of, key_within
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.layout import Content, Layout, Part, Raw, Writable
from lora_lab.adapters.formats.peft.peft_config import assumed_config, complete_config
from lora_lab.errors import AdapterError, TunerError, shorten


def matches(raw: Raw) -> bool:
    """PEFT's is what everything is taken for that is in no other format."""
    return True


def read(raw: Raw) -> Content:
    """The tensors as they are, with the configuration that belongs to them or is assumed."""
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
    """One file with everything in it and its configuration; of a pipeline, one for each of its components.

    PEFT loads an adapter into one model, whose modules' names do not begin with the name that it has in a pipeline.
    What was read from a plain file of PEFT's is written as it was.
    """
    apart = None if adapter.layout == Layout() else by_component(adapter.sites)
    if apart is None:
        return {"": Part(adapter.tensors, {}, adapter.config)}
    loose = [key for key in adapter.tensors if component_of(key.removeprefix(PREFIX)) not in apart]
    if loose:
        raise TunerError(
            f"PEFT's files of a pipeline, one for each of {shorten(apart)}, have no place for {shorten(loose)}"
        )
    return {
        component: Part(
            {
                key_within(key, component): tensor
                for key, tensor in adapter.tensors.items()
                if key.startswith(f"{PREFIX}{component}.")
            },
            {},
            alone(adapter.config, component, names),
        )
        for component, names in apart.items()
    }
