"""One model for every task that merged adapters are judged on; weights change in place between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_lab.adapter import Adapter, from_updates
from lora_lab.attach import Attached, put_on
from lora_lab.errors import OptionError
from lora_lab.lowrank import LowRank
from lora_lab.sources import Sources
from lora_lab.task import Scores, Task


class Panel:
    """The tasks of some sources, each with the head of its own source, on models that wear merged updates.

    Equal tasks with equal heads are one seat. Everything is built on first use.
    """

    def __init__(self, sources: Sources) -> None:
        if sources.tasks is None:
            raise OptionError("this needs data: adapters that carry the record of their task, or --task")
        self.sources = sources
        self.tasks: list[Task] = sources.tasks
        self._attached: dict[int, Attached] = {}
        self._seat = [self._same(i) for i in range(len(self.tasks))]

    @property
    def seats(self) -> list[int]:
        """An index for every different task and head: of the first source that has them."""
        return sorted(set(self._seat))

    def seat_of(self, index: int) -> int:
        """The seat of a source."""
        return self._seat[index]

    def model(self, seat: int) -> nn.Module:
        """The model of a seat, wearing what it was given last."""
        return self._worn(seat).model

    def wear(self, seat: int, updates: Mapping[str, LowRank]) -> Adapter:
        """Give a seat's model these updates, with the head of its source; modules that are left out are bypassed."""
        adapter = self.dressed(seat, updates)
        self._worn(seat).set(adapter)
        return adapter

    def dressed(self, seat: int, updates: Mapping[str, LowRank]) -> Adapter:
        """The adapter with these updates and the heads of a source."""
        own = self.sources.adapters[seat]
        like = replace(own, sites={**self.sources.like.sites, **own.sites})
        merged = from_updates(updates, like=like, source="merged")
        heads = {key: tensor for key, tensor in own.tensors.items() if key in own.others}
        return replace(merged, tensors={**heads, **merged.tensors})

    def scores(self, seat: int, updates: Mapping[str, LowRank], split: str, *, keep_logits: bool = False) -> Scores:
        """Per-example scores of these updates on a seat's task."""
        self.wear(seat, updates)
        model, task = self.model(seat), self.tasks[seat]
        model.eval()
        with torch.inference_mode():
            batches = task.batches(split, self.sources.device)
            return Scores.join([task.judge(model, batch, keep_logits=keep_logits) for batch in batches])

    def _worn(self, seat: int) -> Attached:
        if seat not in self._attached:
            model = self.tasks[seat].build_model().to(self.sources.device)
            some = {name: _nothing(self.sources, name) for name in self.sources.modules}
            self._attached[seat] = put_on(model, self.dressed(seat, some))
        return self._attached[seat]

    def _same(self, index: int) -> int:
        def key(i: int) -> Any:
            return self.tasks[i].record

        for other in range(index):
            if key(other) == key(index) and _equal_heads(self.sources.adapters[other], self.sources.adapters[index]):
                return other
        return index


def _equal_heads(a: Adapter, b: Adapter) -> bool:
    return set(a.others) == set(b.others) and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.others)


def _nothing(sources: Sources, name: str) -> LowRank:
    shape = sources.shapes[name]
    return LowRank(torch.zeros(1, shape[1:].numel()), torch.zeros(shape[0], 1), tuple(shape))


def mean_loss(scores: Sequence[Scores]) -> float:
    """The mean over tasks of the mean loss."""
    return sum(s.mean_loss for s in scores) / len(scores)
