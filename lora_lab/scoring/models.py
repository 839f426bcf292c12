"""Models of tasks that wear adapters, whose weights change in place: what the evaluator applies its changes to.

Knows one adapter a task, or several on one; not where the scores go.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import Attached, put_on
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import ONE_BY_ONE, Batching
from lora_lab.scoring.layout import Layout, Variant
from lora_lab.scoring.prefixes import Variants
from lora_lab.tasks.task import Scores, Task

Made = TypeVar("Made")


@dataclass(frozen=True)
class Effort:
    """What it took to score variants."""

    computed: int = 0
    """Block evaluations."""
    kept_bytes: int = 0
    """The largest size of the activations remembered at once."""
    why_not: str | None = None
    """Why no block was shared; None where they were."""
    apart: str | None = None
    """Why coalitions went one after another that were to go through passes together; None where they did not."""

    def __add__(self, other: Effort) -> Effort:
        return Effort(
            self.computed + other.computed,
            max(self.kept_bytes, other.kept_bytes),
            self.why_not or other.why_not,
            self.apart or other.apart,
        )


class TaskModels:
    """Some adapters, a task for each of them, and a model of the first task that can wear any; built on first use."""

    def __init__(
        self, adapters: Sequence[Adapter], tasks: Sequence[Task], device: torch.device, *, share: bool = True
    ) -> None:
        self.adapters, self.tasks, self.device = list(adapters), list(tasks), device
        self._share = share
        self._latest: tuple[str, Any] = ("", None)
        self._placed: dict[tuple[int, str, int], list[dict[str, Tensor]]] = {}

    @cached_property
    def attached(self) -> Attached:
        """A model of the first task with places for all adapters, which wears the first."""
        return put_on(self.tasks[0].model_on(self.device), *self.adapters)

    @cached_property
    def variants(self) -> Variants:
        """The states of the first adapter, scored with shared prefixes."""
        return Variants(self.attached, share=self._share, why_not=self.tasks[0].why_not_shared)

    @property
    def layout(self) -> Layout:
        """The blocks of the model, and what variants share by them."""
        return self.variants.layout

    @property
    def effort(self) -> Effort:
        """Of all variants scored so far."""
        if "variants" not in vars(self):
            return Effort()
        variants = self.variants
        return Effort(variants.computed, variants.kept_bytes, variants.layout.why_not, variants.apart)

    def batches(self, examples: Examples, index: int = 0) -> list[dict[str, Tensor]]:
        """The examples of a task in batches on the device."""
        task = self.tasks[index]
        if examples.count is None:
            return task.batches(examples.split, self.device)
        place = index, examples.split, examples.count
        if place not in self._placed:
            batches = examples.of_task(task).batches(task.batch_size)
            self._placed[place] = [{n: t.to(self.device) for n, t in batch.items()} for batch in batches]
        return self._placed[place]

    def score(self, model: nn.Module, examples: Examples, index: int = 0) -> Scores:
        """Scores of a task's model as it is; the model is put into evaluation mode."""
        model.eval()
        with torch.inference_mode():
            batches, kept = self.batches(examples, index), examples.logits
            return Scores.join([self.tasks[index].judge(model, batch, keep_logits=kept) for batch in batches])

    def score_variants(
        self, variants: Sequence[Variant], examples: Examples, batching: Batching = ONE_BY_ONE
    ) -> Iterator[tuple[int, Scores]]:
        """(Index, scores) of every variant, in the order in which they share most."""

        def judge(model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
            return self.tasks[0].judge(model, batch, keep_logits=examples.logits)

        return self.variants.run(variants, self.batches(examples), judge, batching)

    @contextlib.contextmanager
    def wearing(self, adapter: Adapter) -> Iterator[nn.Module]:
        """The model with another adapter where the first is, which is put back afterwards."""
        self.attached.set(adapter)
        try:
            yield self.attached.model
        finally:
            self.attached.set(self.adapters[0])

    def score_base(self, examples: Examples) -> Scores:
        """Scores of the base alone: the variant with nothing on."""
        off = (0.0,) * len(self.variants.names)
        return next(scores for _, scores in self.score_variants([off], examples))

    def latest(self, key: str, make: Callable[[], Made]) -> Made:
        """What was made for this key, if that was the last: neighbouring changes share what takes long to make."""
        if self._latest[0] != key:
            self._latest = "", None  # there is room for one
            self._latest = key, make()
        made: Made = self._latest[1]
        return made

    def pace(self, examples: Examples, batching: Batching = ONE_BY_ONE) -> float:
        """Seconds that a variant takes on one batch where nothing is shared, in passes over as many as `batching` says.

        Where these cannot go together, those of a pass over one.
        """
        count = batching.foreseen or 1
        plain = Variants(self.attached, share=False)
        drawn = np.random.default_rng(0).random((count, len(plain.names))) < 0.5
        variants = [tuple(map(float, row)) for row in drawn] if count > 1 else [plain.all_on()]
        batches, judge = self.batches(examples)[:1], self.tasks[0].judge
        how = replace(batching, at_once=count)
        seconds = seconds_of(lambda: list(plain.run(variants, batches, judge, how))) / count
        return seconds if plain.apart is None else self.pace(examples)


def seconds_of(work: Callable[[], object]) -> float:
    """How long something takes, the shortest of up to five times after a first one, while all take less than 2 s.

    On a busy machine a single time can be a hundred times too long.
    """
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times) < 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])
