"""Every merge on every adapter's own task: what survives, against the adapters alone.

Adapters of several tasks are merged task by task, a set for each training method and seed; adapters of one task are
seeds, merged in several ratios. The coefficient of every merge is chosen on the validation splits, one for all tasks
of a set, and what it does is reported on the test splits, beside the merge as it is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, identity, labels_of
from lora_lab.adapters.initial import shared_start
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.analysis.court import CANNOT, Clerks, Court, Judged, Mix, Way, correct, loss, share
from lora_lab.analysis.game import Cost
from lora_lab.analysis.question import Question
from lora_lab.errors import MismatchError, OptionError, some
from lora_lab.merging.methods import MERGES, check
from lora_lab.merging.sources import Sources
from lora_lab.options import option
from lora_lab.results.result import Journal, Result, columns, fingerprint, finite, grouped, provenance
from lora_lab.results.stats import ADDED, Floats, Sampled, around, interval, mean_and_spread, proportion
from lora_lab.scoring.examples import examples_of
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.workers import Workers
from lora_lab.tasks.task import Scores, Task, resolve_device

COEFFICIENTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
RATIOS = ((0.0, 1.0), (1.0, 2.0), (1.0, 1.0), (1.0, 1.0, 1.0))
ALONE, ENSEMBLE = "alone", "ensemble of logits"

Row = dict[str, Any]


@dataclass(frozen=True)
class CompareMerges(Question):
    """Accuracy of every merge on the tasks of its adapters, each with its own head; see the module's first lines.

    Every number on the `split` has a 95 % interval over examples (bootstraps with `seed`; Wilson's for one task's
    accuracy); normalised is divided by the adapter's own accuracy alone. The summary has the validation curves over the
    coefficients. A method that cannot merge a set is left out, and the summary says why.
    """

    kind = "compare-merges"

    methods: tuple[str, ...] = option(("all",), "Names of merges, NAME:RULE for an inner rule, or all.")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of the merges, by their names."""
    coefficients: tuple[float, ...] = option(
        COEFFICIENTS, "Factors of the merged ΔW to choose from on the validation splits.", title="coefficient"
    )
    ratios: tuple[tuple[float, ...], ...] = option(RATIOS, "For seeds of one task: weights of the mixtures.")
    base_name: str | None = option(None, "Folder or hub id of the base model, for DoRA, HiRA and others.", flag="base")
    split: str = option("test", "Which examples are scored: validation or test.")
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    @property
    def record(self) -> dict[str, Any]:
        """The fields in JSON types; ratios in words, such as 1:2."""
        return {**super().record, "ratios": [_ratio(ratio) for ratio in self.ratios]}

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these methods and options, before anything is computed."""
        if len(adapters) < 2:
            raise OptionError("a merge needs two adapters or more")
        ways_of(self.methods, self.options)

    def check_sets(self, adapters: Sequence[Adapter], tasks: Sequence[Task]) -> None:
        """Raise what `run` would raise for adapters of these tasks, one a task each."""
        self.check(adapters)
        mixes_of(adapters, tasks, self.ratios)

    def run_id(self, adapters: Sequence[Adapter], tasks: Sequence[Task]) -> str:  # type: ignore[override]
        """What the answer hangs on, hashed: the adapters, the examples of every task, and the question."""
        record = self.record
        del record["split"]
        return run_id(adapters, tasks, split=self.split, **record)

    def run(  # type: ignore[override]
        self,
        adapters: Sequence[Adapter],
        tasks: Sequence[Task],
        on: Execution = Execution(),
        *,
        base: Callable[[], torch.nn.Module] | None = None,
    ) -> Result:
        """Every merge of every set; `tasks`, one an adapter, and `base`, for adapters whose ΔW hangs on its weights."""
        run = self.run_id(adapters, tasks)
        return compare(
            adapters,
            tasks,
            methods=self.methods,
            options=self.options,
            coefficients=self.coefficients,
            ratios=self.ratios,
            split=self.split,
            seed=self.seed,
            base=base,
            base_name=self.base_name,
            device=on.device,
            journal=on.cache / f"{run}.jsonl" if on.cache else None,
            progress=on.progress,
            confirm=on.confirm,
            workers=on.workers,
        )


def compare(
    adapters: Sequence[Adapter],
    tasks: Sequence[Task],
    *,
    methods: Sequence[str] = ("all",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    ratios: Sequence[Sequence[float]] = RATIOS,
    split: str = "test",
    seed: int = 0,
    base: Callable[[], torch.nn.Module] | None = None,
    base_name: str | None = None,
    device: torch.device | None = None,
    journal: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    confirm: Callable[[Cost], None] | None = None,
    workers: Workers | None = None,
) -> Result:
    """Accuracy of every merge on the tasks of its adapters, each with its own head; see the module's first lines.

    `methods` are names of MERGES, NAME:RULE for an inner rule, or all; `options` are theirs by name. Every number on
    the `split` has a 95 % interval over examples (bootstraps with `seed`; Wilson's for one task's accuracy); normalised
    is divided by the adapter's own accuracy alone. The summary has the validation curves over the coefficients. A
    method that cannot merge a set is left out, and the summary says why. `base_name` tells runs with different `base`
    apart. With `journal`, a killed run goes on where it was.
    """
    asked = ways_of(methods, options or {})
    ways, stands_for = joined(asked)
    mixes = mixes_of(adapters, tasks, ratios)
    ways = _tried(ways, mixes, stands_for)
    grid = list(dict.fromkeys([*coefficients, 1.0]))
    began = time.perf_counter()
    settings = {"options": _plain(options), "coefficients": list(coefficients), "seed": seed}
    settings |= {"ratios": [_ratio(ratio) for ratio in ratios], "base_name": base_name}
    run = run_id(adapters, tasks, split=split, methods=[way.name for way in asked], **settings)
    device = device or (torch.device(workers.device) if workers else resolve_device())
    everyone = Sources(adapters, base=base, tasks=tasks, device=device)
    log = Journal(journal, fingerprint([run, device.type])) if journal else None
    court = Court(everyone, split, base=base, journal=log, progress=progress)
    court.total = sum(court.passes(mix, ways, grid) for mix in mixes)
    clerks = Clerks(court, workers, run) if workers else None
    if confirm:
        cost = court.cost(mixes, ways, clerks.seconds() if clerks else court.seconds())
        confirm(cost if workers is None else replace(cost, seconds=cost.seconds / workers.size))
    if clerks:
        clerks.prepare(mixes, ways, grid)
    names = labels_of(adapters)
    rows: list[Row] = []
    sets: list[Row] = []
    curves: list[Row] = []
    skipped: list[Row] = []
    for mix in mixes:
        alone = court.alone(mix, split)
        for name, scores in _references(mix, alone, court):
            cells, whole = _measured(mix, name, scores, alone, names, tasks, seed)
            rows += [{**row, "coefficient": None, "chosen": True} for row in cells]
            sets.append({**whole, "coefficient": None, "chosen": True, "at_edge": None})
        for way in ways if len(mix.members) > 1 else ():
            try:
                trial = court.trial(mix, way, grid)
                curves.append({**_head(mix, way.name), **trial.curve})
                for coefficient, scores in trial.tested.items():
                    cells, whole = _measured(mix, way.name, scores, alone, names, tasks, seed)
                    chosen = coefficient == trial.best
                    rows += [{**r, "coefficient": coefficient, "chosen": chosen} for r in cells]
                    tried = trial.curve["coefficient"]
                    at_edge = len(tried) > 1 and trial.best in (min(tried), max(tried))
                    sets.append({**whole, "coefficient": coefficient, "chosen": chosen, "at_edge": at_edge})
            except CANNOT as error:
                skipped.append({"set": mix.label, "merge": way.name, "why": str(error)})
    if len(skipped) == sum(len(mix.members) > 1 for mix in mixes) * len(ways):
        raise OptionError(f"no method can merge these: {skipped[0]['why']}")
    return Result(
        "compare-merges",
        finite(columns(rows)),
        {
            "tasks": [task.record for task in {fingerprint(task.record): task for task in tasks}.values()],
            "task_names": list(dict.fromkeys(task.name for task in tasks)),
            "one_task": mixes[0].ratio is not None,
            "split": split,
            "merges": [way.name for way in ways],
            "stands_for": stands_for,
            **settings,
            "adapters": [{**described(a), "name": n} for a, n in zip(adapters, names, strict=True)],
        },
        finite(
            {
                "sets": sets,
                "by_method": _by_method(sets),
                "curves": curves,
                "skipped": skipped,
                "shared_initial_A": [
                    {"set": mix.label, "method": mix.method, **shared_start([adapters[i] for i in mix.members])}
                    for mix in mixes
                    if len(mix.members) > 1
                ],
            }
        ),
        provenance(
            inputs=[Path(a.source) for a in adapters],
            elapsed_s=time.perf_counter() - began,
            examples=len(tasks[0].split(split)),
            evaluations=court.evaluated,
            run=run,
            device=str(device),
            dtype=tasks[0].dtype,
            workers=workers.size if workers else None,
        ),
    )


def _references(mix: Mix, alone: Judged, court: Court) -> Iterator[tuple[str, Judged]]:
    """The adapters alone (of seeds: once, not in every ratio), and where there are several, their ensemble."""
    if mix.ratio is None or len(mix.members) == 1:
        yield ALONE, alone
    if len(mix.members) > 1:
        yield ENSEMBLE, court.ensemble(mix, court.split)


def run_id(adapters: Sequence[Adapter], tasks: Sequence[Task], *, split: str, **settings: Any) -> str:
    """What a run's result hangs on: the adapters, the examples, and the options."""
    if "all" in settings["methods"]:
        settings["methods"] = [way.name for way in ways_of(settings["methods"], settings["options"])]
    settings["ratios"] = [ratio if isinstance(ratio, str) else _ratio(ratio) for ratio in settings["ratios"]]
    different = {fingerprint(task.record): task for task in tasks}
    examples = [examples_of(task, each) for task in different.values() for each in ("validation", split)]
    return fingerprint(
        ["compare-merges", [identity(a) for a in adapters], [t.record for t in tasks], examples, settings]
    )


