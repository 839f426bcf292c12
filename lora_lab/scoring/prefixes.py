"""Many variants of one adapted model, in an order and a way that computes no transformer block twice on equal inputs.

Two variants that agree on the first blocks share those activations exactly. Every block remembers its last
arguments, the state of its own adapters, and its output; called again with arguments that are equal bit for bit and
the same state, it gives the output that it gave. Variants are walked in lexicographic order of their blocks' states,
so that neighbours share as long a prefix as they can (a trie, depth first, one saved output a block). Everything
outside of blocks (embeddings, masks, heads, the order in which a model calls its blocks) runs as always, so that
outputs are bitwise those of the plain way: on an encoder, a decoder, or two encoders side by side.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.attached import NAME, Attached
from lora_lab.adapters.groups import block
from lora_lab.brief import Brief
from lora_lab.errors import TunerError
from lora_lab.tasks.task import Scores

State = float | tuple[float, ...]
"""Of one adapted module: 0 off, 1 on, another number a factor on its update; or such a number for each of its ranks."""

Variant = tuple[State, ...]
"""A state for every adapted module, in the order of `Variants.names`."""

Judge = Callable[[nn.Module, Mapping[str, Tensor]], Scores]

MEMORY = 1 << 30
"""Bytes of activations that may be kept over all batches at once."""

_CHUNK = 32


@dataclass(frozen=True)
class Layout:
    """Which adapted modules lie in which block of a model, and by that what its variants share; no weights."""

    names: tuple[str, ...]
    """The adapted modules, in the order of a variant's states."""
    members: tuple[tuple[int, ...], ...]
    """For each block, in the model's order, its modules' places in `names`."""
    why_not: str | None = None
    """Why no block is shared; None where they are."""

    @property
    def blocks(self) -> int:
        """Blocks of the model that one forward pass runs."""
        return len(self.members)

    def cost(self, variants: Sequence[Variant]) -> int:
        """Block evaluations for these variants on one batch, by the prefixes that they share.

        An upper bound where blocks' own outputs agree by chance, or a model has encoders side by side.
        """
        return self.walk(variants)[1]

    def walk(self, variants: Sequence[Variant]) -> tuple[list[int], int]:
        """The variants' indices, lexicographically by the blocks in the model's order, and what that order costs."""
        if self.why_not is not None:
            return list(range(len(variants))), self.blocks * len(variants)
        segments = [self._segments(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: _sortable(segments[i]))
        again = sum(self._recomputed(segments[i], segments[j]) for i, j in itertools.pairwise(order))
        return order, again + (self.blocks if variants else 0)

    @cached_property
    def _outside(self) -> list[int]:
        inside = {i for indices in self.members for i in indices}
        return [i for i in range(len(self.names)) if i not in inside]

    def _segments(self, variant: Variant) -> list[tuple[State, ...]]:
        """States by segment: modules outside of blocks first, then each block's."""
        inside = [tuple(variant[i] for i in indices) for indices in self.members]
        return [tuple(variant[i] for i in self._outside), *inside]

    def _recomputed(self, before: list[tuple[State, ...]], now: list[tuple[State, ...]]) -> int:
        first = next((k for k, (a, b) in enumerate(zip(before, now, strict=True)) if a != b), len(now))
        return self.blocks - max(0, first - 1)


class Variants:
    """The variants of one attached adapter; states are set in place, and `run` scores many of them.

    `layout` says what they share, or why nothing; `computed` counts block evaluations so far, and `kept_bytes` is the
    largest size that the remembered activations reached.
    """

    def __init__(
        self, attached: Attached, *, share: bool = True, why_not: str | None = None, memory: int = MEMORY
    ) -> None:
        self.attached, self.model = attached, attached.model
        self.names = list(attached.layers)
        self.computed = 0
        self.kept_bytes = 0
        self._memory = memory
        self._layers = list(attached.layers.values())
        self._scales = [getattr(layer, "scaling", {}).get(NAME) for layer in self._layers]
        self._factors: list[Any] = [None] * len(self.names)  # A as it is when all ranks are on
        self._state: list[State] = [1.0] * len(self.names)
        self._blocks = _blocks(self.model, self.names)
        if not self._blocks:
            why_not = "no repeated list of blocks was found around the adapted modules"
        if not share:
            why_not = "it was not asked for"
        self.layout = Layout(tuple(self.names), _members(self.names, self._blocks), why_not)

    def all_on(self) -> Variant:
        """The adapter as it is."""
        return (1.0,) * len(self.names)

    def set(self, variant: Variant) -> None:
        """Give the model these states; what is as it was is not touched."""
        for i, state in enumerate(variant):
            if state != self._state[i]:
                self._set_one(i, state)
                self._state[i] = state

    def run(
        self, variants: Sequence[Variant], batches: Sequence[Mapping[str, Tensor]], judge: Judge
    ) -> Iterator[tuple[int, Scores]]:
        """(Index, scores over all batches) of every variant, each once, those that share most beside each other.

        Where the activations of all batches fit into memory, a variant is finished before the next begins;
        otherwise some dozens of variants go through each batch together.
        """
        if not variants:
            return
        order, cost = self.layout.walk(variants)
        # Where next to nothing is shared, comparing arguments would cost more than it saves.
        worthwhile = cost < 0.97 * self.layout.blocks * len(variants)
        with self._remembering(share=worthwhile) as memory:
            size = self._fitting(memory, variants[order[0]], batches, judge)
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                scores: dict[int, list[Scores]] = {i: [] for i in chunk}
                for b, batch in enumerate(batches):
                    memory.turn_to(b if size == 1 else None)
                    for i in chunk:
                        scores[i].append(self._pass(memory, variants[i], batch, judge))
                    if size > 1:
                        memory.clear()
                yield from ((i, Scores.join(scores[i])) for i in chunk)

    def _pass(self, memory: _Memory, variant: Variant, batch: Mapping[str, Tensor], judge: Judge) -> Scores:
        self.set(variant)
        memory.begin(self._state)
        scores = judge(self.model, batch)
        if memory.spoilt:  # a block or the model wrote into a tensor that had been remembered
            self.layout = replace(self.layout, why_not=memory.spoilt)
            memory.disable()
            memory.begin(self._state)
            scores = judge(self.model, batch)
        self.computed += memory.computed
        return scores

    def _fitting(self, memory: _Memory, variant: Variant, batches: Sequence[Mapping[str, Tensor]], judge: Judge) -> int:
        """Variants to take through each batch together; one where everything can be kept."""
        if not memory.on or len(batches) == 1:
            return 1
        memory.turn_to(0)
        self._pass(memory, variant, batches[0], judge)
        if memory.bytes() * len(batches) <= self._memory:
            return 1
        memory.clear()
        return _CHUNK

    @contextlib.contextmanager
    def _remembering(self, *, share: bool) -> Iterator[_Memory]:
        """Blocks remember while the context lasts; afterwards everything is on and as it was."""
        memory = _Memory(self.layout.members, on=share)
        configs = [c for c in _configs(self.model) if getattr(c, "use_cache", False)]
        forwards = [vars(module).get("forward") for module in self._blocks.values()]
        try:
            for config in configs:  # a cache of keys and values would be filled only by the blocks that run
                config.use_cache = False
            for i, module in enumerate(self._blocks.values()):
                vars(module)["forward"] = _Remembered(i, module.forward, memory)
            with torch.no_grad():  # not inference_mode: its tensors could be written to unnoticed
                yield memory
        finally:
            memory.clear()
            self.kept_bytes = max(self.kept_bytes, memory.peak)
            for module, forward in zip(self._blocks.values(), forwards, strict=True):
                vars(module).pop("forward")
                if forward is not None:
                    vars(module)["forward"] = forward
            for config in configs:
                config.use_cache = True
            self.set(self.all_on())

    def _set_one(self, i: int, state: State) -> None:
        layer = self._layers[i]
        ranks = state if isinstance(state, tuple) else None
        factor = 1.0 if isinstance(state, tuple) else state
        if factor not in (0.0, 1.0) and self._scales[i] is None:
            raise TunerError(f"{self.names[i]}: its tuner has no scale, so it cannot be rescaled")
        layer._disable_adapters = not (any(ranks) if ranks is not None else factor)
        scale = self._scales[i]
        if scale is not None:
            layer.scaling[NAME] = scale * (factor or 1.0)
        if ranks is not None or self._factors[i] is not None:
            self._mask_ranks(i, ranks)

    def _mask_ranks(self, i: int, ranks: tuple[float, ...] | None) -> None:
        A = _factor(self._layers[i])
        if A is None:
            raise TunerError(f"{self.names[i]}: its tuner has no ranks")
        if self._factors[i] is None:
            self._factors[i] = A.data
        whole = self._factors[i]
        if ranks is None or all(rank == 1 for rank in ranks):
            A.data = whole
        else:
            mask = torch.tensor(ranks, dtype=whole.dtype, device=whole.device)
            A.data = whole * mask.reshape(-1, *[1] * (whole.ndim - 1))


@dataclass(repr=False)
class _Call(Brief):
    """What a block remembers."""

    states: list[State]
    arguments: Any
    output: Any
    versions: list[tuple[Tensor, int]]


@dataclass(repr=False)
class _Memory(Brief):
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
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for c in calls for t in _tensors(c)}
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
        given = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
        output = forward(*args, **kwargs)
        self.computed += 1
        if any(tensor._version != version for tensor, version in given):
            self.spoilt = "a block changes its inputs in place"
        made = [(tensor, tensor._version) for tensor in _tensors(output)]
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


