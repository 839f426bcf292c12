"""LyCORIS' files (and those of trainers that use it): LoHa, LoKr, whole differences, GLoRA, IA³ and their like; read.

A file of one kind becomes the tuner of PEFT's that has the same ΔW. Where kinds are mixed, or PEFT has none, and ΔW is
known without the base model, it becomes a plain LoRA of the same ΔW, of the rank that ΔW has. Everything else is
refused by name. Formulas: Yeh et al. 2024, arXiv:2309.14859, and the package's own (its 4.x).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lora_lab.adapters.cutting import factored
from lora_lab.adapters.formats import products
from lora_lab.adapters.formats.diffusion import comfy, kohya
from lora_lab.adapters.formats.diffusion.components import numbers_for
from lora_lab.adapters.formats.diffusion.diffusion_names import kernel_of, modules_of
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.layout import Content, Layout, Raw
from lora_lab.adapters.formats.peft.peft_config import exact_targets
from lora_lab.adapters.formats.pieces import (
    LORA,
    Module,
    Pieces,
    alphas_of,
    factors,
    lora_content,
    magnitude,
    split,
    taken_apart,
)
from lora_lab.adapters.formats.products import wide
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import AdapterError, shorten

if TYPE_CHECKING:
    from torch import Tensor

_GLORA = {f"{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")}
_ENDS = {
    **LORA,
    **{part: part for part in (*products.LOHA, *products.LOKR)},
    **_GLORA,
    "lokr_t1": "lokr_t1",
    "diff": "diff",
    "weight": "weight",
    "on_input": "on_input",
    **{part: part for part in ("oft_blocks", "oft_diag", "rescale", "diff_b", "b_norm", "w_norm", "scalar")},
}
"""How a key ends → which piece of its module it is."""

_REFUSED = {
    "oft_blocks": "turns the outputs of the base weight (OFT, BOFT), which no tuner of PEFT does; its own trainer, or "
    "ComfyUI, can merge it into the base model",
    "diff_b": "a change of a bias, which an adapter of weights cannot hold",
    "w_norm": "a change of a norm's weight, which an adapter of matrices cannot hold; training without norms "
    "(train_norm) makes a file without it",
    "scalar": "a factor of ΔW that the file should have multiplied in (use_scalar); it is not used here",
    "lokr_t1": "a core of LoKr's first product, which LyCORIS never uses",
}
_REFUSED |= {"oft_diag": _REFUSED["oft_blocks"], "rescale": _REFUSED["oft_blocks"], "b_norm": _REFUSED["w_norm"]}
"""Piece that has no ΔW, or none without the base → why it is refused."""

_KINDS = {"loha": products.LOHA, "lokr": products.LOKR, "lora": ("down", "up", "mid"), "full": ("diff",)}
_KINDS |= {"glora": tuple(_GLORA.values()), "ia3": ("weight", "on_input")}
"""Kind of a module → the pieces that it is known by."""


def matches(raw: Raw) -> bool:
    """By a piece that only these files have, outside of PEFT's own format."""
    if raw.settings is not None:
        return False
    telling = set(_ENDS.values()).difference(LORA.values(), _GLORA.values(), {"weight", "scalar", "rescale"})
    pieces = {place[1] for key in raw.tensors if not key.startswith(PREFIX) and (place := split(key, _ENDS))}
    return not telling.isdisjoint(pieces) or pieces.issuperset({"a1", "a2", "b1", "b2"})


def read(raw: Raw) -> Content:
    """The adapter as LOHA, LOKR or IA3, or as a LoRA of the same ΔW, where it is not of one kind."""
    file = taken_apart(raw.tensors, _names, _ENDS)
    flat = any("." not in module.own for module in file.modules.values())
    layout = kohya.layout_of(file, raw) if flat else comfy.layout_of(file, raw)
    kinds = {name: _kind(module, file) for name, module in file.modules.items()}
    problems = file.faults.lines()
    if problems:
        return Content({}, {}, layout, file.notes, problems)
    said, magnitudes = set(kinds.values()), [n for n, module in file.modules.items() if "dora_scale" in module.pieces]
    if said == {"lora"}:
        return lora_content(file, raw.alpha, layout)
    if said == {"ia3"}:
        return _ia3(file, layout)
    if "ia3" in said:
        some = [file.modules[name].own for name, kind in kinds.items() if kind == "ia3"]
        return Content({}, {}, layout, file.notes, [f"{shorten(some)}: IA³ beside other kinds; PEFT has no such tuner"])
    if said in ({"loha"}, {"lokr"}) and not magnitudes:
        return _products(file, raw.alpha, layout, said.pop())
    return _as_lora(file, kinds, raw.alpha, layout)


