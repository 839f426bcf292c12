"""What is merged: adapters with their exact ΔW, a weight for each of them in every module, and their tasks."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.cutting import factored
from lora_lab.adapters.formats.keys import natural_key
from lora_lab.adapters.formats.peft.peft_format import shape_of, update
from lora_lab.adapters.groups import locate
from lora_lab.adapters.lowrank import LowRank, is_finite
from lora_lab.adapters.models.attached import weight_deltas
from lora_lab.adapters.models.bases import check_shapes, same_base
from lora_lab.adapters.models.codes import require_weights
from lora_lab.errors import MismatchError, OptionError, TunerError, shorten
from lora_lab.hub import base_model
from lora_lab.options import checked
from lora_lab.scoring.examples import TaskSpec
from lora_lab.tasks.choosing import task_of
from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Weights:
    """A weight for each adapter, which may differ between modules: patterns first, then layers, then `plain`."""

    plain: tuple[float, ...]
    patterns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Regular expression searched in module names → weights; the first that matches counts."""
    layers: tuple[Mapping[int, float], ...] = ()
    """For each adapter, layer → weight at some layers: straight lines between them, constant beyond the ends."""

    @property
    def record(self) -> Any:
        """The weights in JSON types."""
        if self.layers:
            return [",".join(f"{layer}:{w:g}" for layer, w in sorted(points.items())) for points in self.layers]
        return {**self.patterns, "default": self.plain} if self.patterns else list(self.plain)

    def of(self, name: str, layer: int | None) -> list[float]:
        """The adapters' weights in a module; outside of all layers, the mean of a line's given points."""
        for pattern, weights in self.patterns.items():
            if re.search(pattern, name):
                return list(weights)
        if not self.layers:
            return list(self.plain)
        return [_on_line(points, layer) for points in self.layers]

    def check(self, count: int) -> None:
        """OptionError unless these are finite weights of so many adapters."""
        if self.layers and len(self.layers) != count:
            raise OptionError(
                f"{count} adapters and {len(self.layers)} lines of layer:weight; one line an adapter is needed"
            )
        lists = [self.plain, *self.patterns.values()]
        for weights in lists:
            if len(weights) != count:
                raise OptionError(f"{count} adapters and {len(weights)} weights; one weight an adapter is needed")
        for weight in itertools.chain(*lists, *(points.values() for points in self.layers)):
            if not math.isfinite(weight):
                raise OptionError(f"weights: {weight} is no weight; finite numbers are needed")


