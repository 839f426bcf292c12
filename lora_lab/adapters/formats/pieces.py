"""Files whose keys are a module's name and a piece of its update (X.lora_down.weight, X.alpha), taken apart.

Kohya's, ComfyUI's and LyCORIS' files are such; they differ in the names of their modules and in the pieces. What is
wrong is told with the file's own keys.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lab.adapters.formats.carried import require
from lora_lab.adapters.formats.diffusion.components import numbers_for
from lora_lab.adapters.formats.keys import PREFIX, odd_content, unusable
from lora_lab.adapters.formats.layout import Content, Layout, Writable
from lora_lab.adapters.formats.peft.peft_config import exact_targets
from lora_lab.brief import Brief
from lora_lab.errors import AdapterError, shorten

LORA = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_mid.weight": "mid",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "alpha": "alpha",
}
"""How the key of a LoRA's tensor ends → which piece it is."""

_OF_A_MODEL = re.compile(r"(lora|lycoris|oft|boft)_|(diffusion_model|transformer|unet|text_encoders?(_\d)?)\.")
"""How keys begin that name a part of a model: whatever else they say, such a tensor changes it."""

Rename = Callable[[Collection[str]], Mapping[str, str | None]]
"""The modules' names in a file → the canonical ones; None for one that stays as it is."""


@dataclass(frozen=True, repr=False)
class Module(Brief):
    """One module of a file."""

    own: str
    """Its name there."""
    pieces: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Piece → its key in the file."""


class Faults:
    """What is wrong, by its kind: one line for all tensors with the same fault."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, fault: str) -> None:
        """Note a fault of a tensor or a module."""
        self._names[fault].append(name)

    def lines(self) -> list[str]:
        """A line for each kind, with the tensors that have it."""
        return [f"{shorten(names)}: {fault}" for fault, names in self._names.items()]


@dataclass(repr=False)
class Pieces(Brief):
    """A file taken apart."""

    modules: dict[str, Module] = field(default_factory=dict)
    """By canonical name."""
    apart: dict[str, Tensor] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    notes: list[str] = field(default_factory=list)


def split(key: str, ends: Mapping[str, str] = LORA) -> tuple[str, str] | None:
    """Module and piece of a key; None where it ends in none of `ends`."""
    at = key.find(".")
    while at > 0:
        piece = ends.get(key[at + 1 :])
        if piece is not None:
            return key[:at], piece
        at = key.find(".", at + 1)
    return None


def taken_apart(tensors: Mapping[str, Tensor], rename: Rename, ends: Mapping[str, str] = LORA) -> Pieces:
    """The pieces by module, under canonical names; what is no piece is a fault where it changes a model, else apart."""
    file = Pieces()
    bad_name = unusable(tensors)
    if bad_name:
        file.faults.add("keys", bad_name)
        return file
    own: dict[str, Module] = {}
    for key, tensor in tensors.items():
        place = split(key, ends)
        if place is None:
            if _OF_A_MODEL.match(key) or odd_content(key):
                file.faults.add(key, "changes the model in a way that is not known here, so ΔW would be another one")
            else:
                file.apart[key] = tensor
            continue
        name, piece = place
        module = own.setdefault(name, Module(name))
        if piece in module.pieces:
            file.faults.add(f"{module.keys[piece]} and {key}", "two tensors for one place")
        module.pieces[piece], module.keys[piece] = tensor, key
    names = rename(own)
    for name, module in own.items():
        canonical = names[name] or name
        if canonical in file.modules:
            file.faults.add(f"{file.modules[canonical].own} and {name}", "two names of one module")
        file.modules[canonical] = module
    if file.apart:
        file.notes.append(
            f"{len(file.apart)} tensors that belong to no module are kept as they are: {shorten(file.apart)}"
        )
    unread = [name for name in own if names[name] is None]
    if unread:
        file.notes.append(f"{len(unread)} names of modules are not known and stay as they are: {shorten(unread)}")
    return file


def alphas_of(file: Pieces, ranks: Mapping[str, int], given: float | None) -> dict[str, float]:
    """Module → lora_alpha: of its tensor, else as given, else its rank; with notes and faults of the tensors."""
    alphas: dict[str, float] = {}
    without = []
    for name in ranks:
        module = file.modules[name]
        tensor = module.pieces.get("alpha")
        if tensor is None:
            without.append(name)
        elif tensor.numel() != 1 or tensor.is_complex():
            file.faults.add(module.keys["alpha"], f"an alpha of shape {list(tensor.shape)}; one number belongs there")
        elif not math.isfinite(float(tensor)):
            file.faults.add(module.keys["alpha"], f"an alpha of {float(tensor)}; a finite number belongs there")
        elif float(tensor) == 0:
            file.faults.add(
                module.keys["alpha"],
                "an alpha of 0, which some programs take for no update and some for the rank; what is meant belongs "
                "there",
            )
        else:
            alphas[name] = float(tensor)
    if given is not None and alphas:
        file.notes.append(f"alpha {given:g} is not used where the file has alpha tensors")
    if without and given is None:
        file.notes.append(
            f"{len(without)} of {len(ranks)} modules have no alpha tensor: scale 1 is assumed for them, as "
            f"trainers and user interfaces do; `alpha` says another one"
        )
    return {**{name: float(ranks[name]) if given is None else given for name in without}, **alphas}


