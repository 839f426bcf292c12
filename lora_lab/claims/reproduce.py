"""One run that puts claims to a testbed: it trains, asks, and judges by the rule of verdicts.py.

All that it makes lies in one folder: `runs/` with the adapters, `results/` with the answer to every question, and the
journals of scores. What is there already is kept, so that a run that was killed goes on, and one with more seeds or
more claims computes what is new alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lab.claims.asking import Answer, Asking, answer, ask_all
from lora_lab.claims.claims import OWN, PUBLISHED, Claim, Testbed, chosen, read
from lora_lab.claims.statistics import STATISTICS, main_metric
from lora_lab.claims.verdicts import Difference, PValues, Values, difference, p_values, verdicts
from lora_lab.errors import LoraLabError, OptionError, unknown
from lora_lab.options import check_options, option
from lora_lab.results.result import Result, columns, fingerprint, finite, provenance
from lora_lab.scoring.execution import Execution, Progress
from lora_lab.scoring.sharing.workers import open_workers

if TYPE_CHECKING:
    from lora_lab.scoring.sharing.workers import Workers
    from lora_lab.tasks.task import Task
    from lora_lab.training.recipe import Recipe
    from lora_lab.training.runs import Job

Stage = Callable[[str], contextlib.AbstractContextManager[Progress]]
"""Called with what is done next; within it, progress is reported."""


@dataclass(frozen=True)
class Reproduce:
    """Which claims are put to which testbed, and with how many seeds; `run` answers."""

    kind: ClassVar[str] = "reproduce"

    claims: tuple[str, ...] = option((), "Names of claims; by default all that the testbed is for.", flag="")
    testbed: str = option(
        "digits",
        "The base and its tasks that they are put to: digits, text, fashion, fashion-clip, or one of the file's.",
    )
    seeds: int = option(5, "Trainings of each kind, seeds 0, 1, …; the intervals are over them.", least=2)
    file: Path | None = option(
        None, "TOML file with claims and testbeds; by default those that come along.", flag="claims"
    )

    def __post_init__(self) -> None:
        check_options(self)

    def plan(self) -> Plan:
        """What has to be trained and asked; errors for names that are not there, before anything is computed."""
        claims, beds = read(self.file or OWN)
        if self.testbed not in beds:
            raise unknown("testbed", self.testbed, beds)
        bed = beds[self.testbed]
        return Plan(bed, tuple(chosen(claims, self.claims, bed.name)), tuple(range(self.seeds)))

    def run(
        self,
        folder: Path,
        on: Execution = Execution(),
        *,
        processes: int | None = None,
        stage: Stage | None = None,
    ) -> Result:
        """A row for every claim on every task; `processes` train, and answer questions, side by side."""
        began, plan = time.perf_counter(), self.plan()
        lab = _Lab(folder, plan, replace(on, cache=folder / ".outcomes"), stage or _silent)
        with open_workers(processes or os.cpu_count() or 1, device=lab.device, threads=1) as workers:
            lab.train(workers)
            lab.ask(workers)
        judged = [lab.judge(claim, tasks) for claim in plan.claims for tasks in plan.tasks_of(claim)]
        found = verdicts([each.tests for each in judged])
        rows = [
            {**each.row, "p_holds": holds, "p_fails": fails, "verdict": verdict}
            for each, (verdict, holds, fails) in zip(judged, found, strict=True)
        ]
        counts = {
            name: sum(row["verdict"] == name for row in rows) for name in dict.fromkeys(r["verdict"] for r in rows)
        }
        told = {"testbed": plan.bed.name, "about": plan.bed.about, "tasks": plan.bed.tasks, "merged": plan.bed.merged}
        return Result(
            self.kind,
            finite(columns(rows)),
            finite({**told, "seeds": self.seeds, "recipe": plan.bed.recipe}),
            {"verdicts": counts},
            provenance(inputs=[self.file or OWN], elapsed_s=time.perf_counter() - began),
        )


@dataclass(frozen=True)
class Plan:
    """What a run needs."""

    bed: Testbed
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]

    def tasks_of(self, claim: Claim) -> list[tuple[str, ...]]:
        """The tasks that a claim is judged on: each of the testbed's by itself, or all those that are merged."""
        if not STATISTICS[claim.statistic].several:
            return [(task,) for task in self.bed.tasks]
        return [self.bed.merged] if self.bed.merged else []

    def trainings(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(task, fields of the recipe), each once."""
        seen = set()
        for claim in self.claims:
            for task, fields in itertools.product(itertools.chain(*self.tasks_of(claim)), claim.trainings):
                found = self.recipe(claim, task, fields)
                key = fingerprint([task, found])
                if key not in seen:
                    seen.add(key)
                    yield task, found

    def recipe(self, claim: Claim, task: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the recipe of a training, without its seed.

        Adapters that are merged with those of other tasks get an initial A of their own, as those of strangers have,
        unless the claim is about a shared one: then the seed draws it, for every task the same.
        """
        strangers = STATISTICS[claim.statistic].several and not claim.shared_a
        own = {"init_seed": 1000 * (1 + self.bed.merged.index(task))} if strangers else {}
        return {**self.bed.recipe, **fields, **own}


@contextlib.contextmanager
def _silent(_: str) -> Iterator[Progress]:
    yield lambda done, total: None


@dataclass(frozen=True)
class _Judged:
    """A claim on a task, before the p-values of all are corrected."""

    row: Mapping[str, Any]
    tests: PValues
    """1 and 1 where there is no number, which cannot be told."""


@dataclass
class _Lab:
    """The folder of a run, and what was computed in it so far."""

    folder: Path
    plan: Plan
    on: Execution
    stage: Stage
    _tasks: dict[str, Task] = field(default_factory=dict)
    _answers: dict[Path, Answer] = field(default_factory=dict)
    _why: dict[Path, str] = field(default_factory=dict)
    """Why a question that was asked has no answer."""
    _logs: dict[Path, Result] = field(default_factory=dict)

    @property
    def device(self) -> str | None:
        """The name of the device, where one is asked for."""
        return None if self.on.device is None else str(self.on.device)

    def task(self, name: str) -> Task:
        """The task, built once."""
        from lora_lab import tasks

        if name not in self._tasks:
            self._tasks[name] = tasks.from_name(name)
        return self._tasks[name]

    def jobs(self, task: str, recipe: Mapping[str, Any]) -> list[Job]:
        """The training of every seed."""
        from lora_lab.training.runs import Job

        where = self.folder / "runs" / _slug(task)
        made = [(seed, _recipe(recipe, seed)) for seed in self.plan.seeds]
        spec = self.task(task).spec
        return [
            Job(spec, each, where / f"{_named(recipe)}-s{seed}.safetensors", self.device, may_diverge=True)
            for seed, each in made
        ]

    def train(self, workers: Workers | None) -> None:
        """Everything that is not there yet, by the workers, or here without any."""
        from lora_lab.errors import LoraLabNote
        from lora_lab.training.runs import train_all

        jobs = [job for task, recipe in self.plan.trainings() for job in self.jobs(task, recipe)]
        with self.stage(f"training {len(jobs)} adapters") as report, warnings.catch_warnings():
            warnings.simplefilter("ignore", LoraLabNote)  # that one is there already
            logs = train_all(jobs, processes=None if workers else 1, workers=workers, progress=report)
        self._logs = {job.path: log for job, log in zip(jobs, logs, strict=True)}

    def ask(self, workers: Workers | None) -> None:
        """Every question that has no answer yet, by the workers, those about several tasks first: they take longest.

        Without workers, nothing: each is asked when its answer is needed.
        """
        if workers is None:
            return
        claims = sorted(self.plan.claims, key=lambda claim: not STATISTICS[claim.statistic].several)
        wanted = {
            asking.path: asking
            for claim in claims
            for tasks in self.plan.tasks_of(claim)
            for ways in claim.asked
            if (asking := self.asking(claim, ways, tasks)) and not asking.path.exists() and not asking.lost
        }
        if wanted:
            with self.stage(f"{len(wanted)} questions, in hundredths") as report:
                self._why = ask_all(list(wanted.values()), workers, replace(self.on, progress=report))

    def judge(self, claim: Claim, tasks: tuple[str, ...]) -> _Judged:
        """The difference that a claim is about, and its p-values; why there is none, where that is so."""
        statistic = STATISTICS[claim.statistic]
        found, why, unit = None, None, statistic.unit
        try:
            answers = [self.answer(claim, ways, tasks) for ways in claim.asked]
            values: list[Values] = [statistic.of(each, claim.where) for each in answers]
            if statistic.of_control:
                values.append(statistic.of_control(answers[0], claim.where))
            found = difference(values[0], values[1] if claim.control is not None else None, claim.against)
            unit = main_metric(answers[0].result) if unit == "metric" else unit
        except LoraLabError as error:
            why = str(error)
        if found is None and why is None:
            why = "the question has no such number of these adapters"
        tested = PValues(1.0, 1.0) if found is None else p_values(found, claim.direction, claim.least)
        return _Judged({**_described(claim, tasks), "unit": unit, **_numbers(found), "why": why}, tested)

    def trained(self, claim: Claim, ways: Sequence[Mapping[str, Any]], tasks: tuple[str, ...]) -> list[Job]:
        """The trainings of these ways, of every task and seed."""
        return [job for way in ways for task in tasks for job in self.jobs(task, self.plan.recipe(claim, task, way))]

    def asking(self, claim: Claim, ways: Sequence[Mapping[str, Any]], tasks: tuple[str, ...]) -> Asking | None:
        """What the claim asks of the adapters of these ways of training; None where their trainings' logs tell it."""
        verb, jobs = STATISTICS[claim.statistic].verb, self.trained(claim, ways, tasks)
        if verb is None:
            return None
        named = "-and-".join(_named(self.plan.recipe(claim, tasks[0], way)) for way in ways)
        name = "-".join([verb, *map(_slug, tasks[:1]), named])
        path = self.folder / "results" / f"{name}-{fingerprint([claim.options, tasks, len(jobs)])[:8]}.json"
        about = f"{verb} of {len(jobs)} adapters, {named}"
        return Asking(path, verb, claim.options, [job.path for job in jobs], [job.task for job in jobs], about)

    def answer(self, claim: Claim, ways: Sequence[Mapping[str, Any]], tasks: tuple[str, ...]) -> Answer:
        """The answer to the claim's question about the adapters of these ways of training, computed once."""
        asking = self.asking(claim, ways, tasks)
        if asking is None:
            jobs = self.trained(claim, ways, tasks)
            return Answer(_joined([self._logs[job.path] for job in jobs], jobs))
        if asking.path in self._why:
            raise LoraLabError(self._why[asking.path])
        if asking.path not in self._answers:
            if asking.lost:
                where = f"{asking.lost} of {len(asking.adapters)} trainings diverged ({asking.adapters[0].parent.name})"
                raise OptionError(f"{where}: no number of them")
            with self.stage(asking.about) as report:
                each = [self.task(task) for _ in ways for task in tasks for _ in self.plan.seeds]
                self._answers[asking.path] = answer(asking, each, replace(self.on, progress=report))
        return self._answers[asking.path]


def _recipe(fields: Mapping[str, Any], seed: int) -> Recipe:
    """The recipe of a seed; where an initial A of its own is asked for, every seed has another."""
    from lora_lab.training.recipe import Recipe

    given = dict(fields)
    if "init_seed" in given:
        given["init_seed"] += seed
    try:
        return Recipe(**given, seed=seed)
    except TypeError as error:
        known = [each.name for each in dataclasses.fields(Recipe)]
        raise unknown("field of a recipe", next(name for name in given if name not in known), known) from error


def _joined(logs: Sequence[Result], jobs: Sequence[Job]) -> Result:
    """What the logs of trainings say at their ends, a row each."""
    rows = [{"seed": job.recipe.seed, **log.summary} for log, job in zip(logs, jobs, strict=True)]
    return Result("trainings", columns([{"seed": row["seed"], "cpu_s": row.get("cpu_s")} for row in rows]))


_WORDS = ("method", "peft")
"""Fields of a recipe whose values are words that name it."""


def _named(fields: Mapping[str, Any]) -> str:
    """A way of training as the name of a file: method and tuner in words, all else as a hash."""
    words = [str(fields[name]) for name in _WORDS if name in fields]
    rest = {name: value for name, value in fields.items() if name not in _WORDS}
    return "-".join([*words, *([fingerprint(rest)[:6]] if rest else [])])


def _slug(name: str) -> str:
    """The name of a task as a name of a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name.removesuffix(".toml")).strip("-")


def _described(claim: Claim, tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "claim": claim.name,
        "says": claim.says,
        "source": claim.source,
        "published": "; ".join(map(str, claim.published)),
        **(claim.published[0].cells if claim.published else dict.fromkeys(PUBLISHED)),
        "task": ", ".join(tasks),
        "statistic": claim.statistic,
        "where": dict(claim.where),
        "direction": claim.direction,
        "least": claim.least,
        "treated": dict(claim.treated),
        "control": None if claim.control is None else dict(claim.control),
    }


def _numbers(found: Difference | None) -> dict[str, Any]:
    """What was measured; of nothing, nulls."""
    if found is None:
        none = dict.fromkeys(("of_treated", "of_control", "difference", "difference_low", "difference_high"))
        return {**none, "seeds": 0, "units": 0, "paired": None}
    low, high = found.interval
    return {
        "of_treated": found.treated,
        "of_control": found.control,
        "difference": found.value,
        "difference_low": low,
        "difference_high": high,
        "seeds": found.seeds,
        "units": found.units,
        "paired": found.paired,
    }