def _names(names: Collection[str]) -> dict[str, str | None]:
    """The canonical names of flat modules and of dotted ones."""
    flat = [name for name in names if "." not in name]
    return {**comfy.modules_of([name for name in names if "." in name]), **modules_of(flat)}


def _kind(module: Module, file: Pieces) -> str:
    """Which kind of update a module has; faults for what is refused and for two kinds of one module."""
    for piece, why in _REFUSED.items():
        if piece in module.pieces:
            file.faults.add(module.keys[piece], why)
    kinds = [kind for kind, pieces in _KINDS.items() if not module.pieces.keys().isdisjoint(pieces)]
    if len(kinds) > 1:
        file.faults.add(module.own, f"is {' and '.join(kinds)} at once")
    if not kinds and module.pieces.keys().isdisjoint(_REFUSED):
        file.faults.add(next(iter(module.keys.values())), "the tensors that it belongs to are missing")
    for tensor in module.pieces.values():
        if kinds and kinds != ["ia3"] and not tensor.is_floating_point():
            file.faults.add(module.own, f"tensors of {tensor.dtype}; floating point is needed")
            break
    return kinds[0] if kinds else ""


def _rank(module: Module) -> int:
    """The rank by which alpha is divided; 1 where nothing is factored, whose scale is 1 whatever alpha says.

    That is r of W = a b in both forms: [rows, r] by [r, columns], and with a core [r, rows], [r, columns].
    """
    for piece in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b", "down"):
        if piece in module.pieces:
            return len(module.pieces[piece]) if module.pieces[piece].ndim else 1
    return min(module.pieces["b1"].shape[:2], default=1) if "b1" in module.pieces else 1


def _scales(file: Pieces, kinds: Mapping[str, str], given: float | None) -> dict[str, float]:
    """alpha / rank of every module; 1 of a whole difference and of a LoKr of two whole matrices, as LyCORIS has it."""
    modules = file.modules.items()
    ranks = {name: _rank(module) for name, module in modules if kinds[name] != "full" and not _is_whole(module)}
    alphas = alphas_of(file, ranks, given)
    return {name: alphas.get(name, 1.0) / ranks[name] if name in ranks else 1.0 for name in file.modules}


def _is_whole(module: Module) -> bool:
    return {"lokr_w1", "lokr_w2"}.issubset(module.pieces)


def _products(file: Pieces, given: float | None, layout: Layout, kind: str) -> Content:
    """LOHA or LOKR in PEFT's terms: the same tensors, and the fields by which PEFT builds layers for them."""
    scales = _scales(file, dict.fromkeys(file.modules, kind), given)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    wrong: dict[object, str] = {}
    for name, module in file.modules.items():
        parts = {piece: tensor for piece, tensor in module.pieces.items() if piece != "alpha"}
        shapes = tuple(sorted((piece, tuple(tensor.shape)) for piece, tensor in parts.items()))
        if shapes not in wrong:  # most modules have the shapes of another one
            wrong[shapes] = _misfit(parts, kind)
        if wrong[shapes]:
            file.faults.add(module.own, wrong[shapes])
        tensors |= {f"{PREFIX}{name}.{piece}": tensor for piece, tensor in parts.items()}
        if "lokr_w2_b" in parts:  # over a kernel, which PEFT keeps flat
            tensors[f"{PREFIX}{name}.lokr_w2_b"] = parts["lokr_w2_b"].flatten(1)
        # PEFT keeps a whole second matrix at ranks that are no smaller than half of it
        ranks[name] = max(parts["lokr_w2"].shape[:2], default=1) if _is_whole(module) else _rank(module)
    problems = file.faults.lines()
    if problems:
        return Content({}, {}, layout, file.notes, problems)
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    pieces = {piece for module in file.modules.values() for piece in module.pieces}
    config = {
        "peft_type": kind.upper(),
        **numbers_for(ranks, alphas, "alpha"),
        "target_modules": exact_targets(ranks, ()),
        "use_effective_conv2d": not pieces.isdisjoint({"hada_t1", "lokr_t2"}),
    }
    if kind == "lokr":
        factor = _decompose_factor(file)
        config |= {"decompose_both": "lokr_w1_a" in pieces, "decompose_factor": -1 if factor is None else factor}
        if factor is None:
            file.notes.append(
                "its matrices are split in a way that PEFT's LoKr layers are not (one decompose_factor for all): ΔW is "
                "known, but PEFT cannot load the tensors"
            )
    return Content(tensors, config, layout, file.notes)


