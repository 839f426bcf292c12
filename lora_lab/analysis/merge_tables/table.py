"""Every merge on every adapter's own task: what survives, against the adapters alone.

Adapters of several tasks are merged task by task, a set for each training method and seed; adapters of one task are
seeds, merged in several ratios. The coefficient of every merge is chosen on the validation splits, one for all tasks
of a set, and what it does is reported on the test splits, beside the merge as it is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of
from lora_lab.adapters.initial import shared_start
from lora_lab.analysis.measured import told
from lora_lab.analysis.merge_tables.coefficients import (
    CANNOT,
    Alone,
    CoefficientSearch,
    Draw,
    SetScores,
    Trial,
    alone,
    bases,
    ensembles,
    judges,
    kept_of,
)
from lora_lab.analysis.merge_tables.question import CompareMerges as CompareMerges
from lora_lab.analysis.merge_tables.rows import by_example, by_method, by_task, measured, signed
from lora_lab.analysis.merge_tables.sets import (
    MergeSet,
    MergeSpec,
    joined,
    merge_sets_of,
    reference_of,
    specs_of,
    tried,
)
from lora_lab.analysis.merge_tables.verdicts import Group, NullScores, Outcomes, null_rows
from lora_lab.errors import LoraLabError, OptionError
from lora_lab.geometry.nulls import NULLS
from lora_lab.merging.budgets import EXACT, check_rank
from lora_lab.merging.methods import MERGES
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.results.result import Result, columns, fingerprint, finite
from lora_lab.results.stats import INTERVALS, Floats
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import examples_of
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.tasks import digests
from lora_lab.tasks.scores.judging import Judge
from lora_lab.tasks.task import Task

BASE, ALONE, ENSEMBLE = "base", "alone", "ensemble of logits"
"""What merges are compared with: no adapter, each task's own, and all of them at once."""

Row = dict[str, Any]


def answer(
    question: CompareMerges,
    adapters: Sequence[Adapter],
    tasks: Sequence[Task],
    on: Execution,
    base: Callable[[], torch.nn.Module] | None,
) -> Result:
    """Every merge of every set; `tasks`, one an adapter, and `base`, for adapters whose ΔW hangs on its weights."""
    began = time.perf_counter()
    specs, stands_for = joined(specs_of(question.methods, question.options, question.ranks))
    merge_sets = merge_sets_of(adapters, tasks, question.ratios)
    specs, reference = tried(specs, merge_sets, stands_for), reference_of(question.against, specs, stands_for)
    evaluator = Evaluator(
        adapters,
        tasks,
        on,
        split=question.split,
        examples=question.examples,
        more_splits=["validation"],
        build=functools.partial(MergeModels.of, base),
        context=_data(question, tasks),
    )
    for rank in question.ranks:
        check_rank(evaluator.models.sources, None if rank == EXACT else rank)
    searches = _searches(question, evaluator, merge_sets, specs)
    table = _Table(evaluator, question, reference)
    for merge_set, of_set in zip(merge_sets, searches, strict=True):
        table.add(merge_set, of_set)
    table.tell(on)
    if not table.merged:
        raise OptionError(f"no method can merge these: {table.skipped[0]['why']}")
    parameters = {
        "tasks": [task.record for task in {fingerprint(task.spec): task for task in tasks}.values()],
        "task_names": list(dict.fromkeys(task.name for task in tasks)),
        "one_task": merge_sets[0].ratio is not None,
        "merges": [spec.name for spec in specs],
        "stands_for": stands_for,
        "reference": reference,
        "metrics": table.told,
        **{name: value for name, value in question.record.items() if name != "methods"},
        "adapters": [{**described(a), "name": name} for a, name in zip(adapters, table.names, strict=True)],
    }
    made = evaluator.provenance(
        adapters, began=began, run=question.run_id(adapters, tasks), evaluations=evaluator.evaluated
    )
    return Result(question.kind, finite(columns(table.rows)), parameters, finite(table.summary), made)


