"""Scores of everything that a comparison of merges asks for, each computed once: here, or by workers beforehand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank
from lora_lab.analysis.game import Cost
from lora_lab.errors import LoraLabError, MismatchError, OptionError, TaskError, TunerError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.panel import Panel
from lora_lab.merging.sources import Sources
from lora_lab.results.result import Journal, fingerprint
from lora_lab.results.stats import Floats
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.examples import Examples, Sent, bare, pack, remembered
from lora_lab.scoring.scorer import seconds_of
from lora_lab.scoring.workers import Workers
from lora_lab.tasks.task import Scores

CANNOT = (MismatchError, TaskError, TunerError, OptionError)
"""What a method raises that cannot merge a set."""

Base = Callable[[], nn.Module]
Judged = list[list[Scores]]
"""For each place where a mix is judged, scores: of one merge, or of all adapters alone that share the place."""


@dataclass(frozen=True)
class Mix:
    """Adapters that are merged together, by their places in the list of all."""

    label: str
    method: str | None
    """Their training method, where it is one."""
    seed: int | None
    members: tuple[int, ...]
    weights: tuple[float, ...]
    ratio: str | None = None
    """For seeds of one task: their weights in words."""


@dataclass(frozen=True)
class Way:
    """A merge to be compared: its name in the table, the method, and its options."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[float, ...] = ()
    """Coefficients that are tried beside those of the grid."""

    def coefficients(self, grid: Sequence[float]) -> list[float]:
        """All that are tried, in order of first mention."""
        return list(dict.fromkeys((*grid, *self.also)))


@dataclass(frozen=True)
class Trial:
    """What a merge of a set came to."""

    curve: Mapping[str, Any]
    """Means over the tasks at every coefficient, on the validation splits."""
    best: float
    """The coefficient that they choose."""
    tested: Mapping[float, Judged]
    """The best coefficient, and 1 → scores on the split that is reported."""


