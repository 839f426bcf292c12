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
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.groups import block
from lora_lab.adapters.models.attached import NAME, Attached
from lora_lab.errors import TunerError
from lora_lab.scoring.execution import ONE_BY_ONE, Batching
from lora_lab.scoring.layout import Judge, Layout, State, Variant
from lora_lab.scoring.remembering import Memory, calling
from lora_lab.scoring.together.batched import Together
from lora_lab.scoring.together.rows import ApartError
from lora_lab.tasks.task import Scores

_LOG = logging.getLogger(__name__)

MEMORY = 1 << 30
"""Bytes of activations that may be kept over all batches at once."""

_CHUNK = 32


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
        self.apart: str | None = None
        """Why variants did not go through passes together that were to; None where they did."""
        self._memory = memory
        self._passes: Together | None = None
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
        self,
        variants: Sequence[Variant],
        batches: Sequence[Mapping[str, Tensor]],
        judge: Judge,
        batching: Batching = ONE_BY_ONE,
    ) -> Iterator[tuple[int, Scores]]:
        """(Index, scores over all batches) of every variant, each once, those that share most beside each other.

        Several go through each pass where `batching` wants it and they can. Otherwise, where the activations of all
        batches fit into memory, a variant is finished before the next begins; where they do not, some dozens of
        variants go through each batch together.
        """
        if not variants:
            return
        order, cost = self.layout.walk(variants)
        # Where next to nothing is shared, comparing arguments would cost more than it saves.
        worthwhile = cost < 0.97 * self.layout.blocks * len(variants)
        if batching.wanted and len(order) > 1 and self.apart is None:
            for i, scores in self._together([variants[i] for i in order], batches, judge, batching, worthwhile):
                yield order[i], scores
                order[i] = -1
            order = [i for i in order if i >= 0]
        if not order:
            return
        with self._remembering(share=worthwhile) as memory:
            size = self._fitting(memory, variants[order[0]], batches, judge)
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                scores_of: dict[int, list[Scores]] = {i: [] for i in chunk}
                for b, batch in enumerate(batches):
                    memory.turn_to(b if size == 1 else None)
                    for i in chunk:
                        scores_of[i].append(self._pass(memory, variants[i], batch, judge))
                    if size > 1:
                        memory.clear()
                yield from ((i, Scores.join(scores_of[i])) for i in chunk)

    def _together(
        self,
        variants: Sequence[Variant],
        batches: Sequence[Mapping[str, Tensor]],
        judge: Judge,
        batching: Batching,
        share: bool,
    ) -> Iterator[tuple[int, Scores]]:
        """(Place, scores) of these in their order, as far as they can go through passes together; else `apart`."""

        if self._passes is None:
            layers = dict(zip(self.names, self._layers, strict=True))
            blocks = list(self._blocks.values())
            self._passes = Together(self.model, layers, self.layout, blocks, self._alone)
        before = self._passes.computed
        try:
            with contextlib.closing(self._passes.run(variants, batches, judge, batching, share=share)) as found:
                yield from enumerate(found)
        except ApartError as error:
            self.apart = str(error)
            _LOG.debug("coalitions are scored one after another: %s", error)
        finally:
            self.computed += self._passes.computed - before

    def _alone(self, variant: Variant, batch: Mapping[str, Tensor], judge: Judge) -> Scores:
        """Scores of one variant, after which everything is on."""
        self.set(variant)
        try:
            return judge(self.model, batch)
        finally:
            self.set(self.all_on())

    def _pass(self, memory: Memory, variant: Variant, batch: Mapping[str, Tensor], judge: Judge) -> Scores:
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

    def _fitting(self, memory: Memory, variant: Variant, batches: Sequence[Mapping[str, Tensor]], judge: Judge) -> int:
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
    def _remembering(self, *, share: bool) -> Iterator[Memory]:
        """Blocks remember while the context lasts; afterwards everything is on and as it was."""
        memory = Memory(self.layout.members, on=share)
        try:
            with calling(self.model, list(self._blocks.values()), memory):
                yield memory
        finally:
            memory.clear()
            self.kept_bytes = max(self.kept_bytes, memory.peak)
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


def _factor(layer: Any) -> Any:
    """A of a LoRA layer, whose first dimension is the rank."""
    for part in ("lora_A", "lora_embedding_A"):
        held = getattr(layer, part, {})
        if NAME in held:
            return held[NAME].weight if isinstance(held[NAME], nn.Module) else held[NAME]
    return None