def _misfit(parts: Mapping[str, Tensor], kind: str) -> str:
    """Why tensors of these shapes make no ΔW; '' where they do. Nothing is computed."""
    try:
        products.PRODUCTS[kind.upper()]({piece: tensor.to("meta") for piece, tensor in parts.items()}, 1.0, "its", ())
    except AdapterError as error:
        return str(error).removeprefix("its: ")
    return ""


def _decompose_factor(file: Pieces) -> int | None:
    """The factor at which PEFT splits every module's sizes as the file does; None where there is none."""
    sizes = set()
    for name, module in file.modules.items():
        first, second = (_sizes(module, stem) for stem in ("lokr_w1", "lokr_w2"))
        inner, kernel = second[1], math.prod(kernel_of(name))
        if "lokr_w2_b" in module.pieces and "lokr_t2" not in module.pieces and inner % kernel == 0:
            inner //= kernel
        sizes |= {(first[0], second[0]), (first[1], inner)}
    for factor in [-1, *sorted({small for small, _ in sizes} | {2, 4, 8, 16, 32})]:
        if all(_split(small * large, factor) == (small, large) for small, large in sizes):
            return factor
    return None


def _sizes(module: Module, stem: str) -> tuple[int, int]:
    """Rows and columns of one of LoKr's matrices, those of a convolution without its kernel where that is apart."""
    whole, a, b = (module.pieces.get(key) for key in (stem, f"{stem}_a", f"{stem}_b"))
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    assert a is not None
    assert b is not None
    return a.shape[1 if stem == "lokr_w2" and "lokr_t2" in module.pieces else 0], b.shape[1]