def ways_of(methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Way]:
    """The merges that names stand for, their options checked."""
    names = list(dict.fromkeys(name for given in methods for name in (MERGES if given == "all" else [given])))
    for name in options:
        if name not in names:
            raise OptionError(f"options are given for {name}, which is not among the methods compared: {some(names)}")
    ways = []
    for name in names:
        method, colon, inner = name.partition(":")
        chosen = {**({"inner": inner} if colon else {}), **options.get(name, {})}
        ways.append(Way(name, method, check(method, chosen)))
    return ways


def joined(ways: Sequence[Way]) -> tuple[list[Way], dict[str, list[str]]]:
    """The ways without those that are others by another name, and name → the names that it stands for.

    Methods with a divisor d are points of one line, c Σ wᵢΔWᵢ / d: average at c is task arithmetic at c / Σ wᵢ.
    The first of them that is compared stays. One with options of its own stays, too.
    """
    same = [way for way in ways if MERGES[way.method].divisor and not way.options]
    return [way for way in ways if way not in same[1:]], {same[0].name: [w.name for w in same[1:]]} if same[1:] else {}


def _tried(ways: Sequence[Way], mixes: Sequence[Mix], stands_for: Mapping[str, Sequence[str]]) -> list[Way]:
    """The ways, with the places on its line beside the grid at which those that one stands for are at 1."""
    completed = []
    for way in ways:
        pairs = [(MERGES[way.method].divisor, MERGES[name].divisor) for name in stands_for.get(way.name, ())]
        extra = {ours(m.weights) / theirs(m.weights) for ours, theirs in pairs if ours and theirs for m in mixes}
        extra = {c for c in extra if not math.isclose(c, 1.0)}
        completed.append(replace(way, also=tuple(sorted(extra))))
    return completed