def run_id(question: CompareMerges, adapters: Sequence[Adapter], tasks: Sequence[Task]) -> str:
    """What the answer hangs on, hashed: the adapters, the examples of every task, and the question."""
    methods = [spec.name for spec in specs_of(question.methods, question.options, question.ranks)]
    records = [task.record for task in tasks]
    asked = {**question.fields, "methods": methods}
    return fingerprint(
        [
            question.kind,
            INTERVALS,
            [a.identity for a in adapters],
            records,
            _data(question, tasks),
            asked,
            [digests.of_entries(), digests.of_transforms()],
        ]
    )


def _searches(
    question: CompareMerges, evaluator: Evaluator, merge_sets: Sequence[MergeSet], specs: Sequence[MergeSpec]
) -> list[list[tuple[CoefficientSearch, LoraLabError | None]]]:
    """The merges of every set, and why a worker could not make them; what they are compared with is scored here."""
    several = [merge_set for merge_set in merge_sets if len(merge_set.members) > 1]
    grid, draws = [*question.coefficients, 1.0], [None, *_draws(question)]
    searches = [
        CoefficientSearch(merge_set, spec, spec.coefficients(grid), draw, question.metric, question.quick_nulls)
        for merge_set in several
        for spec in specs
        for draw in draws
    ]
    members = [Alone(i) for i in sorted({i for merge_set in merge_sets for i in merge_set.members})]
    references: list[Change] = [change for each in merge_sets if _by_itself(each) for change in bases(evaluator, each)]
    together = [ensembles(evaluator, each) for each in several]
    evaluator.total = 2 * len(members) + len({change.key for change in itertools.chain(references, *together)})
    evaluator.total += sum(search.evaluations(evaluator) for search in searches)
    if evaluator.on.confirm:
        evaluator.on.confirm(_cost(evaluator, searches))
    evaluator.scores(members, "validation")
    evaluator.scores([*members, *references])
    for of_set in together:
        with contextlib.suppress(*CANNOT):  # told by the table, which asks again
            evaluator.scores(of_set)
    errors: list[LoraLabError | None] = [None] * len(searches)
    drawn = [search.draw is not None for search in searches]
    for nulls in (False, True) if evaluator.on.workers else ():  # which may hang on what the adapters chose
        places = [i for i, is_null in enumerate(drawn) if is_null is nulls]
        works = [(searches[i], searches[i].changes(evaluator)) for i in places]
        for i, error in zip(places, evaluator.prepare(works, CANNOT), strict=True):
            errors[i] = error
    told, count = iter(zip(searches, errors, strict=True)), len(specs) * len(draws)
    return [list(itertools.islice(told, count * (merge_set in several))) for merge_set in merge_sets]


def _draws(question: CompareMerges) -> list[Draw]:
    """All draws of all nulls; one of a null that is not drawn."""
    return [
        Draw(null, replaced, number, question.seed)
        for null in dict.fromkeys(question.nulls)
        for replaced in dict.fromkeys(question.replaced)
        for number in range(question.draws if NULLS[null].random else 1)
    ]


def _data(question: CompareMerges, tasks: Sequence[Task]) -> list[Any]:
    """The examples of all splits that merges and their coefficients hang on, and the base model that is given."""
    different = {fingerprint(task.spec): task for task in tasks}
    examples = [examples_of(task, split) for task in different.values() for split in question.splits]
    return [*examples, question.base_name and digests.of_base(question.base_name)]