class Court:
    """Scores of the members of all mixes, each computed once and kept in the journal."""

    def __init__(
        self,
        everyone: Sources,
        split: str,
        *,
        base: Base | None = None,
        journal: Journal | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        assert everyone.tasks is not None
        self.everyone, self.tasks, self.split, self.base = everyone, everyone.tasks, split, base
        self.panel = Panel(everyone)
        self.total = self.evaluated = 0
        self.known: dict[str, Scores] = {}
        self.refused: dict[tuple[Mix, str], LoraLabError] = {}
        """A set and the name of a way that is known not to merge it → why."""
        self._journal, self._progress = journal, progress
        self._own: dict[int, dict[str, LowRank]] = {}

    def alone(self, mix: Mix, split: str) -> Judged:
        """Each member on its own task, as it is."""

        found = [self.own(i, split) for i in mix.members]
        return [found] if len(self._places(mix)) < len(mix.members) else [[scores] for scores in found]

    def own(self, i: int, split: str) -> Scores:
        """An adapter on its own task, as it is."""

        def make() -> Scores:
            adapter = self.everyone.adapters[i]
            if adapter.why_not_additive is None:
                return self.panel.scores(i, self._updates(i), split)
            return score(self.tasks[i], adapter, split, device=self.everyone.device)

        return self._scores(self.own_key(i, split), make)

    def ensemble(self, mix: Mix, split: str) -> Judged:
        """The weighted mean of all members' logits on each one's task, with its head."""
        found = []
        weights = [weight / sum(mix.weights) for weight in mix.weights]
        for i, key in self.ensemble_keys(mix, split).items():

            def mean(i: int = i) -> Scores:
                return self.panel.ensemble(i, [self._updates(j) for j in mix.members], weights, split)

            found.append([self._scores(key, mean)])
        return found

    def judge(
        self, mix: Mix, way: Way, coefficient: float, split: str, made: Callable[[], Mapping[str, LowRank]]
    ) -> Judged:
        """The merge, times a coefficient, on every member's task."""

        def scaled(i: int) -> Scores:
            updates = {name: coefficient * update for name, update in made().items()}
            return self.panel.scores(i, updates, split)

        keys = self.merge_keys(mix, way, coefficient, split)
        return [[self._scores(key, lambda i=i: scaled(i))] for i, key in keys.items()]  # type: ignore[misc]

    def trial(self, mix: Mix, way: Way, grid: Sequence[float]) -> Trial:
        """The merge at every coefficient on the validation splits, then the best one and 1 on the other split.

        Raises one of CANNOT where the method cannot merge these.
        """
        if (mix, way.name) in self.refused:
            raise self.refused[mix, way.name]
        made = self.merged(mix, way)
        tried = {c: self.judge(mix, way, c, "validation", made) for c in way.coefficients(grid)}
        curve = _curve(tried, self.alone(mix, "validation"))
        best = _best(curve)
        return Trial(curve, best, {c: self.judge(mix, way, c, self.split, made) for c in dict.fromkeys((best, 1.0))})

    def merged(self, mix: Mix, way: Way) -> Callable[[], Mapping[str, LowRank]]:
        """The merge itself, made when it is first asked for."""
        made: dict[str, LowRank] = {}

        def make() -> Mapping[str, LowRank]:
            if not made:
                members = [self.everyone.adapters[i] for i in mix.members]
                tasks = [self.tasks[i] for i in mix.members]
                sources = Sources(members, mix.weights, base=self.base, tasks=tasks, device=self.everyone.device)
                made.update(merge(sources, way.method, options=way.options, heads="keep-own").adapter.updates)
            return made

        return make

    def passes(self, mix: Mix, ways: Sequence[Way], grid: Sequence[float]) -> int:
        """Evaluations that a mix asks for, at the most."""
        tried = sum(len(way.coefficients(grid)) + 2 for way in ways) if len(mix.members) > 1 else 0
        return len(self._places(mix)) * (tried + 1) + 2 * len(mix.members)

    def seconds(self) -> dict[str, float]:
        """Split → seconds of an evaluation of the first task on it."""
        return {
            split: seconds_of(lambda split=split: self.panel.scores(0, self._updates(0), split))  # type: ignore[misc]
            for split in ("validation", self.split)
        }

    def cost(self, mixes: Sequence[Mix], ways: Sequence[Way], seconds: Mapping[str, float]) -> Cost:
        """What all of it will take, from what `seconds` has measured."""
        whole = self.total * max(seconds.values())
        one = seconds["validation"] / len(self.tasks[0].split("validation"))
        for mix, way in itertools.product(mixes, ways):
            whole += one * MERGES[way.method].examples_read(way.options, [self.tasks[i] for i in mix.members])
        return Cost(self.total, 0, 0, whole)

    def keep(self, key: str, scores: Scores) -> None:
        """Know these, and write them to the journal."""
        self.known[key] = scores
        self.evaluated += 1
        if self._journal is not None:
            self._journal.add(key, pack(scores))
        self._tell()

    def _places(self, mix: Mix) -> tuple[int, ...]:
        """Members on whose tasks a mix is judged: one for all of them where they share the task and the head."""
        return mix.members[:1] if len({self.panel.seat_of(i) for i in mix.members}) == 1 else mix.members

    def _updates(self, index: int) -> dict[str, LowRank]:
        if index not in self._own:
            names = [name for name in self.everyone.modules if name in self.everyone.adapters[index].sites]
            self._own[index] = {name: self.everyone.updates_of(name)[index] for name in names}
        return self._own[index]

    def own_key(self, i: int, split: str) -> str:
        """What the scores of an adapter alone are known by."""
        return f"alone {i} {split}"

    def ensemble_keys(self, mix: Mix, split: str) -> dict[int, str]:
        """Place → what the scores of an ensemble there are known by."""
        return {i: f"ensemble {i} of {mix.members} {mix.weights} {split}" for i in self._places(mix)}

    def merge_keys(self, mix: Mix, way: Way, coefficient: float, split: str) -> dict[int, str]:
        """Place → what the scores of a merge there are known by."""
        key = f"{way.name} {mix.members} {mix.weights} {coefficient!r} {split}"
        return {i: f"{key} {i}" for i in self._places(mix)}

    def found(self, keys: Iterable[str]) -> dict[str, Scores]:
        """Those that are known, here or in the journal."""
        return {key: self.known[key] for key in keys if self._find(key)}

    def _find(self, key: str) -> bool:
        scores = None if key in self.known else remembered(self._journal, key)
        if scores is not None:
            self.known[key] = scores
            self._tell()
        return key in self.known

    def _scores(self, key: str, make: Callable[[], Scores]) -> Scores:
        if not self._find(key):
            self.keep(key, make())
        return self.known[key]

    def _tell(self) -> None:
        if self._progress:
            self._progress(min(len(self.known), self.total), self.total)


def _curve(tried: Mapping[float, Judged], alone: Judged) -> dict[str, Any]:
    """Means over the tasks at every coefficient, on the validation splits."""
    coefficients = sorted(tried)
    groups = [tried[c] for c in coefficients]
    accuracies = np.array([[correct(scores).mean() for scores in group] for group in groups])
    own = np.array([correct(scores).mean() for scores in alone])
    return {
        "coefficient": coefficients,
        "accuracy": accuracies.mean(1).tolist(),
        "normalised": share(accuracies, own).mean(1).tolist(),
        "loss": [float(np.mean([loss(scores) for scores in group])) for group in groups],
    }


def _best(curve: Mapping[str, Any]) -> float:
    """The coefficient of the highest mean normalised accuracy (of accuracy, where that is none), then of least loss."""
    judged = curve["normalised"] if np.isfinite(curve["normalised"]).all() else curve["accuracy"]

    def rank(i: int) -> tuple[float, float]:
        loss = curve["loss"][i]
        return round(judged[i], 12), -loss if math.isfinite(loss) else -math.inf

    best: float = curve["coefficient"][max(range(len(curve["coefficient"])), key=rank)]
    return best


def share(accuracy: Floats, own: Floats) -> Floats:
    """Accuracy as a share of the adapter's own; NaN where that is 0."""
    found: Floats = np.divide(accuracy, own, out=np.full(np.broadcast(accuracy, own).shape, np.nan), where=own > 0)
    return found


def correct(scores: Sequence[Scores]) -> Floats:
    """Correctness of each example, a mean over several adapters."""
    values: Floats = np.mean([s.correct for s in scores], axis=0, dtype=np.float64)
    return values


def loss(scores: Sequence[Scores]) -> float:
    """Mean loss over examples, and over several adapters."""
    return float(np.mean([s.mean_loss for s in scores]))


Answer = tuple[dict[str, Scores], LoraLabError | None, list[str | None]]
"""New scores, why a set cannot be merged, and the dtype of each task's model."""


class Clerks:
    """Workers that compute beforehand what the court will ask for."""

    def __init__(self, court: Court, workers: Workers, run: str) -> None:
        self._court, self._workers = court, workers
        sent = {fingerprint(task.spec): (task, Sent.of(task)) for task in court.tasks}
        splits = ("validation", court.split)
        self._setup = _Setup(
            tuple(map(bare, court.everyone.adapters)),
            tuple(sent[fingerprint(task.spec)][1] for task in court.tasks),
            {key: tuple(Examples.of(task, split) for split in splits) for key, (task, _) in sent.items()},
            court.split,
            court.base,
            str(court.everyone.device),
            fingerprint(["court", run, str(court.everyone.device)]),
        )

    def seconds(self) -> dict[str, float]:
        """What `Court.seconds` measures, on a worker."""
        (found,) = self._workers.map(self._setup, [Court.seconds])
        seconds: dict[str, float] = found
        return seconds

    def prepare(self, mixes: Sequence[Mix], ways: Sequence[Way], grid: Sequence[float]) -> None:
        """Everything that a comparison asks for: first the adapters as they are, then one item for every merge."""
        court, splits = self._court, ("validation", self._court.split)
        several = [mix for mix in mixes if len(mix.members) > 1]
        members = sorted({i for mix in mixes for i in mix.members})
        first = [self._question("own", (i, split), [court.own_key(i, split)]) for i in members for split in splits]
        first += [
            self._question("ensemble", (mix, court.split), court.ensemble_keys(mix, court.split).values())
            for mix in several
        ]
        self._workers.map(self._setup, [question for question in first if not question.answered], self._keep)
        trials = []
        for mix, way in itertools.product(several, ways):
            keys = [court.own_key(i, "validation") for i in mix.members]
            for coefficient, split in itertools.product(way.coefficients(grid), splits):
                keys += court.merge_keys(mix, way, coefficient, split).values()
            trials.append(self._question("trial", (mix, way, grid), keys))
        self._workers.map(self._setup, trials, self._keep)

    def _question(self, method: str, arguments: tuple[Any, ...], keys: Collection[str]) -> _Question:
        known = self._court.found(keys)
        return _Question(method, arguments, known, answered=len(known) == len(keys))

    def _keep(self, question: _Question, answer: Answer) -> None:
        scores, error, dtypes = answer
        for key, each in scores.items():
            self._court.keep(key, each)
        if error is not None:
            mix, way, _ = question.arguments
            self._court.refused[mix, way.name] = error
        for task, dtype in zip(self._court.tasks, dtypes, strict=True):
            task.dtype = dtype or task.dtype


@dataclass(frozen=True)
class _Setup:
    """A court in a worker, which keeps nothing from one question to the next but its models."""

    adapters: tuple[Adapter, ...]
    tasks: tuple[Sent, ...]
    examples: Mapping[str, tuple[Examples, ...]]
    """Fingerprint of a task's record → its examples."""
    split: str
    base: Base | None
    device: str
    fingerprint: str

    def __call__(self) -> Callable[[Callable[[Court], Any]], Any]:
        built = {fingerprint(sent.record): sent.task() for sent in self.tasks}
        for key, splits in self.examples.items():
            for examples in splits:
                examples.of_task(built[key])
        tasks = [built[fingerprint(sent.record)] for sent in self.tasks]
        sources = Sources(self.adapters, base=self.base, tasks=tasks, device=torch.device(self.device))
        court = Court(sources, self.split, base=self.base)
        return lambda question: question(court)


@dataclass(frozen=True)
class _Question:
    """A method of the court, what it is called with, and what is known already of all that it needs."""

    method: str
    arguments: tuple[Any, ...]
    known: Mapping[str, Scores]
    answered: bool

    def __call__(self, court: Court) -> Answer:
        court.known = dict(self.known)
        error = None
        try:
            getattr(court, self.method)(*self.arguments)
        except CANNOT as found:
            if self.method != "trial":
                raise
            error = found
        new = {key: scores for key, scores in court.known.items() if key not in self.known}
        return new, error, [task.dtype for task in court.tasks]
