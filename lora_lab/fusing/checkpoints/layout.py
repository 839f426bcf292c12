"""How a checkpoint's tensors are the parameters of a model: under which names, and stacked, split or tied in which way.

Newer versions of transformers rename and fuse what older checkpoints hold (the experts of a layer become one stack);
adapters name modules of the model as it is today. What cannot be brought back exactly is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import MismatchError, shorten
from lora_lab.files import LazyTensors
from lora_lab.fusing.checkpoints.skeleton import quiet


@dataclass(frozen=True)
class Group:
    """Parameters that are made of the same tensors of a checkpoint."""

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    _pattern_of: Mapping[str, str] = field(default_factory=dict)
    """Tensor → pattern of the converter by which it is read."""
    _renamed: Mapping[str, str] = field(default_factory=dict)
    """Tensor → its name to the converter."""
    _converter: Any = None
    """Of transformers; None where a tensor is a parameter as it is."""
    _model: Any = None

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that these tensors of the checkpoint make."""
        if self._converter is None:
            return {self.parameters[0]: tensors[self.tensors[0]]}
        converter = deepcopy(self._converter)
        for name in self.tensors:
            converter.add_tensor(self.parameters[0], name, self._pattern_of[name], tensors[name])
        return _converted(converter, self.parameters[0], self._model)

    def written(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the checkpoint that make these parameters; MismatchError where there is no exact way back."""
        if self._converter is None:
            return {self.tensors[0]: parameters[self.parameters[0]]}
        back, first = self._converter.reverse_transform(), None
        for name, tensor in parameters.items():
            renamed, pattern = back.rename_source_key(name)
            first = first or renamed
            back.add_tensor(renamed, name, pattern, tensor)
        made = _converted(back, first, self._model)
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        by_name = {self._renamed[name].removeprefix(prefix): name for name in self.tensors}
        written = {by_name.get(name.removeprefix(prefix), name): tensor for name, tensor in made.items()}
        if set(written) != set(self.tensors):
            raise MismatchError(f"{shorten(self.parameters)}: no way back to the checkpoint's {shorten(self.tensors)}")
        return {name: tensor.contiguous() for name, tensor in written.items()}


def _converted(converter: Any, name: str | None, model: Any) -> dict[str, Tensor]:
    made = converter.convert(name, model=model, config=getattr(model, "config", None))
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class Layout:
    """The parameters of a model by name, read from a checkpoint one group at a time.

    Without a `model` (see skeleton.py) every tensor is the parameter of its name.
    """

    def __init__(self, checkpoint: LazyTensors, model: nn.Module | None = None) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self._empty: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.groups: dict[str, Group] = {}
        """Parameter → the group that it is in."""
        for group in _groups(checkpoint, model):
            self.groups |= dict.fromkeys(group.parameters, group)
        self.tied_sets = self._tied_sets()
        """The parameters that are one in the model, of those that there are more than one."""
        self.tied = {
            name: next(other for other in names if other in self.groups)
            for names in self.tied_sets
            for name in names
            if name not in self.groups
        }
        """Parameter without a tensor of its own → the parameter whose tensor it uses."""
        self.modules = dict(model.named_modules()) if model is not None else {}

    def read(self, parameter: str) -> Tensor:
        """One parameter of the base, under its own name or as what it is tied to."""
        name = self.tied.get(parameter, parameter)
        group = self.groups[name]
        return group.read({tensor: self.checkpoint[tensor] for tensor in group.tensors})[name]

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Its shape in this checkpoint, from the headers alone; None for a parameter that there is not."""
        name = self.tied.get(parameter, parameter)
        if name not in self.groups:
            return None
        return tuple(self._shapes(self.groups[name])[name].shape)

    def dtype(self, parameter: str) -> torch.dtype:
        """Its dtype in this checkpoint."""
        return self.checkpoint.spec[self.groups[self.tied.get(parameter, parameter)].tensors[0]][0]

    def parameters_of(self, module: str) -> list[str]:
        """The parameters that lie in a module itself."""
        return self._by_module.get(module, [])

    @cached_property
    def _by_module(self) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {}
        for name in (*self.groups, *self.tied):
            inside.setdefault(name.rpartition(".")[0], []).append(name)
        return inside

    @property
    def owners(self) -> list[str]:
        """The modules that parameters lie in."""
        return list(self._by_module)

    def _shapes(self, group: Group) -> dict[str, Tensor]:
        if group.parameters not in self._empty:
            spec = self.checkpoint.spec
            empty = {name: torch.empty(spec[name][1], dtype=spec[name][0], device="meta") for name in group.tensors}
            self._empty[group.parameters] = group.read(empty)
        return self._empty[group.parameters]

    def _tied_sets(self) -> list[list[str]]:
        shared: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False) if self.model is not None else ():
            shared.setdefault(id(parameter), []).append(name)
        return [names for names in shared.values() if len(names) > 1 and any(name in self.groups for name in names)]


def _groups(checkpoint: LazyTensors, model: nn.Module | None) -> list[Group]:
    if model is None:
        return [Group((name,), (name,)) for name in checkpoint]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: list[Group] = []
    converted: dict[str, dict[str, tuple[str, str]]] = {}
    for name in sorted(checkpoint, key=dot_natural_key):  # the experts of a stack by number
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None:
            groups.append(Group((target if target in known else name,), (name,)))
        else:
            converted.setdefault(target, {})[name] = (pattern, rename_source_key(name, renamings, [])[0])
    spec = checkpoint.spec
    for target, parts in converted.items():
        patterns = {name: pattern for name, (pattern, _) in parts.items()}
        converter = by_pattern[next(iter(patterns.values()))]
        group = Group(
            (target,), tuple(parts), patterns, {name: renamed for name, (_, renamed) in parts.items()}, converter, model
        )
        with quiet():
            try:
                made = group.read({n: torch.empty(spec[n][1], dtype=spec[n][0], device="meta") for n in parts})
            except Exception:  # an operation that does not take such tensors: they stay as they are
                groups += [Group((name,), (name,)) for name in parts]
                continue
        groups.append(replace(group, parameters=tuple(made)))
    return groups
