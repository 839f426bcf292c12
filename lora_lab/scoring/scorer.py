"""A model that wears one adapter and the examples that its variants are scored on: here, or in a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.attached import put_on
from lora_lab.scoring.examples import Examples, Sent
from lora_lab.scoring.prefixes import Layout, Variant, Variants
from lora_lab.tasks.task import Scores, Task

Answer = tuple[list["Scores | None"], "Effort", "str | None"]
"""Scores in the order they were asked for (None: the base), what they took, and the model's dtype."""

Make = Callable[[Adapter], Adapter | None]
"""Makes another adapter of the one that is worn; None for the base alone."""


@dataclass(frozen=True)
class Effort:
    """What it took to score variants."""

    computed: int = 0
    """Block evaluations."""
    kept_bytes: int = 0
    """The largest size of the activations remembered at once."""
    why_not: str | None = None
    """Why no block was shared; None where they were."""

    def __add__(self, other: Effort) -> Effort:
        return Effort(
            self.computed + other.computed,
            max(self.kept_bytes, other.kept_bytes),
            self.why_not or other.why_not,
        )


class Scorer:
    """A base model of its own that wears an adapter, and scores its variants and other adapters in its place."""

    def __init__(self, adapter: Adapter, task: Task, *, device: torch.device, share: bool = True) -> None:
        self.adapter, self.task, self.device = adapter, task, device
        self._share = share
        self._placed: dict[Examples, list[dict[str, Tensor]]] = {}

    @cached_property
    def variants(self) -> Variants:
        """The engine."""
        return Variants(put_on(self.task.model_on(self.device), self.adapter), share=self._share)

    @property
    def effort(self) -> Effort:
        """Of all that was scored so far."""
        return Effort(self.variants.computed, self.variants.kept_bytes, self.variants.why_not)

    def batches(self, examples: Examples) -> list[dict[str, Tensor]]:
        """The examples in batches on the device."""
        if examples not in self._placed:
            batches = examples.of_task(self.task).batches(self.task.batch_size)
            self._placed[examples] = [{name: t.to(self.device) for name, t in batch.items()} for batch in batches]
        return self._placed[examples]

    def scores(self, variants: Sequence[Variant], on: Examples, *, logits: bool) -> Iterator[tuple[int, Scores]]:
        """(Index, scores) of every variant, in the order in which they share most."""

        def judge(model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
            return self.task.judge(model, batch, keep_logits=logits)

        return self.variants.run(variants, self.batches(on), judge)

    def score_other(self, make: Make, on: Examples) -> Scores | None:
        """Scores of another adapter in this one's place; None for the base alone, which is a variant."""
        other = make(self.adapter)
        if other is None:
            return None
        self.variants.attached.set(other)
        try:
            with torch.inference_mode():
                return Scores.join([self.task.judge(self.variants.model, batch) for batch in self.batches(on)])
        finally:
            self.variants.attached.set(self.adapter)

    def pace(self, on: Examples) -> float:
        """Seconds of a forward pass on one batch with everything on."""
        plain = Variants(self.variants.attached, share=False)
        return seconds_of(lambda: list(plain.run([plain.all_on()], self.batches(on)[:1], self.task.judge)))


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


@dataclass(frozen=True)
class ScorerSetup:
    """Builds a scorer in a worker, where it answers the questions below."""

    adapter: Adapter
    task: Sent
    device: str
    share: bool
    fingerprint: str

    def __call__(self) -> Callable[[Any], Any]:
        """Its answers."""
        scorer = Scorer(self.adapter, self.task.task(), device=torch.device(self.device), share=self.share)

        def answer(question: Callable[[Scorer], Any]) -> Any:
            return question(scorer)

        return answer


@dataclass(frozen=True)
class Look:
    """What are the model's blocks, and how long does a forward pass on a batch of these examples take?"""

    on: Examples

    def __call__(self, scorer: Scorer) -> tuple[Layout, float]:
        """The layout and the seconds."""
        return scorer.variants.layout, scorer.pace(self.on)


@dataclass(frozen=True)
class Several:
    """What are the scores of some variants?"""

    keys: Sequence[str]
    """What the driver knows them by."""
    variants: Sequence[Variant]
    on: Examples
    logits: bool

    def __call__(self, scorer: Scorer) -> Answer:
        """Their scores."""
        before = scorer.variants.computed
        found = dict(scorer.scores(self.variants, self.on, logits=self.logits))
        whole = scorer.effort
        effort = Effort(whole.computed - before, whole.kept_bytes, whole.why_not)
        return [found[i] for i in range(len(self.variants))], effort, scorer.task.dtype


@dataclass(frozen=True)
class Others:
    """What are the scores of some other adapters in the place of the one that is worn?"""

    keys: Sequence[str]
    makes: Sequence[Make]
    on: Examples

    def __call__(self, scorer: Scorer) -> Answer:
        """Their scores."""
        return [scorer.score_other(make, self.on) for make in self.makes], Effort(), scorer.task.dtype
