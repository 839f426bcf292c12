"""Scores of changes of adapters, each computed once: here or by workers, remembered, and kept in a journal.

Every question about adapters asks an `Evaluator`: which layers are on, points between adapters, merges, prunings. It
knows what a change costs and how work is cut into batches; not what a change means, nor what its scores are for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import LoraLabError, MismatchError, OptionError, shorten
from lora_lab.results.result import fingerprint, provenance
from lora_lab.scoring.changes import Change, LayerMask
from lora_lab.scoring.examples import Examples, TaskSpec, detached, examples_of, pack, remembered
from lora_lab.scoring.execution import ONE_BY_ONE, Batching, Cost, Execution, Progress
from lora_lab.scoring.gates import Pass, Passed, remembered_pass
from lora_lab.scoring.journal import Journal
from lora_lab.scoring.layout import Layout
from lora_lab.scoring.models import Effort, TaskModels
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores, Split, Task

# A worker's batch is a minute's work, so that little is lost with it, but not fewer changes than these: cut into 32,
# the coalitions of antithetic orders over 80 blocks share .50 of their blocks in place of .52; cut into 8, .45.
_LEAST, _SECONDS = 32, 60.0

Build = Callable[[Sequence[Adapter], Sequence[Task], torch.device], Any]
"""Makes the models (a `TaskModels`) of adapters, their tasks and a device; for workers it must be picklable."""

Known = dict[tuple[str, str], Scores]
"""(Split, key of a change) → its scores."""

Work = tuple[Callable[["Evaluator"], object], Iterable[tuple[str, Change]]]
"""What asks an evaluator for scores, some of which may hang on others, and all (split, change) that are not new."""

_Answer = tuple[Known, "LoraLabError | None", Effort, "list[str | None]"]
"""What was new in a worker, why it refused, what it took, and the dtype of each task's model."""


