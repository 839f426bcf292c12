"""What adapters change in a base, parameter by parameter: ΔW of every tuner that PEFT can merge, heads, trained tokens.

Plain LoRA is added from its factors. Any other tuner is merged by PEFT itself, on the one module that is asked for and
with that module's own weights, so that DoRA, HiRA, OFT … come out as PEFT has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.peft.peft_config import not_placed
from lora_lab.adapters.formats.peft.peft_format import update
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.adapters.models.attached import layers, wrapped
from lora_lab.adapters.whole import TOKENS, merge_heads
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError, TunerError
from lora_lab.fusing.checkpoints.layout import Layout
from lora_lab.fusing.checkpoints.skeleton import quiet
from lora_lab.fusing.fitting import require_modules, require_places, require_rows

HEADS = ("average", "first")
"""What can become of heads in which adapters differ: a checkpoint has one."""
_SHARING = {"VERA", "PVERA", "RANDLORA", "VBLORA", "TINYLORA"}
"""Tuners whose modules have tensors, or what is drawn from a seed, in common: all are made together."""
_DECOMPOSED = {"FROD"}
"""Tuners that decompose the weights of all their modules together, which are then all in memory."""
_BY_TARGETS = {"UNILORA"}
"""Tuners whose file may name no module: they are on all that target_modules names, in the order of the model."""
_OF_THE_WHOLE = (
    "trainable_token_indices",
    "ensure_weight_tying",
    "layer_replication",
    "modules_to_save",
    "task_type",
    "auto_mapping",
)
"""Fields of a configuration that speak of more than one module."""


@dataclass(frozen=True, repr=False)
class Change(Brief):
    """What becomes of one parameter: another tensor, or the base's with something added, or both."""

    update: LowRank | None = None
    """ΔW of the plain adapters together, in the layout of the stored weight."""
    delta: Tensor | None = None
    """ΔW of the others together, dense, in float32 or wider."""
    whole: Tensor | None = None
    """What takes the place of the base's tensor before anything is added."""
    rows: tuple[Sequence[int], Tensor] | None = None
    """Rows of it that are replaced, and by what."""

    def start(self, base: Tensor | None) -> Tensor:
        """The parameter before anything is added, in the base's dtype; `base` itself is changed where rows are."""
        if self.whole is None:
            assert base is not None
            started = base
        else:
            started = self.whole.to(base.dtype if base is not None else self.whole.dtype, copy=True)
        if self.rows is not None:
            started[list(self.rows[0])] = self.rows[1].to(started.dtype)
        return started

    def dense(self) -> Tensor | None:
        """What is added, as one tensor; None for nothing."""
        if self.update is None:
            return self.delta
        dense = self.update.delta()
        return dense if self.delta is None else dense + self.delta

    @property
    def adds(self) -> bool:
        """Whether anything is added."""
        return self.update is not None or self.delta is not None

    @property
    def replaces(self) -> bool:
        """Whether the base's tensor, or rows of it, give way to others."""
        return self.whole is not None or self.rows is not None