class _Remembered:
    """Stands in for a block's forward."""

    def __init__(self, index: int, forward: Callable[..., Any], memory: _Memory) -> None:
        self._index, self._forward, self._memory = index, forward, memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._memory.call(self._index, self._forward, args, kwargs)


def _blocks(model: nn.Module, adapted: Sequence[str]) -> dict[str, nn.Module]:
    """Every block of the repeated lists that hold adapted modules, in the model's order."""
    lists = {block(name).rpartition(".")[0] for name in adapted if block(name) != name}
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name in lists and isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            if any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in module):
                continue  # these are never called as a whole
            blocks |= {f"{name}.{key}": child for key, child in module.named_children()}
    return blocks


def _members(adapted: Sequence[str], blocks: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Indices of the adapted modules of every block."""
    return tuple(tuple(i for i, name in enumerate(adapted) if name.startswith(f"{label}.")) for label in blocks)


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration object within the model."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    return list(configs.values())


def _factor(layer: Any) -> Any:
    """A of a LoRA layer, whose first dimension is the rank."""
    for part in ("lora_A", "lora_embedding_A"):
        held = getattr(layer, part, {})
        if NAME in held:
            return held[NAME].weight if isinstance(held[NAME], nn.Module) else held[NAME]
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _Call):
        yield from _tensors((value.arguments, value.output))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _sortable(segments: Sequence[tuple[State, ...]]) -> list[list[tuple[float, ...]]]:
    """States that compare with each other, numbers with rank masks too."""
    return [[state if isinstance(state, tuple) else (float(state),) for state in segment] for segment in segments]
