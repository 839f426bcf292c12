"""How much of an adapter can be pruned away? All patterns, sparsities and ranks, each beside a random control."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of, method_of
from lora_lab.analysis.coalitions import shapley
from lora_lab.analysis.measured import cells, chosen, of_logits, require, told
from lora_lab.analysis.questions import Shapley
from lora_lab.analysis.questions import Sweep as Sweep
from lora_lab.errors import AdapterError, OptionError, TunerError, unknown
from lora_lab.pruning import patterns
from lora_lab.pruning.entries import CRITERIA, prune_weights
from lora_lab.pruning.patterns import Choice
from lora_lab.pruning.ranks import RANK_ORDERS, prune_rank
from lora_lab.results.result import Result, columns, finite, grouped
from lora_lab.results.stats import Floats, Sampled, half_width, mean_and_spread, proportion
from lora_lab.scoring.changes import Replacement
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost, Execution, Progress
from lora_lab.tasks.scores.judging import Judge
from lora_lab.tasks.task import Scores, Task

Row = dict[str, Any]


Piece = tuple[Row, list[Replacement | Callable[[], Scores]]]
"""What a row says of itself, and how to get the scores of each of its draws."""


def answer(question: Sweep, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """Every way of pruning every adapter; the cost of all is told before anything is computed."""
    began = time.perf_counter()
    rows: list[Row] = []
    behind: list[Floats] = []
    done = 0
    require(task, question.metric)
    for adapter, label in zip(adapters, labels_of(adapters), strict=True):
        quiet = replace(on, progress=None, confirm=None, by_example=None)
        evaluator = Evaluator([adapter], task, quiet, split=question.split, examples=question.examples)
        choosing = Evaluator([adapter], task, quiet, split=CHOOSING.split, examples=question.examples)
        values = functools.partial(_values_of, choosing, quiet)
        choice = replace(patterns.choice_of(adapter, seed=question.seed), values=values)
        pieces = [
            piece for kind in KINDS if kind in question.kinds for piece in KINDS[kind](question, evaluator, choice)
        ]
        valued = {name: _asked_for(name) for name in {head["criterion"] for head, _ in pieces} & _valued()}
        without = {name for name, asked in valued.items() if shapley.why_not(asked, choosing)}
        pieces = [piece for piece in pieces if piece[0]["criterion"] not in without]
        draws = sum(len(made) for _, made in pieces)
        if on.confirm and not rows:
            cost = _cost(evaluator, draws * len(adapters))
            for name in valued.keys() - without:
                cost += shapley.cost(valued[name], adapter, task, quiet, choosing) * len(adapters)
            on.confirm(cost)
        logits = of_logits(task, question.metric)
        scored = _scored(pieces, evaluator, functools.partial(_report, on, done, draws * len(adapters)), logits)
        done += draws
        who = {"adapter": label, "method": method_of(adapter, label), "seed": adapter.record.get("seed")}
        judges = _judges(question, evaluator, scored[0][1][0]) if scored else []
        reach = _reach([scores for _, scores in scored], judges)
        rows += [
            {**who, **head, "draws": len(scores), **_cells(scores, judges, reach, question.seed)}
            for head, scores in scored
        ]
        behind += [_values(scores, judges[0]).mean(0) for _, scores in scored if on.by_example]
    if on.by_example:
        on.by_example("rows", behind)
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "metrics": told({judge.name: judge.metric for judge in judges}),
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"by_method": _by_method(rows, [judge.name for judge in judges])}),
        evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task)),
    )


def check(question: Sweep, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    if "unstructured" in question.kinds and 1 in question.sparsities:
        for adapter in adapters:
            if adapter.why_not_additive:
                raise OptionError(
                    f"{adapter.source}: at sparsity 1 nothing of {adapter.tuner} is left; a lower one is needed"
                )
    needs_delta = "unstructured" in question.kinds and any(CRITERIA[name].of_delta for name in question.criteria)
    if needs_delta or list(question.kinds) == ["rank"]:
        for adapter in adapters:
            adapter.require_additive()


CHOOSING = Shapley(split="validation")
"""The question whose values choose layers; each pattern by values has its own estimator."""


def _valued() -> set[str]:
    return {name for name, pattern in patterns.KEEPS.items() if pattern.valued}


def _asked_for(pattern: str) -> Shapley:
    return replace(CHOOSING, estimator=patterns.KEEPS[pattern].estimator)


def _values_of(evaluator: Evaluator, on: Execution, estimator: str | None) -> Mapping[str, float]:
    question = replace(CHOOSING, estimator=estimator)
    return shapley.values(question, evaluator.adapter, evaluator.task, on, evaluator)


def _cost(evaluator: Evaluator, draws: int) -> Cost:
    """What all draws take."""
    blocks = draws * evaluator.batches * evaluator.layout.blocks
    return Cost(draws, blocks, blocks, evaluator.seconds(draws))


def _report(on: Execution, before: int, total: int, done: int, _: int) -> None:
    on.report(before + done, total)


def _scored(
    pieces: Sequence[Piece], evaluator: Evaluator, progress: Progress, logits: bool
) -> list[tuple[Row, list[Scores]]]:
    """Every row with the scores of its draws; other adapters are scored first, all together."""
    others = [draw for _, made in pieces for draw in made if isinstance(draw, Replacement)]
    total, done = sum(len(made) for _, made in pieces), len(others)
    replaced = dict(zip(others, evaluator.scores(others, logits=logits, progress=progress), strict=True))
    scored: list[tuple[Row, list[Scores]]] = []
    for head, made in pieces:
        scores = []
        for draw in made:
            if isinstance(draw, Replacement):
                scores.append(replaced[draw])
                continue
            scores.append(draw())
            done += 1
            progress(done, total)
        scored.append((head, scores))
    return scored


def _structured(question: Sweep, evaluator: Evaluator, choice: Choice) -> list[Piece]:
    count, total = len(choice.players), len(evaluator.names)
    half, third = count // 2, max(1, count // 3)
    picks = {name: [modules] for name, modules in patterns.fixed(choice).items()}
    if count > 1:
        if choice.adapter.why_not_additive is None:
            picks[f"top-norm:{half}"] = [patterns.keep(choice, f"top-norm:{half}")]
        for size in dict.fromkeys((half, third)):
            others = [replace(choice, seed=choice.seed + i) for i in range(question.draws)]
            picks[f"random:{size}"] = [patterns.keep(other, f"random:{size}") for other in others]
    by_values = sorted(_valued()) if count > 1 else []
    there = list(dict.fromkeys([*map(_criterion, picks), *by_values]))
    wanted = _wanted(question, choice, there)
    picks = {name: made for name, made in picks.items() if _criterion(name) in wanted}

    @functools.cache
    def together() -> dict[str, Scores]:
        masks = [evaluator.keeping(modules) for made in picks.values() for modules in made]
        return {
            mask.key: scores
            for mask, scores in zip(
                masks, evaluator.scores(masks, logits=of_logits(evaluator.task, question.metric)), strict=True
            )
        }

    def scored(modules: Sequence[str]) -> Callable[[], Scores]:
        return lambda: together()[evaluator.keeping(modules).key]

    pieces: list[Piece] = []
    for name, made in picks.items():
        share = float(np.mean([len(modules) for modules in made])) / total
        pieces.append((_head("structured", _criterion(name), name, share), [scored(m) for m in made]))
    for name in filter(wanted.__contains__, by_values):
        pieces.append(_by_values(question, name, f"{name}:{half}", evaluator, choice))
    return pieces


def _criterion(label: str) -> str:
    """The pattern's name: what stands before the colon."""
    return label.partition(":")[0]