class _Table:
    """The rows of a comparison, and its summary, filled set by set."""

    def __init__(self, evaluator: Evaluator, question: CompareMerges, reference: str) -> None:
        self.names = labels_of(evaluator.adapters)
        self.rows: list[Row] = []
        self.skipped: list[Row] = []
        self.merged = 0
        """How many merges there are."""
        self.told: dict[str, dict[str, Any]] = {}
        """The metrics that the tasks are judged by, each once."""
        self._evaluator, self._question, self._reference = evaluator, question, reference
        self._sets: list[Row] = []
        self._behind: dict[str, list[list[Floats]]] = {"sets": [], "scores": []}
        self._curves: list[Row] = []
        self._starts: list[Row] = []
        self._outcomes: dict[Group, Outcomes] = {}
        self._nulls: list[NullScores] = []

    @property
    def summary(self) -> dict[str, Any]:
        """What each set came to, each merge over the sets, its nulls, the validation curves, and what was left out."""
        nulls = null_rows(self._nulls, {each.null: NULLS[each.null].random for each in self._nulls})
        compared = {group: outcomes.compared(self._reference) for group, outcomes in self._outcomes.items()}
        chosen = [row for row in self.rows if row["chosen"]]
        return {
            "sets": self._sets,
            "by_method": by_method(self._sets, compared, nulls, list(self.told)),
            "by_task": by_task(chosen, list(self.told)),
            "nulls": nulls,
            "curves": self._curves,
            "skipped": self.skipped,
            "shared_initial_A": self._starts,
        }

    def tell(self, on: Execution) -> None:
        """What lies behind the shares and scores of the sets, a table for each task; sets of unlike ones have none."""
        for name, behind in self._behind.items():
            if on.by_example and len({tuple(map(len, each)) for each in behind}) == 1:
                for i, rows in enumerate(zip(*behind, strict=True)):
                    on.by_example(f"{name} {i}", rows)

    def add(self, merge_set: MergeSet, searches: Sequence[tuple[CoefficientSearch, LoraLabError | None]]) -> None:
        """The base, the adapters alone, and of several their ensemble, their merges and those of their nulls."""
        evaluator, adapters = self._evaluator, [self._evaluator.adapters[i] for i in merge_set.members]
        own, size = alone(evaluator, merge_set, evaluator.split), sum(map(factor_bytes, adapters))
        by = judges(evaluator, merge_set, evaluator.split, self._question.metric)
        self.told |= told({judge.name: judge.metric for judge in by})
        if _by_itself(merge_set):
            self._add(merge_set, BASE, self._each(bases(evaluator, merge_set)), own, by, _reference(0))
            self._add(merge_set, ALONE, own, own, by, _reference(size))
        if len(merge_set.members) == 1:
            return
        self._starts.append({"set": merge_set.label, "method": merge_set.method, **shared_start(adapters)})
        self._outcomes.setdefault((merge_set.method, merge_set.ratio), Outcomes()).members.append(merge_set.members)
        try:
            self._add(merge_set, ENSEMBLE, self._each(ensembles(evaluator, merge_set)), own, by, _reference(size))
        except CANNOT as why:
            self.skipped.append({"set": merge_set.label, "merge": ENSEMBLE, "why": str(why)})
        for spec, of_spec in itertools.groupby(searches, lambda pair: pair[0].spec):
            try:
                self._add_merge(merge_set, spec, list(of_spec), own, by)
            except CANNOT as why:
                self.skipped.append({"set": merge_set.label, "merge": spec.name, "why": str(why)})

    def _each(self, changes: Sequence[Change]) -> SetScores:
        return [[scores] for scores in self._evaluator.scores(changes)]

    def _add_merge(
        self,
        merge_set: MergeSet,
        spec: MergeSpec,
        searches: Sequence[tuple[CoefficientSearch, LoraLabError | None]],
        own: SetScores,
        by: Sequence[Judge],
    ) -> None:
        """A merge of the adapters at its best coefficient and at 1, and of their nulls."""
        (trial,) = (_trial(*pair, self._evaluator) for pair in searches if pair[0].draw is None)
        group = merge_set.method, merge_set.ratio
        self.merged += 1
        self._curves.append({**_head(merge_set, spec.name), **trial.curve})
        tried = trial.curve["coefficient"]
        at_edge = len(tried) > 1 and trial.best in (min(tried), max(tried))
        for coefficient, scores in trial.tested.items():
            told = scores[0][0].told or {}
            where: Row = {"coefficient": coefficient, "chosen": coefficient == trial.best}
            where |= {"category": "exact" if spec.rank == EXACT else "equal rank", "rank": int(told["rank"])}
            where |= {"bytes": int(told["bytes"]), "cut_error": told["error"]}
            self._add(merge_set, spec.name, scores, own, by, where, at_edge=at_edge)
        best = trial.tested[trial.best]
        self._outcomes[group].add(spec.name, [signed(*part, by) for part in zip(by, best, own, strict=True)])
        drawn: dict[tuple[str, str], list[tuple[CoefficientSearch, LoraLabError | None]]] = {}
        for search, error in searches:
            if search.draw is not None:
                drawn.setdefault((search.draw.null, search.draw.replaced), []).append((search, error))
        for (null, replaced), draws in drawn.items():
            try:
                trials = [_trial(*pair, self._evaluator) for pair in draws]
            except CANNOT as why:
                self.skipped.append({"set": merge_set.label, "merge": f"{spec.name}, {null}", "why": str(why)})
                continue
            shares = tuple(kept_of(each.tested[each.best], own, by) for each in trials)
            self._nulls.append(NullScores(group, spec.name, null, replaced, kept_of(best, own, by), shares))

    def _add(
        self,
        merge_set: MergeSet,
        name: str,
        scores: SetScores,
        own: SetScores,
        by: Sequence[Judge],
        where: Mapping[str, Any],
        *,
        at_edge: bool | None = None,
    ) -> None:
        who = [(self._evaluator.tasks[i].name, self.names[i]) for i in merge_set.members]
        rows, whole = measured(_head(merge_set, name), who, scores, own, by, self._question.seed)
        self.rows += [{**row, **where} for row in rows]
        self._sets.append({**whole, **where, "at_edge": at_edge})
        if self._evaluator.on.by_example:
            self._behind["sets"].append(by_example(scores, own, by))
            self._behind["scores"].append(
                [judge.outcomes(each) / len(by) for each, judge in zip(scores, by, strict=True)]
            )


