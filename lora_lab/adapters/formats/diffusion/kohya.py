"""Kohya's files (sd-scripts and what follows it): flat names, lora_down and lora_up, alpha tensors, ss_ metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict

from lora_lab.adapters.formats.diffusion import diffusion_names
from lora_lab.adapters.formats.diffusion.diffusion_names import Scheme, scheme_of
from lora_lab.adapters.formats.layout import Content, Layout, Part, Raw, Writable
from lora_lab.adapters.formats.pieces import Pieces, lora_content, split, taken_apart, written

_NAME = "kohya"
FLAT = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_")


def matches(raw: Raw) -> bool:
    """Whether a module has a flat name beside a LoRA's pieces."""
    for key in raw.tensors:
        place = split(key)
        if place and "." not in place[0] and (FLAT.match(place[0]) or ".lora_down." in key or ".lora_up." in key):
            return True
    return False


def read(raw: Raw) -> Content:
    """The adapter with canonical names; scale 1 where a module has no alpha, as sd-scripts reads it."""
    file = taken_apart(raw.tensors, diffusion_names.modules_of)
    layout = layout_of(file, raw)
    if raw.settings is not None:
        file.notes.append("the adapter_config.json is not used: kohya's files say everything themselves")
    return lora_content(file, raw.alpha, layout)


def layout_of(file: Pieces, raw: Raw) -> Layout:
    """How a file with flat names is laid out."""
    words = " ".join(word for word, said in asdict(_scheme(file)).items() if said)
    return Layout(_NAME, words, _kept(raw.header), file.apart)


def _kept(header: Mapping[str, str]) -> dict[str, str]:
    """The metadata without what is true of these tensors alone: hashes (sshs_…), and records of ours."""
    return {key: value for key, value in header.items() if key.startswith(("ss_", "modelspec."))}


def _scheme(file: Pieces) -> Scheme:
    """In which scheme the modules of a file are named; a fault where two schemes are mixed."""
    flat = [module.own for module in file.modules.values()]
    unet = [name.removeprefix("lora_unet_") for name in flat if name.startswith("lora_unet_")]
    sgm = [name for name in unet if diffusion_names.is_sgm(name)]
    ours = [name for name in unet if not diffusion_names.is_sgm(name) and diffusion_names.unet_path(name)]
    once, numbered = ([name for name in flat if re.match(head, name)] for head in ("lora_te_", r"lora_te\d_"))
    dotted = [name for name in flat if "." in name]
    for one, other in ((sgm, ours), (once, numbered), (dotted, [name for name in flat if "." not in name])):
        if one and other:
            file.faults.add(f"{one[0]} and {other[0]}", "modules named in two schemes; a file is of one model")
    return Scheme(
        sgm=bool(sgm),
        narrow="output_blocks_2_1_conv" in sgm,
        numbered=bool(numbered),
        second=any(name.startswith("lora_te2_encoder_block_") for name in flat),
        lycoris=any(name.startswith("lycoris_") for name in flat),
    )


def write(adapter: Writable) -> Mapping[str, Part]:
    """One file; ss_network_dim, ss_network_alpha and those of convolutions say what its tensors do.

    Raises TunerError for what is no LoRA, AdapterError for modules that no flat name is known of, with their names.
    """
    same = adapter.layout.format == _NAME
    words = adapter.layout.names if same else None
    scheme = scheme_of(adapter.sites) if words is None else Scheme(**dict.fromkeys(words.split(), True))
    flat = scheme.flat([name for name in adapter.sites if not FLAT.match(name)])
    names = {name: flat.get(name, name) for name in adapter.sites}
    tensors = written(adapter, names, "a kohya file", ("lora_down", "lora_up"))
    header = _network(adapter, adapter.layout.header if same else {})
    return {"": Part({**tensors, **(adapter.layout.apart if same else {})}, header)}


def _network(adapter: Writable, header: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the ranks and alphas of these modules; "Dynamic" where they differ, as sd-scripts has it."""
    said = dict(header)
    said.setdefault("ss_network_module", "networks.lora")
    kinds = {name: _has_kernel(adapter, name) for name in adapter.sites}
    said["ss_network_dim"], said["ss_network_alpha"] = _common(
        adapter, [name for name, conv in kinds.items() if not conv]
    )
    arguments = _arguments(said)
    if "algo" in arguments:  # LyCORIS' name of a LoRA with convolutions
        arguments["algo"] = "locon"
        said["ss_network_args"] = json.dumps(arguments)
    if any(kinds.values()) or "conv_dim" in arguments:
        conv = _common(adapter, [name for name, is_conv in kinds.items() if is_conv])
        said["ss_network_args"] = json.dumps({**arguments, "conv_dim": conv[0], "conv_alpha": conv[1]})
    return said


def _common(adapter: Writable, names: Collection[str]) -> tuple[str, str]:
    ranks = {adapter.sites[name].rank or 0 for name in names}
    alphas = {round((adapter.sites[name].scale or 0.0) * (adapter.sites[name].rank or 0), 6) for name in names}
    dim, alpha = (f"{min(values):g}" if len(values) == 1 else "Dynamic" for values in (ranks, alphas))
    return dim, alpha


def _has_kernel(adapter: Writable, name: str) -> bool:
    A = adapter.tensors[adapter.sites[name].keys[adapter.sites[name].pair[0]]]
    return any(size > 1 for size in A.shape[2:])


def _arguments(header: Mapping[str, str]) -> dict[str, object]:
    try:
        arguments = json.loads(header.get("ss_network_args") or "{}")
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