def _split(size: int, factor: int) -> tuple[int, int]:
    """The two factors that PEFT splits a size into: `factor` itself, or else the largest one up to it and to √size."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor < 0 else factor
    small = max(n for n in range(1, int(size**0.5) + 1) if size % n == 0 and n <= most)
    return small, size // small


def _as_lora(file: Pieces, kinds: Mapping[str, str], given: float | None, layout: Layout) -> Content:
    """A plain or DoRA adapter with the ΔW of every module, whose kinds may differ; scales go into the factors."""
    scales = _scales(file, kinds, given)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, module in file.modules.items():
        try:
            update = _update(module, kinds[name], name, scales[name], file)
        except AdapterError as error:
            file.faults.add(module.own, str(error).removeprefix(f"{module.own}: "))
            continue
        if update is None:
            continue
        ranks[name] = update.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.A.reshape(update.rank, *update.shape[1:]).contiguous()
        ones = [1] * (len(update.shape) - 2)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.B.reshape(*update.B.shape, *ones).contiguous()
        if "dora_scale" in module.pieces:
            scale = magnitude(module, len(update.B), len(update.shape), file.faults)
            tensors |= {} if scale is None else {f"{PREFIX}{name}.lora_magnitude_vector": scale}
    problems = file.faults.lines()
    if problems:
        return Content({}, {}, layout, file.notes, problems)
    told = ", ".join(sorted(set(kinds.values())))
    file.notes.append(f"{told} is read as a LoRA with the same ΔW, of ranks up to {max(ranks.values())}")
    config = {"peft_type": "LORA", **numbers_for(ranks, ranks), "target_modules": exact_targets(ranks, ())}
    if any("dora_scale" in module.pieces for module in file.modules.values()):
        config["use_dora"] = True
    return Content(tensors, config, layout, file.notes)


def _update(module: Module, kind: str, name: str, scale: float, file: Pieces) -> LowRank | None:
    """ΔW of one module; None, with a fault, where it is not known."""
    if kind in ("loha", "lokr"):
        return products.PRODUCTS[kind.upper()](module.pieces, scale, module.own, kernel_of(name))
    if kind == "full":
        if module.pieces["diff"].ndim < 2:
            file.faults.add(module.keys["diff"], "a change of a vector (of a norm?), which is no ΔW of a matrix")
            return None
        if "alpha" in module.pieces:
            file.notes.append(f"{module.keys['alpha']} is not used: a whole difference has no scale")
        return factored(wide(module.pieces["diff"]))[0]
    if kind == "glora":
        module = _glora(module, file)
    pair = factors(module, file.faults)
    if pair is None:
        return None
    A, B = (wide(factor) for factor in pair)
    return LowRank(A.flatten(1), B.flatten(1).to(A.dtype) * scale, (len(B), *A.shape[1:]))


def _glora(module: Module, file: Pieces) -> Module:
    """GLoRA's W A + B with its B as a LoRA's pair: b₁ b₂, or in files of the first version b₂ b₁."""
    a1, a2 = (module.pieces.get(piece) for piece in ("a1", "a2"))
    if a1 is not None and a2 is not None and bool(a1.any()) and bool(a2.any()):
        file.faults.add(
            f"{module.keys['a1']} and a2",
            "multiply the base weight (GLoRA), so that ΔW needs the base model; its own trainer, or ComfyUI, can merge "
            "it into that",
        )
    up, down = ("b1", "b2")
    b1, b2 = (module.pieces.get(piece) for piece in (up, down))
    if b1 is not None and b2 is not None and min(b1.ndim, b2.ndim) > 1 and b1.shape[0] < b1.shape[1]:
        up, down = down, up
    renamed = {"up": up, "down": down, "mid": "bm"}
    return Module(
        module.own,
        {piece: module.pieces[own] for piece, own in renamed.items() if own in module.pieces},
        {piece: module.keys[own] for piece, own in renamed.items() if own in module.keys},
    )


def _ia3(file: Pieces, layout: Layout) -> Content:
    """IA3 in PEFT's terms: its vectors are 1 + w, of W' = W (1 + w) by outputs, or by inputs where on_input says so."""
    tensors: dict[str, Tensor] = {}
    inputs = []
    for name, module in file.modules.items():
        weight, on_input = module.pieces.get("weight"), module.pieces.get("on_input")
        if weight is None or on_input is None or on_input.numel() != 1:
            file.faults.add(module.own, "of IA³, one weight and one number on_input belong together")
        elif weight.numel() != max(weight.shape, default=0) or not weight.is_floating_point():
            file.faults.add(module.keys["weight"], f"of shape {list(weight.shape)}; IA³ has a number a channel")
        else:
            size, ones = weight.numel(), [1] * max(0, weight.ndim - 2)
            if bool(on_input):
                inputs.append(name.partition(".")[2] or name)  # as an ending, which it is in a folder of one model, too
            conv_or_input = weight.ndim > 1 or bool(on_input)
            shape = [1, size, *ones] if conv_or_input else [size, 1]
            tensors[f"{PREFIX}{name}.ia3_l"] = (1 + wide(weight)).reshape(shape)
    if len(inputs) < len(file.modules):
        file.notes.append(
            "IA³ on outputs: PEFT multiplies a layer's bias, too, and LyCORIS its weight alone; they agree in layers "
            "without a bias"
        )
    config = {
        "peft_type": "IA3",
        "target_modules": exact_targets(file.modules, ()),
        "feedforward_modules": inputs,
    }
    return Content(tensors, config, layout, file.notes, file.faults.lines())
