"""An adapter out of two checkpoints: the difference of every layer as factors, as few as will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.cutting import factored
from lora_lab.adapters.files.converting import DTYPES
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank, all_finite
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError, OptionError, shorten
from lora_lab.files.trust import Origin
from lora_lab.fusing.adding import same_bits
from lora_lab.fusing.checkpoints.layout import Layout
from lora_lab.fusing.fitting import is_coded
from lora_lab.fusing.fuse import layout_of
from lora_lab.fusing.measuring import effective_dtype
from lora_lab.options import check_options, option
from lora_lab.results.result import versions

BYTES_A_SECOND = 150e6
"""About as many of both checkpoints are read and cut, on one core."""
_FIRST_RANK = 64
"""At which the leading directions of a large matrix are looked for first, and twice as many each time after."""
_SMALL = 1024
"""Rows or columns up to which all singular values are computed."""
_ABOVE_NOISE = 2.0
"""Times the largest singular value that rounding alone is expected to make."""
_LINEAR, _EMBEDDINGS, _CONVOLUTIONS = ("Linear", "Conv1D"), ("Embedding",), ("Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class ExtractOptions:
    """How much of each difference is kept; OptionError for what cannot be."""

    rank: int | None = option(
        None, "Ranks of every module; the most of them with energy or ratio.", least=1, title="the rank"
    )
    energy: float | None = option(None, "Share of every module's ‖ΔW‖² to keep.", above=0, most=1)
    ratio: float | None = option(
        None, "Keep singular values above the module's largest divided by this (kohya's sv_ratio).", least=1
    )
    keep_whole: bool = option(False, "Save what is no layer's weight (norms, biases, resized embeddings) whole.")
    dtype: str = option(
        "float32", "float32, bfloat16 or float16 (fp32, bf16, fp16), of the file.", choices=lambda: DTYPES
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.rank is None and self.energy is None and self.ratio is None:
            raise OptionError("say how much of the differences is kept: `rank`, `energy` or `ratio`")


@dataclass(frozen=True)
class Left:
    """A parameter that differs and is not in the adapter's factors."""

    parameter: str
    why: str
    share: float | None = None
    """‖difference‖ / ‖W‖; None where there is none."""
    whole: bool = False
    """Whether the adapter has the tuned tensor whole."""


@dataclass(frozen=True, repr=False)
class Extracted(Brief):
    """An adapter, and what of the differences it holds."""

    adapter: Adapter
    error: float
    """‖difference − ΔW‖ / ‖difference‖ over all modules of the adapter."""
    errors: Mapping[str, float]
    """Module → the same for it."""
    ranks: Mapping[str, int]
    left: Sequence[Left]
    equal: int
    """Parameters that are the same in both, or differ by the rounding of a cast."""


@dataclass
class _Sums:
    """What is collected on the way through the checkpoints."""

    updates: dict[str, LowRank] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    equal: int = 0


