"""One model for every task that merged adapters are judged on; weights change in place between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.attached import Attached, put_on
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError
from lora_lab.merging.sources import Sources
from lora_lab.results.result import fingerprint
from lora_lab.tasks.task import Scores, Task


class Panel:
    """The tasks of some sources, on models that wear merged updates with the head of a source.

    Sources of equal tasks share a model, and are one seat where their heads are equal as well. Models are built on
    first use. Raises OptionError where the sources have no tasks.
    """

    def __init__(self, sources: Sources) -> None:
        if sources.tasks is None:
            raise OptionError("this looks at data: the adapters' own tasks, or --task, are needed")
        self.sources = sources
        self.tasks: list[Task] = sources.tasks
        self._models: dict[str, Attached] = {}
        self._seat = [self._first_equal(i) for i in range(len(self.tasks))]

    @property
    def seats(self) -> list[int]:
        """Indices of the sources that stand for every different task and head."""
        return sorted(set(self._seat))

    def seat_of(self, index: int) -> int:
        """The seat of a source."""
        return self._seat[index]

    def model(self, seat: int) -> nn.Module:
        """The model of a seat, wearing what its task's model was given last."""
        return self._attached(seat).model

    def wear(self, seat: int, updates: Mapping[str, LowRank]) -> None:
        """Give a seat's model these updates and the head of its source; modules that are left out are bypassed."""
        self._attached(seat).set(self._dressed(seat, updates))

    def scores(self, seat: int, updates: Mapping[str, LowRank], split: str) -> Scores:
        """Per-example scores of these updates on a seat's task."""
        self.wear(seat, updates)
        model, task = self.model(seat), self.tasks[seat]
        model.eval()
        with torch.inference_mode():
            return Scores.join([task.judge(model, batch) for batch in task.batches(split, self.sources.device)])

    def ensemble(
        self, seat: int, members: Sequence[Mapping[str, LowRank]], weights: Sequence[float], split: str
    ) -> Scores:
        """Per-example scores of the weighted sum of the logits of several sets of updates on a seat's task."""
        model, task = self.model(seat), self.tasks[seat]
        model.eval()
        parts = []
        for batch in task.batches(split, self.sources.device):
            said = []
            for updates, weight in zip(members, weights, strict=True):
                if weight:  # 0 times −∞, where an example has fewer options, is no number
                    self.wear(seat, updates)
                    with torch.inference_mode():
                        said.append(weight * task.logits(model, batch).float())
            parts.append(task.judge_logits(torch.stack(said).sum(0), batch))
        return Scores.join(parts)

    def _dressed(self, seat: int, updates: Mapping[str, LowRank]) -> Adapter:
        own = self.sources.adapters[seat]
        merged = from_updates(
            updates, like=replace(own, sites={**self.sources.like.sites, **own.sites}), source=own.source
        )
        heads = {key: own.tensors[key] for key in own.others if key.startswith(PREFIX)}
        return replace(merged, tensors={**merged.tensors, **heads})

    def _attached(self, seat: int) -> Attached:
        key = fingerprint([self.tasks[seat].record, sorted(self.sources.adapters[seat].others)])
        if key not in self._models:
            model = self.tasks[seat].model_on(self.sources.device)
            self._models[key] = put_on(model, self._dressed(seat, self._nothing))
        return self._models[key]

    @property
    def _nothing(self) -> dict[str, LowRank]:
        """ΔW = 0 in all modules."""
        shapes = self.sources.shapes.items()
        return {n: LowRank(torch.zeros(1, s[1:].numel()), torch.zeros(s[0], 1), tuple(s)) for n, s in shapes}

    def _first_equal(self, index: int) -> int:
        mine, task = self.sources.adapters[index], self.tasks[index].record
        for other in range(index):
            if self.tasks[other].record == task and _equal_heads(self.sources.adapters[other], mine):
                return other
        return index


def _equal_heads(a: Adapter, b: Adapter) -> bool:
    return set(a.others) == set(b.others) and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.others)


def mean_loss(scores: Sequence[Scores]) -> float:
    """The mean over tasks of the mean loss."""
    return sum(s.mean_loss for s in scores) / len(scores)