class Sources:
    """Adapters of one base model, ready to be merged.

    A module that an adapter leaves alone has ΔW = 0 there; `absent` tells of them. Adapters whose ΔW is not known from
    themselves (DoRA, HiRA …) need the model in `base`, against which their ΔW is exact. `tasks`, one an adapter, are
    for methods that look at data, whose models are run on `device`; modules are merged on `place`, each moved there
    when its turn comes. Raises MismatchError where base models, modules or shapes do not fit.
    """

    @checked
    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Weights | Sequence[float] | None = None,
        *,
        base: Callable[[], nn.Module] | None = None,
        tasks: Sequence[Task] | None = None,
        device: torch.device | None = None,
        place: torch.device | None = None,
    ) -> None:
        if not adapters:
            raise OptionError("no adapter was given")
        self.adapters, self.base = list(adapters), base
        self.tasks = list(tasks) if tasks is not None else None
        self.device, self.place = device or torch.device("cpu"), place or torch.device("cpu")
        self._progress: Callable[[int, int], None] | None = None
        self._weigh(weights)
        same_base(self.adapters, given=base is not None)
        self._exact = _exact(self.adapters, base)
        self._measure()

    def part(self, members: Sequence[int], weights: Weights | Sequence[float]) -> Sources:
        """Some of these adapters, by their places, with other weights; what is known of their ΔW is kept."""
        part = copy(self)
        part.adapters = [self.adapters[i] for i in members]
        part.tasks = [self.tasks[i] for i in members] if self.tasks is not None else None
        part._exact = {new: self._exact[old] for new, old in enumerate(members) if old in self._exact}
        part._weigh(weights)
        part._measure()
        return part

    def placed(self, place: torch.device) -> Sources:
        """The same, merged on another device."""
        same = copy(self)
        same.place = place
        return same

    def telling(self, progress: Callable[[int, int], None] | None) -> Sources:
        """The same, with whom a method that looks at data tells how far it is: (pieces done, pieces in all)."""
        same = copy(self)
        same._progress = progress
        return same

    def tell(self, done: int, total: int) -> None:
        """Tell how far it is, where somebody wants to know."""
        if self._progress:
            self._progress(done, total)

    def replaced(self, others: Mapping[int, Adapter]) -> Sources:
        """With other adapters, plain LoRAs of the same modules, at some places."""
        changed = copy(self)
        changed.adapters = [others.get(i, adapter) for i, adapter in enumerate(self.adapters)]
        changed._exact = {i: exact for i, exact in self._exact.items() if i not in others}
        changed._measure()
        return changed

    def _weigh(self, weights: Weights | Sequence[float] | None) -> None:
        count = len(self.adapters)
        if weights is None:
            weights = (1.0,) * count
        self.weights = weights if isinstance(weights, Weights) else Weights(tuple(weights))
        self.weights.check(count)

    def _measure(self) -> None:
        """Take the modules' shapes and layers; OptionError for a pattern of weights that is of none of them."""
        self.shapes = self._shapes()
        self._layers = {name: spot.layer for name, spot in locate(list(self.shapes)).items()}
        for pattern in self.weights.patterns:
            if not any(re.search(pattern, name) for name in self.shapes):
                raise OptionError(f"weights: {pattern!r} matches no module; there are: {shorten(self.shapes)}")

    @property
    def modules(self) -> list[str]:
        """All modules that any of the adapters updates, in natural order."""
        return list(self.shapes)

    @property
    def absent(self) -> list[list[str]]:
        """For each adapter, the modules of the others that it leaves alone, so that its ΔW is 0 there."""
        return [[name for name in self.shapes if name not in adapter.sites] for adapter in self.adapters]

    @property
    def like(self) -> Adapter:
        """The first adapter's configuration, with the sites of all: what a merged adapter is made like."""
        sites = {name: a.sites[name] for a in reversed(self.adapters) for name in a.sites}
        kinds = {name: kind for exact in self._exact.values() for name, kind in exact.kinds.items()}
        sites |= {name: replace(sites[name], kind=kind) for name, kind in kinds.items() if kind != "conv1d-gpt"}
        like = replace(self.adapters[0], sites=sites)
        if "conv1d-gpt" in kinds.values():
            like = replace(like, config={**like.config, "fan_in_fan_out": True})
        return like

    @property
    def needs_base(self) -> bool:
        """Whether ΔW of an adapter is that against a base model."""
        return any(adapter.why_no_delta is not None for adapter in self.adapters) or (
            self.base is not None and bool(self._exact)
        )

    def weights_of(self, name: str) -> list[float]:
        """The adapters' weights in a module."""
        return self.weights.of(name, self._layers[name])

    def updates_of(self, name: str) -> list[LowRank]:
        """ΔW of every adapter in a module, of rank 0 where it leaves it alone; all in one dtype, on `place`."""
        updates = [self._update(i, name) for i in range(len(self.adapters))]
        dtype = max((u.A.dtype for u in updates if u), key=lambda dtype: dtype.itemsize)
        shape = self.shapes[name]
        empty = torch.zeros(0, shape[1:].numel(), dtype=dtype), torch.zeros(shape[0], 0, dtype=dtype)
        given = [LowRank(u.A.to(dtype), u.B.to(dtype), shape) if u else LowRank(*empty, shape) for u in updates]
        return [each.to(self.place) for each in given]

    def _update(self, index: int, name: str) -> LowRank | None:
        adapter = self.adapters[index]
        if index in self._exact:
            return self._exact[index].updates.get(name)
        site = adapter.sites.get(name)
        delta = update(site, adapter.tensors, adapter.config) if site else None
        if delta is not None and not is_finite(delta):
            raise MismatchError(f"{adapter.source}: ΔW of {name} is not finite: its factors are too large for float32")
        return delta

    @property
    def dtype(self) -> torch.dtype:
        """What ΔW is computed in: float64 where an adapter has it, else float32."""
        kinds = {a.tensors[key].dtype for a in self.adapters for site in a.sites.values() for key in site.keys.values()}
        return torch.float64 if torch.float64 in kinds else torch.float32

    def rank_of(self, name: str) -> int:
        """The ranks of all adapters in a module, added: the rank of a sum of theirs, up to the module's sides."""
        whole, ranks = self._ranks_of(name)
        return min(whole, sum(ranks))

    def largest_rank_of(self, name: str) -> int:
        """The largest rank that an adapter has in a module, up to the module's sides."""
        whole, ranks = self._ranks_of(name)
        return min(whole, max(ranks))

    def _ranks_of(self, name: str) -> tuple[int, list[int]]:
        """The full rank of a module, and the adapters' ranks there: full where ΔW is no product of thin factors."""
        shape = self.shapes[name]
        whole = min(shape[0], shape[1:].numel())
        own = [adapter.sites[name].rank if i not in self._exact else None for i, adapter in self._with(name)]
        return whole, [whole if rank is None else rank for rank in own]

    def _with(self, name: str) -> list[tuple[int, Adapter]]:
        return [(i, adapter) for i, adapter in enumerate(self.adapters) if name in adapter.sites]

    def _shapes(self) -> dict[str, torch.Size]:
        shapes: dict[str, tuple[torch.Size, str]] = {}
        for index, adapter in enumerate(self.adapters):
            for name in adapter.sites:
                shape = torch.Size(self._shape(index, name))
                first, source = shapes.setdefault(name, (shape, adapter.source))
                if first != shape:
                    raise MismatchError(
                        f"{source} and {adapter.source}: {name} is {tuple(first)} and {tuple(shape)}; adapters of one "
                        "base model are needed"
                    )
        return {name: shapes[name][0] for name in sorted(shapes, key=natural_key)}

    def _shape(self, index: int, name: str) -> tuple[int, ...]:
        """Of ΔW, from the shapes of its factors alone."""
        if index in self._exact:
            return self._exact[index].updates[name].shape
        adapter = self.adapters[index]
        return shape_of(adapter.sites[name], adapter.tensors, adapter.config)