def mixes_of(adapters: Sequence[Adapter], tasks: Sequence[Task], ratios: Sequence[Sequence[float]]) -> list[Mix]:
    """Which adapters are merged together.

    Several tasks: those of one training method and seed, each of another task. One task: the seeds of each training
    method, in every combination of every ratio.
    """
    if len(adapters) < 2:
        raise OptionError("a merge needs two adapters or more")
    who = [
        (a.record.get("method"), a.record.get("seed"), fingerprint(t.record))
        for a, t in zip(adapters, tasks, strict=True)
    ]
    if len({task for _, _, task in who}) == 1:
        return _checked(adapters, _seed_mixes(adapters, ratios))
    groups: dict[Any, list[int]] = {}
    for index, (method, seed, _) in enumerate(who):
        groups.setdefault((method, seed), []).append(index)
    if any(len(members) == 1 for members in groups.values()) and len({task for *_, task in who}) == len(who):
        groups = {(_common(m for m, _, _ in who), _common(s for _, s, _ in who)): list(range(len(who)))}
    mixes = []
    for (known, seed), members in groups.items():
        label = f"{known or 'adapters'}" + (f", seed {seed}" if seed is not None else "")
        method = label if known is None and len(groups) > 1 else known  # sets of unknown methods are no group
        own = [who[i][2] for i in members]
        if len(members) < 2 or len(set(own)) < len(own):
            raise MismatchError(
                f"it cannot be told which adapters belong together: of {label} there are "
                f"{some(adapters[i].source for i in members)}; a set is one adapter a task, of one method and seed"
            )
        mixes.append(Mix(label, method, seed, tuple(members), (1.0,) * len(members)))
    return _checked(adapters, mixes)


def _checked(adapters: Sequence[Adapter], mixes: list[Mix]) -> list[Mix]:
    for mix in mixes:
        require_shared_modules([adapters[i] for i in mix.members])
    return mixes