def lora_content(file: Pieces, given: float | None, layout: Layout) -> Content:
    """The file as a plain or DoRA adapter in PEFT's terms; convolutions with a core (lora_mid) as the same product."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    magnitudes = False
    for name, module in file.modules.items():
        pair = factors(module, file.faults)
        if pair is None:
            continue
        A, B = pair
        ranks[name] = len(A)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B
        if "dora_scale" in module.pieces:
            scale = magnitude(module, len(B), A.ndim, file.faults)
            if scale is not None:
                magnitudes = True
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = scale
    alphas = alphas_of(file, ranks, given)
    problems = file.faults.lines()
    if problems:
        return Content({}, {}, layout, file.notes, problems)
    config = {"peft_type": "LORA", **numbers_for(ranks, alphas), "target_modules": exact_targets(ranks, ())}
    if magnitudes:
        config["use_dora"] = True
    return Content(tensors, config, layout, file.notes)


def factors(module: Module, faults: Faults) -> tuple[Tensor, Tensor] | None:
    """A and B as PEFT keeps them, from lora_down, lora_up and lora_mid; None, with a fault, where they are no pair.

    A core makes of two 1 × 1 convolutions one of rank r over a kernel: A[a, i, h, w] = Σ_b mid[a, b, h, w] down[b, i].
    """
    down, up, mid = (module.pieces.get(piece) for piece in ("down", "up", "mid"))
    if down is None or up is None:
        halves = [module.keys[piece] for piece in ("down", "up", "mid") if piece in module.keys]
        faults.add(
            halves[0] if halves else module.keys.get("alpha", module.own),
            "half of its pair is missing" if halves else "the factors that it belongs to are missing",
        )
        return None
    shapes = [list(piece.shape) for piece in (down, up, mid) if piece is not None]
    shown = " and ".join(map(str, shapes))
    if not all(piece.is_floating_point() for piece in (down, up, mid) if piece is not None):
        faults.add(module.own, f"factors of {down.dtype} and {up.dtype}; floating point is needed")
        return None
    if down.ndim == 2 and up.ndim > 2:
        down = down.reshape(*down.shape, *[1] * (up.ndim - 2))
    if up.ndim == 2 and down.ndim > 2:
        up = up.reshape(*up.shape, *[1] * (down.ndim - 2))
    if (
        min(down.ndim, up.ndim) < 2
        or down.ndim != up.ndim
        or not down.numel()
        or not up.numel()
        or up.shape[1] != len(down)
        or any(size != 1 for size in up.shape[2:])
    ):
        faults.add(module.own, f"lora_down and lora_up of shapes {shown} are no pair")
        return None
    if mid is None:
        return down, up
    if mid.ndim != down.ndim or mid.shape[:2] != (len(down), len(down)) or any(size != 1 for size in down.shape[2:]):
        faults.add(module.own, f"lora_down, lora_up and lora_mid of shapes {shown} do not fit together")
        return None
    core = torch.einsum("abk,bi->aik", mid.flatten(2).double(), down.flatten(1).double())
    dtype = torch.float64 if torch.float64 in (down.dtype, mid.dtype) else torch.float32
    return core.reshape(len(down), down.shape[1], *mid.shape[2:]).to(dtype), up.to(dtype)


def magnitude(module: Module, rows: int, ndim: int, faults: Faults) -> Tensor | None:
    """PEFT's magnitude, one number for each output, from dora_scale [outputs, 1, …]."""
    scale = module.pieces["dora_scale"]
    if scale.numel() == rows and scale.shape[:1] == (rows,) and scale.is_floating_point():
        return scale.reshape(rows) if ndim == 2 else scale.reshape(1, rows, *[1] * (ndim - 2))
    if scale.ndim > 1 and len(scale) == 1 and scale.is_floating_point():
        faults.add(
            module.keys["dora_scale"],
            "a DoRA magnitude for each input (an older form), which PEFT's DoRA cannot express: its magnitudes belong "
            "to outputs; `lycoris` or ComfyUI can merge it into its base model",
        )
    else:
        faults.add(module.keys["dora_scale"], f"a DoRA magnitude of shape {list(scale.shape)} for {rows} outputs")
    return None


def written(
    adapter: Writable, names: Mapping[str, str | None], form: str, halves: tuple[str, str]
) -> dict[str, Tensor]:
    """The tensors of a plain or DoRA adapter under these names of its modules, each with its alpha.

    `form`, as in "a kohya file", is for messages. Raises TunerError and AdapterError, naming what it cannot carry.
    """
    require(adapter, form, kinds=("linear", "conv1d", "conv2d", "conv3d"), parts=("lora_magnitude_vector",))
    unnamed = [name for name in names if names[name] is None]
    if unnamed:
        raise AdapterError(
            f"{form} has no name that is known for {len(unnamed)} of {len(names)} modules: {shorten(unnamed, 8)}"
        )
    tensors: dict[str, Tensor] = {}
    for name, site in adapter.sites.items():
        A, B = (adapter.tensors[site.keys[part]] for part in site.pair)
        times = site.scale
        if not times:  # an alpha of 0 is taken for the rank by some programs: no update is a factor of zeros
            times, B = 1.0, torch.zeros_like(B)
        tensors[f"{names[name]}.{halves[0]}.weight"] = A
        tensors[f"{names[name]}.{halves[1]}.weight"] = B
        tensors[f"{names[name]}.alpha"] = torch.tensor(times * len(A), dtype=torch.float32)
        if "lora_magnitude_vector" in site.keys:
            scale = adapter.tensors[site.keys["lora_magnitude_vector"]]
            tensors[f"{names[name]}.dora_scale"] = scale.reshape(-1, *[1] * (A.ndim - 1))
    return tensors