@checked
def base_of(
    adapters: Sequence[Adapter], base: str | None, *, trust_record: bool = False
) -> Callable[[], nn.Module] | None:
    """What builds the base model that is given, or that the record of an adapter without a plain ΔW leads to.

    It can be sent to workers: small, and picklable. MismatchError where the adapters do not fit the one that is given,
    as far as its checkpoint is on this machine.
    """
    needy = [adapter for adapter in adapters if adapter.why_not_additive is not None]
    if base is not None:
        check_shapes(adapters, base)
        return partial(base_model, base, [name for adapter in needy for name in adapter.sites])
    recorded = next((adapter for adapter in needy if adapter.record.get("task")), None)
    if recorded is None:
        return None
    same_base(adapters)  # whose base it is would not be asked once there is one
    task = task_of(recorded, trust_record=trust_record)
    return partial(_base_of_task, TaskSpec(task.spec, task.reach))


def _base_of_task(spec: TaskSpec) -> nn.Module:
    return spec.task().build_model()


@dataclass(frozen=True)
class _Exact:
    """What an adapter whose ΔW is no plain product does to its base model."""

    updates: Mapping[str, LowRank]
    kinds: Mapping[str, str]
    """Module → the kind of the layer."""


def _exact(adapters: Sequence[Adapter], base: Callable[[], nn.Module] | None) -> dict[int, _Exact]:
    """Index → what the adapters do whose ΔW is no plain product."""
    exact: dict[int, _Exact] = {}
    for index, adapter in enumerate(adapters):
        if adapter.why_not_additive is None:
            continue
        if base is None and adapter.why_no_delta is None:  # LoHa and LoKr
            kinds = {
                name: "linear" if len(u.shape) == 2 else f"conv{len(u.shape) - 2}d"
                for name, u in adapter.updates.items()
            }
            exact[index] = _Exact(adapter.updates, kinds)
            continue
        if base is None:
            raise TunerError(f"{adapter.source}: {adapter.why_not_additive}; no base model was given")
        if any(part.endswith(".bias") for site in adapter.sites.values() for part in site.keys):
            raise TunerError(f"{adapter.source}: {adapter.why_not_additive}")
        model = base()
        require_weights(model, f"the base of {adapter.source}")
        model = model.float()
        deltas = weight_deltas(model, adapter)
        for name, delta in deltas.items():
            if delta.ndim < 2:
                raise TunerError(
                    f"{adapter.source}: {adapter.tuner} changes the vector {name}, which is no ΔW to merge"
                )
        kinds = {name: _kind(model.get_submodule(name)) for name in deltas}
        exact[index] = _Exact({name: factored(delta)[0] for name, delta in deltas.items()}, kinds)
    return exact


def _kind(layer: nn.Module) -> str:
    """What a LoRA adapter of this layer is to PEFT; GPT-2's Conv1D stores its weight as [in, out]."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "conv1d-gpt" if type(layer).__name__ == "Conv1D" else "linear"


def _on_line(points: Mapping[int, float], layer: int | None) -> float:
    if layer is None:
        return sum(points.values()) / len(points)
    places = sorted(points)
    before = [at for at in places if at <= layer]
    after = [at for at in places if at >= layer]
    if not before or not after:
        return points[places[0] if not before else places[-1]]
    low, high = before[-1], after[0]
    t = (layer - low) / (high - low) if high > low else 0.0
    return (1 - t) * points[low] + t * points[high]