def _seed_mixes(adapters: Sequence[Adapter], ratios: Sequence[Sequence[float]]) -> list[Mix]:
    groups: dict[Any, list[int]] = {}
    for index, adapter in enumerate(adapters):
        groups.setdefault(adapter.record.get("method"), []).append(index)
    mixes = []
    names = labels_of(adapters)
    for known, members in groups.items():
        for ratio in ratios:
            if math.fsum(ratio) <= 0 or min(ratio) < 0:
                raise OptionError(f"ratio {_ratio(ratio)}: weights of 0 or more are needed, not all of them 0")
            shares = [weight / math.fsum(ratio) for weight in ratio if weight]
            for chosen in itertools.combinations(members, len(shares)):
                method = known or " + ".join(names[i] for i in chosen)  # seeds of unknown methods are no group
                label = f"{known or 'adapters'} {_ratio(ratio)} of {', '.join(str(i) for i in chosen)}"
                mixes.append(Mix(label, method, None, chosen, tuple(shares), _ratio(ratio)))
    if not any(len(mix.members) > 1 for mix in mixes):
        raise OptionError("no two adapters of one training method and task are among these: nothing to merge")
    return mixes


def _head(mix: Mix, merge: str) -> Row:
    return {"set": mix.label, "method": mix.method, "seed": mix.seed, "ratio": mix.ratio, "merge": merge}


def _measured(
    mix: Mix,
    name: str,
    scores: Judged,
    alone: Judged,
    names: Sequence[str],
    tasks: Sequence[Task],
    seed: int,
) -> tuple[list[Row], Row]:
    """A row for each task, and the row of the mean over them.

    A task's accuracy has the interval of `proportion`; its share of the adapter's own, and the means over tasks, a
    bootstrap one. Of the examples added to outcomes (see `Sampled.of`), each of the tasks of a mean gets its part.
    """
    head = _head(mix, name)
    rows: list[Row] = []
    means: dict[str, list[tuple[Floats, Floats]]] = {"accuracy": [], "normalised": []}
    pairs = list(zip(mix.members, alone, scores, strict=False))
    for index, own, scored in pairs:
        accuracy = proportion(_outcomes(scored))
        shares = [share(*part) for part in _both(scored, own, ADDED, seed)]
        row: Row = {**head, "task": tasks[index].name, "adapter": names[index], "loss": loss(scored)}
        row |= dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy, strict=True))
        rows.append(row | _cells("normalised", *shares))
        of_task, samples = _both(scored, own, ADDED / len(pairs), seed)
        means["accuracy"].append((of_task[0], samples[0]))
        means["normalised"].append((share(*of_task), share(*samples)))
    whole: Row = {**head, "loss": float(np.mean([row["loss"] for row in rows]))}
    for key, parts in means.items():
        whole |= _cells(key, *(np.mean([part[k] for part in parts], axis=0) for k in (0, 1)))
    return rows, whole


def _both(scored: Sequence[Scores], own: Sequence[Scores], added: float, seed: int) -> tuple[Floats, Floats]:
    """Means, [2, 1], and resampled means, [2, resamples], of the correctness of a merge and of the adapter alone."""
    same = all(a is b for a, b in zip(scored, own, strict=True)) if len(scored) == len(own) else False
    values = [_outcomes(scored)] if same else [_outcomes(scored), _outcomes(own)]
    right_or_wrong = all(scores.correct.dtype == np.bool_ for scores in (*scored, *own))
    sampled = Sampled.of(np.stack(values), seed=seed, added=added if right_or_wrong else 0.0)
    both = sampled[[0, 0] if same else [0, 1]]
    return both.means, both.samples


def _outcomes(scores: Sequence[Scores]) -> npt.NDArray[np.bool_] | Floats:
    """Correctness of each example: of one model as it is scored, of several a mean over them."""
    return scores[0].correct if len(scores) == 1 else correct(scores)


def _cells(key: str, mean: Floats, samples: Floats) -> Row:
    low, high = around(float(mean[0]), interval(samples[np.isfinite(samples)]))
    return {key: float(mean[0]), f"{key}_low": low, f"{key}_high": high}


def _by_method(sets: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation over the sets of each training method: at the chosen coefficient, and at 1."""
    found = []
    for head, members in grouped(sets, "method", "ratio", "merge"):
        chosen = [row for row in members if row["chosen"]]
        plain = [row for row in members if row["coefficient"] in (None, 1.0)]
        row = {**head, "sets": len(chosen), "at_edge": sum(bool(r["at_edge"]) for r in chosen)}
        values = [r["coefficient"] for r in chosen]
        row["coefficient"] = None if None in values else float(np.mean(values))
        for key in ("accuracy", "normalised", "loss"):
            row[key], row[f"{key}_spread"] = mean_and_spread(np.array([r[key] for r in chosen]))
            row[f"plain_{key}"], row[f"plain_{key}_spread"] = mean_and_spread(np.array([r[key] for r in plain]))
        found.append(row)
    return found


def _ratio(weights: Sequence[float]) -> str:
    return ":".join(f"{weight:g}" for weight in weights)


def _common(values: Any) -> Any:
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _plain(options: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    return {name: dict(own) for name, own in (options or {}).items()}