class Changes:
    """Σ coefficient · ΔW of adapters on the base of a layout, and the whole tensors that they bring.

    `heads` says what becomes of whole tensors in which they differ (average, first). MismatchError where the base has
    not the modules or the shapes, naming the closest; TunerError for adapters that have no ΔW.
    """

    def __init__(
        self,
        layout: Layout,
        adapters: Sequence[Adapter],
        coefficients: Sequence[float] | None = None,
        heads: str | None = None,
    ) -> None:
        self.layout = layout
        self.adapters = adapters = [_placed(layout, adapter) for adapter in adapters]
        self.coefficients = [1.0] * len(adapters) if coefficients is None else list(coefficients)
        self.sites: dict[str, list[tuple[int, Site]]] = {}
        """Module → index of each adapter that changes it, and its site there."""
        for index, adapter in enumerate(adapters):
            _refuse_other_models(adapter)
            for name, site in adapter.sites.items():
                self.sites.setdefault(_own(name), []).append((index, site))
        self._whole, self._rows = _wholes(layout, adapters, heads)
        for names in layout.tied_sets:  # of trained tokens PEFT puts the same rows into all that are tied
            trained = next((self._rows[name] for name in names if name in self._rows), None)
            if trained is not None:
                self._rows |= {name: trained for name in names if name not in self._whole}
        self._skeletons: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        for index, adapter in enumerate(adapters):
            mine = {name: site for name, sites in self.sites.items() for i, site in sites if i == index}
            require_modules(layout, list(mine), adapter.source)
            for site in mine.values() if adapter.why_not_additive is None else ():
                self._plain(adapter, site)
        require_places(layout, self._whole, adapters[0].source)
        require_rows(layout, {name: ids for name, (ids, _) in self._rows.items()}, adapters[0].source)

    @property
    def parameters(self) -> list[str]:
        """The parameters that may change, in the layout's order; new ones at the end."""
        names = {name for module in self.sites for name in self.layout.parameters_of(module)}
        names |= self._whole.keys() | self._rows.keys()
        known = [*self.layout.groups, *self.layout.tied]
        return [name for name in known if name in names] + sorted(names - set(known))

    @property
    def replaced(self) -> set[str]:
        """The parameters that are replaced, in whole or in some rows."""
        return {*self._whole, *self._rows}

    @property
    def added(self) -> list[str]:
        """Whole tensors that the base has not."""
        return sorted(name for name in self._whole if self.layout.shape(name) is None)

    def whole_shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of what takes a parameter's place; None where the base's stays."""
        return tuple(self._whole[parameter].shape) if parameter in self._whole else None

    def alike(self, parameters: Sequence[str]) -> bool:
        """Whether the same becomes of parameters that are one in the base: nothing is added, all are replaced alike."""
        if any(name.rpartition(".")[0] in self.sites for name in parameters):
            return False
        first, *others = parameters
        wholes = [self._whole[name] for name in parameters if name in self._whole]
        if wholes and not (len(wholes) == len(parameters) and all(torch.equal(t, wholes[0]) for t in wholes)):
            return False
        return all(self._rows.get(name) is self._rows.get(first) for name in others)

    def of(self, parameter: str) -> Change:
        """What becomes of a parameter; ΔW that hangs on the base's weights is taken with them."""
        module = parameter.rpartition(".")[0]
        whole, rows = self._whole.get(parameter), self._rows.get(parameter)
        plain, deltas = [], []
        for index, site in dict(self.sites.get(module, ())).items():  # of nested sites, all are merged at once
            adapter, coefficient = self.adapters[index], self.coefficients[index]
            if adapter.why_not_additive is None:
                if parameter == f"{module}.weight":
                    plain.append(self._plain(adapter, site) * coefficient)
            elif (delta := self._merged(index, module).get(parameter)) is not None:
                deltas.append(delta * coefficient)
        if len(plain) > 1:
            plain = [combine(plain, [1.0] * len(plain))]
        delta = torch.stack(deltas).sum(0) if len(deltas) > 1 else next(iter(deltas), None)
        return Change(next(iter(plain), None), delta, whole, rows)

    def _plain(self, adapter: Adapter, site: Site) -> LowRank:
        """ΔW from the factors, as the layer that it is for stores its weight, whatever the configuration says."""
        module = self.layout.modules.get(site.name)
        config = adapter.config
        if module is not None:
            config = {"fan_in_fan_out": type(module).__name__ == "Conv1D"}
        made = update(site, adapter.tensors, config)
        weight = f"{site.name}.weight"
        shape = self.whole_shape(weight) or self.layout.shape(weight)
        if made.shape != shape and made.shape[::-1] == shape and len(shape) == 2 and module is None:
            made = update(site, adapter.tensors, {"fan_in_fan_out": not config.get("fan_in_fan_out")})
        if made.shape != shape:
            raise MismatchError(
                f"{adapter.source}: ΔW of {site.name} is {list(made.shape)}, and its weight in the base "
                f"{list(shape or ())}; another base?"
            )
        return made

    def _merged(self, index: int, module: str) -> dict[str, Tensor]:
        """Parameter → merged − base, by PEFT, for the parameters of a module that this adapter changes."""
        key = f"{index} {module}"
        if self._last[0] != key:
            names = self.layout.parameters_of(module)
            with quiet(), torch.no_grad():
                self._last = (key, self._merge(index, module, self._weights(self.adapters[index], names)))
        return self._last[1]

    def _weights(self, adapter: Adapter, parameters: Sequence[str]) -> dict[str, Tensor]:
        """The base's, wide; those that a tuner decomposes in their own dtype, as PEFT decomposes them."""
        read = {name: self.layout.read(name) for name in parameters}
        if adapter.tuner in _DECOMPOSED:
            return read
        return {name: tensor.to(_wide_dtype(tensor.dtype)) for name, tensor in read.items()}

    def _merge(self, index: int, module: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        adapter = self.adapters[index]
        together = _SHARING | _DECOMPOSED
        if adapter.tuner in together or any(not key.startswith(PREFIX) for key in adapter.others):
            if index not in self._skeletons:
                every = [name for site in adapter.sites for name in self.layout.parameters_of(_own(site))]
                weights = self._weights(adapter, every) if adapter.tuner in _DECOMPOSED else None
                self._skeletons[index] = self._tree(adapter, list(adapter.sites), weights)
            tree, tuned = self._skeletons[index]
            held = {name: _held(tree, module, name) for name in base}
            before = {name: parameter.data for name, parameter in held.items()}
            for name, parameter in held.items():
                parameter.data = base[name].clone()
        else:
            # with the true weights from the start: what PiSSA, OLoRA and others begin with is taken from them
            tree, tuned = self._tree(adapter, [site.name for i, site in self.sites[module] if i == index], base)
            before = {}
        try:
            for layer in (tuned[name] for name in tuned if _own(name) == module):
                layer.merge(safe_merge=True)
                layer.merged_adapters.clear()
        except (NotImplementedError, AttributeError, ValueError, RuntimeError) as error:
            raise TunerError(f"{adapter.source}: {adapter.tuner} of {module} has no ΔW: {error}") from error
        merged = {name: _held(tree, module, name).data for name in base}
        for name, data in before.items():
            held[name].data = data
        wide = {name: tensor.to(_wide_dtype(tensor.dtype)) for name, tensor in base.items()}
        return {name: merged[name] - wide[name] for name in base if not torch.equal(merged[name], base[name])}

    def _tree(
        self, adapter: Adapter, names: Sequence[str], base: Mapping[str, Tensor] | None
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A model of these modules alone with PEFT's layers on them; weights of one repeated 0 where none are given."""
        root = nn.Module()
        for name in dict.fromkeys(map(_own, names)):
            parent = root
            *path, last = name.split(".")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, self._layer(adapter, name, base))
        sites = {name: adapter.sites[name] for name in names}
        owned = {key for site in sites.values() for key in site.keys.values()}
        alone = replace(
            adapter,
            tensors={key: t for key, t in adapter.tensors.items() if key in owned or not key.startswith(PREFIX)},
            sites=sites,
            config={key: value for key, value in adapter.config.items() if key not in _OF_THE_WHOLE},
            record={},
        )
        try:
            wrapped(root, alone)
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise MismatchError(f"{adapter.source}: PEFT cannot put it on this base: {error}") from error
        return root, layers(root)

    def _layer(self, adapter: Adapter, name: str, base: Mapping[str, Tensor] | None) -> nn.Module:
        """A layer of the base's kind with these weights."""
        like = self.layout.modules.get(name)
        if like is None:
            like = _guessed(adapter.sites[name], self.layout.shape(f"{name}.weight") or ())
        layer = deepcopy(like)
        for parameter in self.layout.parameters_of(name):
            last = parameter.rpartition(".")[2]
            shape, dtype = self.layout.shape(parameter) or (), _wide_dtype(self.layout.dtype(parameter))
            given = torch.zeros((), dtype=dtype).expand(shape) if base is None else base[parameter].clone()
            layer.register_parameter(last, nn.Parameter(given, requires_grad=False))
        return layer


def _wholes(
    layout: Layout, adapters: Sequence[Adapter], heads: str | None
) -> tuple[dict[str, Tensor], dict[str, tuple[Sequence[int], Tensor]]]:
    """Parameter → the tensor that replaces it, and parameter → the rows of it that are replaced.

    An adapter without a tensor leaves it to the others; copies of the base's own weights are none.
    """
    whole: dict[str, Tensor] = {}
    rows: dict[str, tuple[Sequence[int], Tensor]] = {}
    labels = labels_of(adapters)
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.others if key.startswith(PREFIX)):
        name = _own(key.removeprefix(PREFIX)).replace(".modules_to_save.", ".")
        holders = [
            (replace(adapter, tensors={key: adapter.tensors[key]}, sites={}), label)
            for adapter, label in zip(adapters, labels, strict=True)
            if key in adapter.others and not (".base_layer." in key and _is_base(layout, name, adapter.tensors[key]))
        ]
        if not holders:
            continue
        made = merge_heads([adapter for adapter, _ in holders], [label for _, label in holders], heads, HEADS)
        if key.endswith(TOKENS):
            rows[name.removesuffix(TOKENS) + ".weight"] = (made.tokens[key], made.tensors[key])
        else:
            whole[name] = made.tensors[key]
    return whole, rows