class Evaluator:
    """Per-example scores of changes of some adapters on their tasks (one for all, or one an adapter).

    A journal lies in the folder `on.cache`, under a name made of the adapters' bits, the tasks, the examples and
    `context`; so another question about them finds what is known, and a killed run goes on. `examples` draws so many
    of `split` with seed 0; `more_splits` are asked for, too. With workers, these compute, and no model is built here.
    `build` makes the models that changes are applied to.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        tasks: Task | Sequence[Task],
        on: Execution = Execution(),
        *,
        split: str = "test",
        examples: int | None = None,
        more_splits: Sequence[str] = (),
        build: Build = TaskModels,
        context: object = None,
    ) -> None:
        self.adapters = list(adapters)
        self.tasks = [tasks] * len(self.adapters) if isinstance(tasks, Task) else list(tasks)
        self.on, self.device, self.split = on, on.place(), split
        self.batching = on.batching()
        self.known: Known = {}
        self.evaluated = 0
        self.total: int | None = None
        """Scores that will be asked for over all; progress is told of the whole then, else of each call."""
        self._splits, self._count = list(dict.fromkeys((split, *more_splits))), examples
        self._build, self._context = build, context
        self._journals: dict[str, Journal | None] = {}
        self._effort = Effort()
        self._called: tuple[Progress | None, int, int] = None, 0, 0
        """Whom the running call tells, how many scores it has, and how many it waits for."""
        self._data = self.drawn(split).of_task(self.task)
        self._counts = {split: len(self._data)} if isinstance(tasks, Task) else {}
        self._specs = {fingerprint(task.spec): TaskSpec.of(task) for task in self.tasks} if on.workers else {}

    @property
    def task(self) -> Task:
        """The first task, on which layers and replacements are scored."""
        return self.tasks[0]

    @property
    def adapter(self) -> Adapter:
        """The first adapter, whose layers these are, and in whose place replacements come."""
        return self.adapters[0]

    @property
    def data(self) -> Split:
        """The examples of the split that changes are scored on."""
        return self._data

    @property
    def examples(self) -> int:
        """How many these are."""
        return len(self._data)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The right label of every example."""
        labels: npt.NDArray[np.int64] = self._data.inputs["labels"].cpu().numpy()
        return labels

    @property
    def batches(self) -> int:
        """Batches that every change is scored on."""
        return -(-len(self._data) // self.task.batch_size)

    @cached_property
    def models(self) -> Any:
        """What changes are applied to in this process; builds no model before it is used."""
        return self._build(self.adapters, self.tasks, self.device)

    @cached_property
    def layout(self) -> Layout:
        """The blocks of the model, and what layer masks share by them."""
        layout: Layout = self.gather([attrgetter("models.layout")])[0]
        return layout

    @cached_property
    def pace(self) -> float:
        """Seconds of a forward pass on one batch, timed once."""
        return float(self.gather([functools.partial(_pace, ONE_BY_ONE)])[0])

    @cached_property
    def pace_of_masks(self) -> float:
        """Seconds that a layer mask takes on one batch, sharing nothing."""
        return float(self.gather([functools.partial(_pace, self.batching)])[0]) if self.batching.wanted else self.pace

    @property
    def names(self) -> list[str]:
        """The adapted modules, in the order of a layer mask's states."""
        return list(self.layout.names)

    @property
    def effort(self) -> Effort:
        """What the scores took so far, here or in the workers."""
        if not self.on.workers:
            effort: Effort = self.models.effort
            return effort
        return self._effort + Effort(why_not=self.layout.why_not)

    def drawn(self, split: str) -> Examples:
        """Which examples of a split changes are scored on."""
        return Examples(split, self._count)

    def gather(self, questions: Sequence[Callable[[Evaluator], Any]]) -> list[Any]:
        """What this process's evaluator answers to each, or those of the workers, side by side."""
        if self.on.workers:
            return self.on.workers.map(self._setup, questions)
        return [question(self) for question in questions]

    def answers(self, questions: Sequence[Pass]) -> list[Passed]:
        """What passes give, each kept in the journal as soon as it is there, and read from it if it is."""
        journal = self._journal(self.split)
        found = {asked.key: remembered_pass(journal, asked, self.examples) for asked in questions}
        new = [asked for asked in questions if found[asked.key] is None]

        def keep(asked: Pass, answer: Passed) -> None:
            found[asked.key] = answer
            if journal is not None:
                journal.add(asked.key, answer.packed())
            if self.total is None:
                self.on.report(sum(each is not None for each in found.values()), len(found))

        if self.on.workers:
            self.on.workers.map(self._setup, new, keep)
        for asked in [] if self.on.workers else new:
            keep(asked, asked(self))
        return [answer for asked in questions if (answer := found[asked.key])]

    def keeping(self, modules: Collection[str], factor: float = 1.0) -> LayerMask:
        """Exactly these modules on, their updates scaled by `factor`."""
        missing = sorted(set(modules) - set(self.names))
        if missing:
            source = self.adapter.source
            raise OptionError(f"{source}: adapts no module {shorten(missing)}; there are: {shorten(self.names)}")
        return LayerMask(tuple(factor if name in modules else 0.0 for name in self.names))

    def scores(
        self,
        changes: Sequence[Change],
        split: str | None = None,
        *,
        logits: bool = False,
        progress: Progress | None = None,
    ) -> list[Scores]:
        """Scores of every change (with logits on request), computing what is not known yet.

        `progress` in place of that of the execution is told of this call.
        """
        split = split or self.split
        missing = {c.key: c for c in changes if not self._knows(split, c.key, logits=logits)}
        if missing:
            self._called = progress or self.on.progress, 0, len(missing)
            if self.on.workers:
                self._in_workers(list(missing.values()), split, logits=logits)
            else:
                self._here(list(missing.values()), split, logits=logits)
        return [self.known[split, change.key] for change in changes]

    def prepare(
        self, works: Sequence[Work], refusals: tuple[type[LoraLabError], ...] = ()
    ) -> list[LoraLabError | None]:
        """Let workers do all of these, so that every score that they ask for is known here; their errors, or None.

        Only errors of the kinds in `refusals` are given back; others are raised.
        """
        assert self.on.workers is not None
        pieces = []
        for ask, changes in works:
            places = [(split, change.key) for split, change in changes]
            pieces.append(_Piece(ask, {where: self.known[where] for where in places if self._knows(*where)}, refusals))

        def keep(_: _Piece, answer: _Answer) -> None:
            new, effort, dtypes = answer[0], *answer[2:]
            self._effort += effort
            for task, dtype in zip(self.tasks, dtypes, strict=True):
                task.dtype = dtype or task.dtype
            for (split, key), scores in new.items():
                self._keep(split, key, scores)

        return [error for _, error, *_ in self.on.workers.map(self._setup, pieces, keep)]

    def cost(self, masks: Iterable[LayerMask], *, logits: bool = False) -> Cost:
        """What `scores` would compute for these layer masks; the seconds are extrapolated from one timed batch."""
        different = {mask.key: mask for mask in masks}.values()
        missing = [mask.states for mask in different if not self._knows(self.split, mask.key, logits=logits)]
        naive = self.layout.blocks * len(missing) * self.batches
        alike = self.batching.compile  # passes of one shape share nothing
        blocks = naive if alike else self.layout.cost(missing, self.batching.foreseen) * self.batches
        share = blocks / naive if naive else 1.0
        passes = len(missing) * share * self.pace_of_masks / self.pace
        return Cost(len(missing), blocks, naive, self.seconds(passes))

    def seconds(self, passes: float) -> float:
        """How long so many forward passes over all examples take, the workers side by side; one batch is timed."""
        return passes * self.pace * self.batches / (self.on.workers.size if self.on.workers else 1)

    def provenance(self, adapters: Sequence[Adapter], *, began: float, run: str, **more: Any) -> dict[str, Any]:
        """Of what was asked of adapters like these since `began` (time.perf_counter)."""
        return provenance(
            inputs=[Path(adapter.source) for adapter in adapters],
            elapsed_s=time.perf_counter() - began,
            examples=self.examples,
            **more,
            run=run,
            device=str(self.device),
            dtype=self.task.dtype,
            workers=self.on.workers.size if self.on.workers else None,
        )

    def run_of(self, split: str) -> str:
        """What the scores of a split hang on besides the change, hashed."""
        tasks = {fingerprint(task.spec): task for task in self.tasks}
        adapters = [adapter.identity for adapter in self.adapters]
        places = [fingerprint(task.spec) for task in self.tasks]
        examples = [[*examples_of(task, split), len(self.drawn(split).of_task(task))] for task in tasks.values()]
        code = digests.of_entries()
        together = ["together"] if self.batching.wanted else []  # such passes may round otherwise
        return fingerprint([adapters, places, examples, self.device.type, self._context, code, *together])

    def _here(self, changes: Sequence[Change], split: str, *, logits: bool) -> None:
        """Compute in this process, layer masks in the order in which they share most."""
        examples = replace(self.drawn(split), logits=logits)
        masks = [change for change in changes if isinstance(change, LayerMask)]
        if masks:
            states = [mask.states for mask in masks]
            for i, scores in self.models.score_variants(states, examples, self.batching):
                self._keep(split, masks[i].key, scores)
        for change in changes:
            if not isinstance(change, LayerMask):
                self._keep(split, change.key, change.apply(self.models, examples))

    def _in_workers(self, changes: Sequence[Change], split: str, *, logits: bool) -> None:
        """Have workers compute, in batches whose layer masks share the longest prefixes."""
        masks = [change for change in changes if isinstance(change, LayerMask)]
        order = self.layout.walk([mask.states for mask in masks])[0] if masks else []
        ordered: list[Change] = [masks[i] for i in order]
        ordered += [change for change in changes if not isinstance(change, LayerMask)]
        assert self.on.workers is not None
        batches = self.on.workers.cut(ordered)
        if len(batches[0]) > _LEAST:
            batches = self.on.workers.cut(ordered, max(_LEAST, int(_SECONDS / (self.pace_of_masks * self.batches))))
        self.prepare([(functools.partial(_score, tuple(batch), split, logits), ()) for batch in batches])

    def _knows(self, split: str, key: str, *, logits: bool = False) -> bool:
        """Whether the scores are known, in memory or in the journal."""
        if (split, key) not in self.known:
            for name in (f"{key} logits", key):
                scores = remembered(self._journal(split), name, self._counts.get(split))
                if scores is not None:
                    self.known[split, key] = scores
                    if self.total is not None:
                        self.on.report(min(len(self.known), self.total), self.total)
                    break
        return (split, key) in self.known and (not logits or self.known[split, key].logits is not None)

    def _keep(self, split: str, key: str, scores: Scores) -> None:
        self.known[split, key] = scores
        self.evaluated += 1
        journal = self._journal(split)
        if journal is not None:
            journal.add(key + (" logits" if scores.logits is not None else ""), pack(scores))
        if self.total is not None:
            self.on.report(min(len(self.known), self.total), self.total)
            return
        tell, done, count = self._called
        self._called = tell, done + 1, count
        if tell:
            tell(done + 1, count)

    def _journal(self, split: str) -> Journal | None:
        if split not in self._journals:
            run = self.run_of(split) if self.on.cache else ""
            self._journals[split] = Journal(self.on.cache / f"{run}.sqlite", run) if self.on.cache else None
        return self._journals[split]

    @cached_property
    def _setup(self) -> _Setup:
        runs = [self.run_of(split) for split in self._splits]
        specs = tuple(self._specs[fingerprint(task.spec)] for task in self.tasks)
        here = {fingerprint(task.spec): [Examples.of(task, split) for split in self._splits] for task in self.tasks}
        split, *more = self._splits
        options = {"split": split, "more_splits": more, "examples": self._count, "build": self._build}
        builds = fingerprint(["evaluator", runs, str(self.device), repr(self._build), repr(self.batching)])
        there = replace(self.on, device=self.device, cache=None, workers=None, progress=None, confirm=None)
        there = replace(there, by_example=None)  # nor is what is told here
        return _Setup(tuple(map(detached, self.adapters)), specs, here, options, there, builds, digests.of_transforms())


@dataclass(frozen=True)
class _Setup:
    """An evaluator in a worker, which keeps nothing from one question to the next but its models."""

    adapters: tuple[Adapter, ...]
    tasks: tuple[TaskSpec, ...]
    """One an adapter."""
    examples: Mapping[str, Sequence[Examples]]
    """Fingerprint of a task → its examples on the driver's machine."""
    options: Mapping[str, Any]
    on: Execution
    fingerprint: str
    code: str
    """Of this package, by which changes are known."""

    def __call__(self) -> Callable[[Callable[[Evaluator], Any]], Any]:
        if digests.of_transforms() != self.code:
            raise MismatchError("lora-lab merges and prunes by other code in a worker than here")
        built = {fingerprint(spec.record): spec for spec in self.tasks}
        tasks = {name: spec.task() for name, spec in built.items()}
        for name, theirs in self.examples.items():
            for examples in theirs:
                examples.of_task(tasks[name])  # the same ones, or it says so
        evaluator = Evaluator(
            self.adapters, [tasks[fingerprint(spec.record)] for spec in self.tasks], self.on, **self.options
        )
        return lambda question: question(evaluator)


@dataclass(frozen=True)
class _Piece:
    """Work for a worker, and what is known already of all that it may ask for."""

    ask: Callable[[Evaluator], object]
    known: Known
    refusals: tuple[type[LoraLabError], ...]

    def __call__(self, evaluator: Evaluator) -> _Answer:
        """Do it on a worker's evaluator."""
        evaluator.known = dict(self.known)
        before, error = evaluator.effort.computed, None
        try:
            self.ask(evaluator)
        except self.refusals as refusal:
            error = refusal
        new = {where: scores for where, scores in evaluator.known.items() if where not in self.known}
        effort = replace(evaluator.effort, computed=evaluator.effort.computed - before)
        return new, error, effort, [task.dtype for task in evaluator.tasks]


def _score(changes: Sequence[Change], split: str, logits: bool, evaluator: Evaluator) -> None:
    evaluator.scores(changes, split, logits=logits)


def _pace(batching: Batching, evaluator: Evaluator) -> float:
    return float(evaluator.models.pace(evaluator.drawn(evaluator.split), batching))