def _by_itself(merge_set: MergeSet) -> bool:
    """Whether it is shown what its adapters do alone: of seeds once, not in every ratio."""
    return merge_set.ratio is None or len(merge_set.members) == 1


def _trial(search: CoefficientSearch, error: LoraLabError | None, evaluator: Evaluator) -> Trial:
    if error is not None:
        raise error
    return search(evaluator)


def _reference(size: int) -> Row:
    """The cells of what is no merge, and takes so many bytes."""
    cells = {"category": "reference", "rank": None, "bytes": size, "cut_error": None}
    return {"coefficient": None, "chosen": True, **cells}


def factor_bytes(adapter: Adapter) -> int:
    """Bytes of an adapter's own tensors, without heads and whatever else lies in the file."""
    keys = {key for site in adapter.sites.values() for key in site.keys.values()}
    return sum(adapter.tensors[key].numel() * adapter.tensors[key].itemsize for key in keys)


def _cost(evaluator: Evaluator, searches: Sequence[CoefficientSearch]) -> Cost:
    """All evaluations, and what methods read that look at data."""
    assert evaluator.total is not None
    passes: float = evaluator.total
    for search in searches:
        tasks = [evaluator.tasks[i] for i in search.merge_set.members]
        passes += MERGES[search.spec.method].examples_read(search.spec.options, tasks) / evaluator.examples
    return Cost(evaluator.total, 0, 0, evaluator.seconds(passes))


def _head(merge_set: MergeSet, merge: str) -> Row:
    return {
        "set": merge_set.label,
        "method": merge_set.method,
        "seed": merge_set.seed,
        "ratio": merge_set.ratio,
        "merge": merge,
    }
