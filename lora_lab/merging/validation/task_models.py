"""A model for every task that merged adapters are scored on; weights change in place between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.models.attached import Attached, put_on
from lora_lab.errors import OptionError, TunerError
from lora_lab.merging.sources import Sources
from lora_lab.results.result import fingerprint
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import ONE_BY_ONE, Batching
from lora_lab.scoring.models import TaskModels, seconds_of
from lora_lab.tasks.task import Scores, Task


class MergeModels(TaskModels):
    """The tasks of some sources, on models that wear merged updates with the head of a source.

    Sources of equal tasks share a model, and are one index where their heads are equal as well. Models are built on
    first use. Raises OptionError where the sources have no tasks.
    """

    def __init__(self, sources: Sources) -> None:
        if sources.tasks is None:
            raise OptionError("this looks at data: the adapters' own tasks, or `task`, are needed")
        super().__init__(sources.adapters, sources.tasks, sources.device)
        self.sources = sources
        self._models: dict[str, Attached] = {}
        self._index = [self._first_equal(i) for i in range(len(self.tasks))]
        self._updates: dict[int, dict[str, LowRank]] = {}

    @classmethod
    def of(
        cls,
        base: Callable[[], nn.Module] | None,
        adapters: Sequence[Adapter],
        tasks: Sequence[Task],
        device: torch.device,
    ) -> MergeModels:
        """Those of adapters, each with its task; `base` as in `Sources`."""
        return cls(Sources(adapters, base=base, tasks=tasks, device=device))

    @property
    def indices(self) -> list[int]:
        """Of the sources that stand for every different task and head."""
        return sorted(set(self._index))

    def index(self, source: int) -> int:
        """The first source of the same task and head."""
        return self._index[source]

    def model(self, index: int) -> nn.Module:
        """The model of a source's task, with what was loaded last."""
        return self._on_model(index).model

    def load(self, index: int, updates: Mapping[str, LowRank]) -> nn.Module:
        """The model with these updates and the head of the source; modules that are left out are bypassed."""
        attached = self._on_model(index)
        attached.set(self._adapter(index, updates))
        return attached.model

    def scores(self, index: int, updates: Mapping[str, LowRank], examples: Examples) -> Scores:
        """Per-example scores of these updates on a source's task."""
        return self.score(self.load(index, updates), examples, index)

    def ensemble(
        self, index: int, members: Sequence[Mapping[str, LowRank]], weights: Sequence[float], examples: Examples
    ) -> Scores:
        """Per-example scores of the weighted sum of the logits of several sets of updates on a source's task.

        TunerError of a task that is judged by something else than logits.
        """
        task, parts = self.tasks[index], []
        if type(task).judge is not Task.judge:
            raise TunerError(f"task {task.name}: judged in a way of its own, not by logits, of which an ensemble is")
        self.model(index).eval()
        for batch in self.batches(examples, index):
            logits = []
            for updates, weight in zip(members, weights, strict=True):
                if weight:  # 0 times −∞, where an example has fewer options, is no number
                    model = self.load(index, updates)
                    with torch.inference_mode():
                        logits.append(weight * task.logits(model, batch).float())
            parts.append(task.judge_logits(torch.stack(logits).sum(0), batch))
        return Scores.join(parts)

    def updates(self, index: int) -> dict[str, LowRank]:
        """The exact ΔW of a source."""
        if index not in self._updates:
            names = [name for name in self.sources.modules if name in self.adapters[index].sites]
            self._updates[index] = {name: self.sources.updates_of(name)[index] for name in names}
        return self._updates[index]

    @property
    def nothing(self) -> dict[str, LowRank]:
        """ΔW = 0 in all modules."""
        shapes = self.sources.shapes.items()
        return {n: LowRank(torch.zeros(1, s[1:].numel()), torch.zeros(s[0], 1), tuple(s)) for n, s in shapes}

    def pace(self, examples: Examples, batching: Batching = ONE_BY_ONE) -> float:
        """Seconds of a forward pass on one batch, where the weights are loaded once for all batches."""
        updates, batches = self.updates(0), self.batches(examples)
        model = self.load(0, updates).eval()
        with torch.inference_mode():
            of_batch = seconds_of(lambda: self.tasks[0].judge(model, batches[0]))
        return of_batch + seconds_of(lambda: self.load(0, updates)) / len(batches)

    def _adapter(self, index: int, updates: Mapping[str, LowRank]) -> Adapter:
        """These updates as an adapter with the head of a source."""
        source = self.adapters[index]
        like = replace(source, sites={**self.sources.like.sites, **source.sites})
        merged = from_updates(updates, like=like, source=source.source)
        heads = {key: source.tensors[key] for key in source.others if key.startswith(PREFIX)}
        return replace(merged, tensors={**merged.tensors, **heads})

    def _on_model(self, index: int) -> Attached:
        key = fingerprint([self.tasks[index].record, sorted(self.adapters[index].others)])
        if key not in self._models:
            model = self.tasks[index].model_on(self.device)
            self._models[key] = put_on(model, self._adapter(index, self.nothing))
        return self._models[key]

    def _first_equal(self, index: int) -> int:
        adapter, task = self.adapters[index], self.tasks[index].record
        for other in range(index):
            if self.tasks[other].record == task and _equal_heads(self.adapters[other], adapter):
                return other
        return index


def _equal_heads(a: Adapter, b: Adapter) -> bool:
    return set(a.others) == set(b.others) and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.others)


def mean_loss(scores: Sequence[Scores]) -> float:
    """The mean over tasks of the mean loss."""
    return sum(s.mean_loss for s in scores) / len(scores)