def _wanted(question: Sweep, choice: Choice, there: Sequence[str]) -> Collection[str]:
    """Those of the patterns that are there which the question names, by any of their names; all if it names none."""
    if not question.patterns:
        return there
    named = {name: patterns.KEEPS[name].choose for name in question.patterns}
    for name, choose in named.items():
        if choose not in [patterns.KEEPS[each].choose for each in there]:
            raise unknown(f"pattern of {choice.adapter.label}", name, there)
    return [name for name in there if patterns.KEEPS[name].choose in named.values()]


def _by_values(question: Sweep, name: str, label: str, evaluator: Evaluator, choice: Choice) -> Piece:
    head = _head("structured", name, label, math.nan)

    def chosen() -> Scores:
        kept = patterns.keep(choice, label)  # computed only now
        head["kept"] = len(kept) / len(evaluator.names)
        return evaluator.scores([evaluator.keeping(kept)], logits=of_logits(evaluator.task, question.metric))[0]

    return head, [chosen]


def _unstructured(question: Sweep, evaluator: Evaluator, choice: Choice) -> list[Piece]:
    per_matrix, seed = question.per_matrix, question.seed

    def other(sparsity: float, by: str, draw: int) -> Replacement:
        make = functools.partial(_pruned, sparsity=sparsity, by=by, per_matrix=per_matrix, seed=seed + draw)
        scope = "matrix" if per_matrix else "global"
        return Replacement(f"{by}:{scope}:{sparsity!r}:{seed + draw if CRITERIA[by].random else 0}", make)

    return [
        (
            _head("unstructured", by, f"{sparsity:g}", 1 - sparsity),
            [other(sparsity, by, draw) for draw in range(question.draws if CRITERIA[by].random else 1)],
        )
        for by in question.criteria
        for sparsity in question.sparsities
    ]


def _pruned(adapter: Adapter, *, sparsity: float, by: str, per_matrix: bool, seed: int) -> Adapter | None:
    try:
        return prune_weights(adapter, sparsity=sparsity, by=by, per_matrix=per_matrix, seed=seed).adapter
    except AdapterError as error:
        if isinstance(error, TunerError) or adapter.why_not_additive:
            raise  # only of a sum is nothing left the base
        return None