def extract(
    base: Path,
    tuned: Path,
    options: ExtractOptions,
    *,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """The LoRA adapter whose ΔW is tuned − base, cut as `options` say; one weight of each is in memory at a time.

    Directions within the rounding of the tuned weights are no part of it, so that base + ΔW of rank r gives rank r.
    Up to 1024 rows or columns a cut is the best of its rank; beyond, nearly (see `cutting.factored`). MismatchError
    where no weight of a layer differs, or the checkpoints are of different models.
    """
    before, after = layout_of(base), layout_of(tuned)
    _check_alike(before, after, base, tuned)
    sums = _Sums()
    names = [name for name in dict.fromkeys([*before.groups, *before.tied, *after.groups]) if _own(name, before, after)]
    for done, name in enumerate(names, 1):
        _compare(name, before, after, options, device or torch.device("cpu"), sums)
        if progress:
            progress(done, len(names))
    if not sums.updates:
        odd = f"; what differs is {shorten(left.parameter for left in sums.left)}" if sums.left else ""
        raise MismatchError(f"{tuned}: no weight of a layer differs from {base}{odd}")
    total = math.sqrt(math.fsum(norm**2 for norm in sums.norms.values()))
    lost = math.sqrt(math.fsum((sums.errors[name] * norm) ** 2 for name, norm in sums.norms.items()))
    made = _adapter(base, tuned, before, after, options, sums)
    ranks = {name: update.rank for name, update in sums.updates.items()}
    settings = {name: value for name, value in vars(options).items() if value is not None}
    record = {"extract": {**settings, "error": lost / total, "versions": versions()}}
    made = replace(made, record=record, origin=Origin(own=True))
    return Extracted(made, lost / total, sums.errors, ranks, sums.left, sums.equal)


def cut(
    delta: Tensor, noise: float, *, rank: int | None = None, energy: float | None = None, ratio: float | None = None
) -> LowRank | None:
    """The leading directions of a matrix: at most `rank`, as many as the share `energy` of ‖ΔW‖² takes, those whose
    singular value is above the largest / `ratio`, and none at or below `noise`; None where none is left.
    """
    limit = min(delta.flatten(1).shape)
    most = min(limit, rank or limit)
    total = _norm(delta) ** 2
    tried = most if limit <= _SMALL else min(most, _FIRST_RANK)
    while True:
        whole = tried >= limit or limit <= _SMALL
        leading = factored(delta)[0] if whole else factored(delta, tried)[0]
        S = leading.singular_values()[:tried]
        wanted = [int((noise < S).sum())]
        if ratio is not None:
            wanted.append(int((float(S[0]) / ratio < S).sum()) if len(S) else 0)
        if energy is not None:
            reached = S.square().cumsum(0) >= energy * total * (1 - 1e-12)
            wanted.append(int(reached.int().argmax()) + 1 if bool(reached.any()) else limit)
        count = min(*wanted, most)
        if count < len(S) or tried >= most:
            return leading.truncate(count)[0] if count else None
        tried = min(most, 2 * tried)


def noise_of(tuned: Tensor, delta: Tensor | None = None) -> float:
    """About the largest singular value that rounding of such a weight, and of a ΔW added to it, makes.

    Errors are even within half a step, of r.m.s. 0.22 eps |w|; a random matrix of entries σ has σ (√m + √n). Of ΔW
    there are four: of its sum over the ranks, of its scale, of the sum, and of the difference that is taken here.
    """
    rows, columns = tuned.flatten(1).shape
    size = _norm(tuned) ** 2 + (4 * _norm(delta) ** 2 if delta is not None else 0.0)
    sigma = 0.22 * torch.finfo(effective_dtype(tuned)).eps * math.sqrt(size / max(1, rows * columns))
    return _ABOVE_NOISE * sigma * (math.sqrt(rows) + math.sqrt(columns))


def _own(name: str, before: Layout, after: Layout) -> bool:
    """Whether a parameter has a tensor of its own in either checkpoint."""
    return name in before.groups or name in after.groups


def _compare(
    name: str, before: Layout, after: Layout, options: ExtractOptions, device: torch.device, sums: _Sums
) -> None:
    shapes = before.shape(name), after.shape(name)
    if shapes[1] is None or shapes[0] is None:
        sums.left.append(Left(name, "only in the base" if shapes[1] is None else "only in the tuned checkpoint"))
        return
    if shapes[0] != shapes[1]:
        sums.left.append(Left(name, f"{list(shapes[1])}, and {list(shapes[0])} in the base"))
        return
    base, tuned = before.read(name), after.read(name)
    if same_bits(base, tuned) or same_bits(base.to(tuned.dtype), tuned):
        sums.equal += 1
        return
    for tensor, where in ((base, before), (tuned, after)):
        if is_coded(tensor.dtype):
            path = where.checkpoint.paths[0].parent
            raise MismatchError(f"{path}: {name} is {_words(tensor.dtype)}, quantised: it cannot be compared")
    module, _, last = name.rpartition(".")
    kind = _kind(after, module, len(shapes[0])) if last == "weight" else None
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    delta = tuned.to(device, wide, copy=True).sub_(base.to(device))
    size, norm = _norm(base), _norm(delta)
    share = norm / size if size else None
    if kind is None:
        stacked = delta.ndim == 3 and last != "weight"
        why = f"a stack of {len(delta)} weights (experts)" if stacked else "no weight of a layer that LoRA knows"
        sums.left.append(Left(name, why, share))
        return
    how: dict[str, Any] = {"rank": options.rank, "energy": options.energy, "ratio": options.ratio}
    update = cut(delta, noise_of(tuned, delta), **how)
    if update is None:  # the rounding of another way to the same weights
        sums.equal += 1
        return
    A, B = (_cast(part, options.dtype, name).cpu() for part in (update.A, update.B))
    stored = LowRank(A, B, update.shape)
    sums.norms[module] = norm
    sums.errors[module] = _norm(delta.sub_(stored.delta().to(delta))) / norm
    sums.updates[module], sums.kinds[module] = stored, kind


def _cast(factor: Tensor, dtype: str, name: str) -> Tensor:
    cast = factor.to(DTYPES[dtype]).float()
    if not all_finite(cast):
        raise OptionError(f"{name} has entries that {dtype} cannot hold; float32 can")
    return cast


def _kind(layout: Layout, module: str, dimensions: int) -> str | None:
    """linear, conv1d-gpt, embedding or conv1d … conv3d; None for what LoRA has no layer for."""
    layer = layout.modules.get(module)
    if layer is None:
        return None if layout.model is not None or not 2 <= dimensions <= 5 else _by_shape(dimensions)
    kinds = {cls.__name__ for cls in type(layer).__mro__}
    if kinds & set(_CONVOLUTIONS):
        return _by_shape(dimensions) if getattr(layer, "groups", 1) == 1 else None
    if kinds & set(_EMBEDDINGS):
        return "embedding"
    if "Conv1D" in kinds:
        return "conv1d-gpt"
    return "linear" if "Linear" in kinds else None


def _by_shape(dimensions: int) -> str:
    return "linear" if dimensions == 2 else f"conv{dimensions - 2}d"


def _adapter(base: Path, tuned: Path, before: Layout, after: Layout, options: ExtractOptions, sums: _Sums) -> Adapter:
    """The adapter in its dtype, with whole tensors where they are asked for."""
    turned = "conv1d-gpt" in sums.kinds.values()
    updates = {
        # a file says once for all layers how their weights are stored
        name: LowRank(u.B.T.contiguous(), u.A.T.contiguous()) if turned and sums.kinds[name] == "linear" else u
        for name, u in sums.updates.items()
    }
    sites = {name: Site(name, "embedding", {}) for name, kind in sums.kinds.items() if kind == "embedding"}
    config = {"base_model_name_or_path": str(base), "fan_in_fan_out": turned, "bias": "none"}
    everything = {module: Site(module, "linear", {}) for module in after.modules if module not in sums.updates}
    like = Adapter({}, config, {**everything, **sites}, {}, str(tuned))
    made = from_updates(updates, like=like, source=f"{tuned.name} − {base.name}")
    tensors = {key: tensor.to(DTYPES[options.dtype]) for key, tensor in made.tensors.items()}
    settings = dict(made.config)
    if options.keep_whole:
        tensors |= _whole(after, settings, sums)
    return replace(made, tensors=tensors, config=settings)


def _whole(after: Layout, settings: dict[str, Any], sums: _Sums) -> dict[str, Tensor]:
    """The tuned tensors of what is left, by PEFT's keys; `settings` are told of them."""
    whole: dict[str, Tensor] = {}
    saved: list[str] = []
    for i, left in enumerate(sums.left):
        module, _, last = left.parameter.rpartition(".")
        if after.shape(left.parameter) is None or not module:
            continue
        if module in sums.updates:
            if last != "bias":
                continue
            settings["bias"] = "all"
            whole[f"{PREFIX}{module}.base_layer.bias"] = after.read(left.parameter)
        else:
            # PEFT takes the ends of names: another module's whose name ends in this one would be looked for, too
            if any(name != module and name.endswith(module) for name in after.modules):
                continue
            saved.append(module)
            whole |= {f"{PREFIX}{name}": after.read(name) for name in after.parameters_of(module)}
        sums.left[i] = replace(left, whole=True)
    if saved:
        settings["modules_to_save"] = sorted(set(saved))
    return {key: tensor.contiguous() for key, tensor in whole.items()}


def _check_alike(before: Layout, after: Layout, base: Path, tuned: Path) -> None:
    shared = before.groups.keys() & after.groups.keys()
    if not shared:
        mine, theirs = (next(iter(layout.groups), "nothing") for layout in (before, after))
        raise MismatchError(f"{base} and {tuned} have no parameter in common: {mine}, and {theirs}")
    same = [name for name in shared if before.shape(name) == after.shape(name)]
    if not same:
        name = min(shared)
        raise MismatchError(
            f"{base} and {tuned} are models of different sizes: {name} is {list(before.shape(name) or ())} and "
            f"{list(after.shape(name) or ())}"
        )


def _norm(tensor: Tensor) -> float:
    """Its Frobenius norm, summed in float64 without a copy."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