def _is_base(layout: Layout, name: str, tensor: Tensor) -> bool:
    return layout.shape(name) == tuple(tensor.shape) and torch.equal(
        tensor.to(layout.dtype(name)), layout.read(name).contiguous()
    )


def _refuse_other_models(adapter: Adapter) -> None:
    if adapter.config.get("layer_replication"):
        raise TunerError(f"{adapter.source}: layer_replication builds another model than the base's")
    if adapter.config.get("alora_invocation_tokens"):
        raise TunerError(f"{adapter.source}: acts after its invocation tokens alone, which no weight of a base can do")
    if adapter.tuner == "LILY":
        raise TunerError(
            f"{adapter.source}: LILY mixes its matrices by what the input is, which no weight of a base can do"
        )
    if not adapter.sites and not any(key.startswith(PREFIX) for key in adapter.others):
        raise TunerError(f"{adapter.source}: {adapter.tuner} names no module of the base whose weight it changes")


def _placed(layout: Layout, adapter: Adapter) -> Adapter:
    """The adapter with the modules that it is on where its file does not name them, or not in the model's order."""
    if adapter.tuner not in _BY_TARGETS:
        return adapter
    if layout.model is None:
        raise TunerError(
            f"{adapter.source}: {adapter.tuner} names its modules by their order in the model, which a base without a "
            "config.json that transformers knows does not tell"
        )
    weighted = [name for name in layout.modules if f"{name}.weight" in layout.parameters_of(name)]
    gone, _ = not_placed(adapter.config, dict.fromkeys(weighted, "linear"))
    names = [name for name in weighted if name not in gone]
    own = {name: adapter.sites.get(name) or Site(name, adapter.tuner.lower(), {}) for name in names}
    return replace(adapter, sites={**own, **adapter.sites})


def _own(name: str) -> str:
    """The module of the base; PEFT nests the layers of several parameters of one module in each other."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _held(tree: nn.Module, module: str, parameter: str) -> nn.Parameter:
    """The parameter of the base's layer within PEFT's."""
    layer: Any = tree.get_submodule(module)
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    held: nn.Parameter = layer.get_parameter(parameter.rpartition(".")[2])
    return held


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _guessed(site: Site, shape: Sequence[int]) -> nn.Module:
    """A layer for a weight of which only the shape is known."""
    with torch.device("meta"):
        if len(shape) > 2:
            kinds: dict[int, Callable[..., nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
            return kinds[len(shape)](shape[1], shape[0], tuple(shape[2:]), bias=False)
        if len(shape) == 1:
            return nn.LayerNorm(shape[0])
        if site.kind == "embedding":
            return nn.Embedding(shape[0], shape[1])
        return nn.Linear(shape[1], shape[0], bias=False)
