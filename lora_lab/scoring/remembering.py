"""What blocks of a model remember of their last calls, and how something else takes the place of their forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_lab.brief import Brief
from lora_lab.scoring.layout import State


class Caller(Protocol):
    """What calls the blocks of a model in their place."""

    def call(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of block `index` for these arguments."""


@contextlib.contextmanager
def calling(model: nn.Module, blocks: Sequence[nn.Module], caller: Caller) -> Iterator[None]:
    """Every block is called by `caller` while the context lasts, without gradients; afterwards all is as it was."""
    configs = [c for c in _configs(model) if getattr(c, "use_cache", False)]
    forwards = [vars(module).get("forward") for module in blocks]
    try:
        for config in configs:  # a cache of keys and values would be filled only by the blocks that run
            config.use_cache = False
        for i, module in enumerate(blocks):
            vars(module)["forward"] = _Called(i, module.forward, caller)
        with torch.no_grad():  # not inference_mode: its tensors could be written to unnoticed
            yield
    finally:
        for module, forward in zip(blocks, forwards, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        for config in configs:
            config.use_cache = True


class _Called:
    """Stands in for a block's forward."""

    def __init__(self, index: int, forward: Callable[..., Any], caller: Caller) -> None:
        self._index, self._forward, self._caller = index, forward, caller

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._caller.call(self._index, self._forward, args, kwargs)


@dataclass(repr=False)
class _Call(Brief):
    """What a block remembers."""

    states: list[State]
    arguments: Any
    output: Any
    versions: list[tuple[Tensor, int]]


@dataclass(repr=False)
class Memory(Brief):
    """The last call of every block, by batch."""

    members: Sequence[Sequence[int]]
    """Block → its adapted modules."""
    on: bool = True
    computed: int = 0
    peak: int = 0
    spoilt: str | None = None
    _batches: dict[int | None, dict[int, _Call]] = field(default_factory=dict)
    _calls: dict[int, _Call] = field(default_factory=dict)
    _state: list[State] = field(default_factory=list)
    _equal: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _fresh: set[int] = field(default_factory=set)

    def begin(self, state: list[State]) -> None:
        """A new forward pass with these states."""
        self.computed, self.spoilt, self._state = 0, None, state
        self._equal, self._fresh = {}, set()

    def turn_to(self, batch: int | None) -> None:
        """Continue with what is remembered of this batch."""
        self._calls = self._batches.setdefault(batch, {})

    def clear(self) -> None:
        """Forget everything."""
        self.peak = max(self.peak, self.bytes())
        self._batches, self._calls = {}, {}

    def disable(self) -> None:
        """Remember nothing from now on."""
        self.clear()
        self.on = False

    def bytes(self) -> int:
        """Size of all that is remembered, every storage once."""
        calls = [call for calls in self._batches.values() for call in calls.values()]
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for c in calls for t in tensors_of(c)}
        return sum(stores.values())

    def call(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The block's output: remembered, or computed and remembered."""
        if not self.on:
            self.computed += 1
            return forward(*args, **kwargs)
        states = [self._state[i] for i in self.members[index]]
        call = self._calls.get(index)
        if call is not None and call.states == states and self._same((args, kwargs), call.arguments):
            if any(tensor._version != version for tensor, version in call.versions):
                self.spoilt = "the model changes the outputs of its blocks in place"
            return call.output
        given = [(tensor, tensor._version) for tensor in tensors_of((args, kwargs))]
        output = forward(*args, **kwargs)
        self.computed += 1
        if any(tensor._version != version for tensor, version in given):
            self.spoilt = "a block changes its inputs in place"
        made = [(tensor, tensor._version) for tensor in tensors_of(output)]
        self._fresh.update(id(tensor) for tensor, _ in made)
        self._calls[index] = _Call(states, (args, kwargs), output, [*given, *made])
        return output

    def _same(self, a: Any, b: Any) -> bool:
        """Whether two arguments are equal bit for bit; tensors of one pass are compared once."""
        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, Tensor):
            return self._same_tensor(a, b)
        if isinstance(a, Mapping):
            return a.keys() == b.keys() and all(self._same(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(self._same, a, b))
        return isinstance(a, bool | int | float | str | torch.dtype | torch.device) and bool(a == b)

    def _same_tensor(self, a: Tensor, b: Tensor) -> bool:
        if id(a) in self._fresh:  # computed in this pass because something differed
            return False
        held = self._equal.get(id(a))
        if held is not None and held[1] is b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b):
            return False
        self._equal[id(a)] = (a, b)  # holding a, so that its id stays its own
        return True


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _Call):
        yield from tensors_of((value.arguments, value.output))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object within the model."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    return list(configs.values())