def _ranks(question: Sweep, evaluator: Evaluator, choice: Choice) -> list[Piece]:
    adapter, seed = evaluator.adapter, question.seed
    if adapter.why_not_additive:
        return []
    top = max(site.rank or 0 for site in adapter.sites.values())
    total = sum(site.rank or 0 for site in adapter.sites.values())

    def other(rank: int, by: str, draw: int) -> Replacement:
        key = f"rank:{by}:{rank}" + (f":{seed + draw}" if RANK_ORDERS[by].random else "")
        return Replacement(key, functools.partial(_lower_rank, rank=rank, by=by, seed=seed + draw))

    return [
        (
            _head("rank", by, str(rank), sum(min(rank, site.rank or 0) for site in adapter.sites.values()) / total),
            [other(rank, by, draw) for draw in range(question.draws if RANK_ORDERS[by].random else 1)],
        )
        for by in RANK_ORDERS
        for rank in _some_ranks(top)
    ]


KINDS: dict[str, Callable[[Sweep, Evaluator, Choice], list[Piece]]] = {
    "structured": _structured,
    "unstructured": _unstructured,
    "rank": _ranks,
}
"""Kind of pruning → the rows that it gives for an adapter."""


def _lower_rank(adapter: Adapter, *, rank: int, by: str, seed: int) -> Adapter:
    return prune_rank(adapter, rank=rank, by=by, seed=seed).adapter


def _some_ranks(top: int) -> list[int]:
    """1, 2, 4 … and the whole rank; all of them up to 8."""
    return list(range(1, top + 1)) if top <= 8 else sorted({2**i for i in range(top.bit_length())} | {top})


def _head(kind: str, criterion: str, label: str, kept: float) -> Row:
    return {"kind": kind, "criterion": criterion, "label": label, "kept": kept}


def _judges(question: Sweep, evaluator: Evaluator, scored: Scores) -> list[Judge]:
    """Each metric that is asked for; by default the task's main one and its loss."""
    evaluator.task.columns(scored, evaluator.data)  # after which tasks of the user's own know theirs
    names = chosen(evaluator.task, question.metric)
    return [Judge(evaluator.task, evaluator.data, [name], scored) for name in names]


def _values(scores: Sequence[Scores], judge: Judge) -> Floats:
    return np.stack([judge.outcomes([each]) for each in scores]).astype(np.float64)


def _reach(rows: Sequence[Sequence[Scores]], judges: Sequence[Judge]) -> dict[str, float]:
    """How far off a draw may be that has not come: as far as any two draws of one row are, or else by one example."""
    found = {}
    for judge in judges:
        widest = max((float(np.ptp(_values(scores, judge).mean(1))) for scores in rows), default=0.0)
        outcomes = judge.metric.of_outcomes(judge.outcomes(rows[0][:1]))
        found[judge.name] = max(widest, 1 / len(rows[0][0])) if outcomes else widest
    return found


def _cells(scores: Sequence[Scores], judges: Sequence[Judge], reach: Mapping[str, float], seed: int) -> Row:
    """Mean over draws; its interval is that over examples, widened by what other draws would have given.

    Over examples: `proportion` for shares of outcomes, a bootstrap for others, of `Metric.influence` where a metric is
    no mean of examples. Draws that are all one model add nothing.
    """
    row: Row = {}
    one_model = all((o[name] == values).all() for o in scores for name, values in scores[0].columns.items())
    for judge in judges:
        values, first = _values(scores, judge), judge.outcomes(scores[:1])
        outcomes = judge.metric.of_outcomes(first)
        if outcomes:
            value, low, high = proportion(first if one_model else values.mean(0))
        else:
            value, low, high = Sampled.of(values.mean(0, keepdims=True), seed=seed).estimate(lambda means: means[0])
        # each end: √((distance of the end over examples)² + (half width over draws)²) from the value
        _, spread = mean_and_spread(values.mean(1))
        by_draws = 0.0 if one_model else half_width(values.mean(1), reach=reach[judge.name])
        ends = (value - math.hypot(value - low, by_draws), value + math.hypot(high - value, by_draws))
        if outcomes:
            ends = (max(0.0, ends[0]), min(1.0, ends[1]))
        row |= {**cells(judge.name, (value, *ends)), f"{judge.name}_spread": spread}
    return row


def _by_method(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Mean and standard deviation over the adapters of each method."""
    table = []
    for row, members in grouped(rows, "method", "kind", "criterion", "label"):
        row |= {"kept": float(np.mean([m["kept"] for m in members])), "adapters": len(members)}
        for metric in metrics:
            row[metric], row[f"{metric}_spread"] = mean_and_spread(np.array([m[metric] for m in members]))
        table.append(row)
    return table
