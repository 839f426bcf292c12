"""Is an adapter stable when parts of it are dropped?

Working definition, after Kuditipudi et al. 2019 (arXiv:1906.06247): θ is ε-stable over a family of keep-sets if
max_S [L(θ_S) − L(θ)] ≤ ε, with only the players in S on. The family matters, so every ε says of which it is. Beside the
loss, L is any metric of the task, where more is better its negative: how much worse, in units of the metric.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of, method_of
from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.analysis.coalitions.keep_sets import KeepSetScores, masks_of
from lora_lab.analysis.measured import of_logits, require, told
from lora_lab.analysis.questions import Stability as Stability
from lora_lab.errors import OptionError, shorten
from lora_lab.games.coalitions import Bools, all_coalitions
from lora_lab.pruning import patterns
from lora_lab.results.result import Result, columns, finite, grouped
from lora_lab.results.stats import Floats, mean_and_spread
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.task import Task

_AFFORDABLE = 2.0
"""All keep-sets are enumerated if that takes at most so many times the block evaluations of sampling."""


def answer(question: Stability, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """Every family of keep-sets of every adapter; the cost of all is told before anything is computed."""
    began = time.perf_counter()
    require(task, question.metric)
    scales = [False, True] if question.rescale and all(adapter.scalable for adapter in adapters) else [False]
    rows: list[dict[str, Any]] = []
    summaries = []
    behind: dict[str, list[Floats]] = {"rows": [], "epsilon": []}
    for i, (adapter, label) in enumerate(zip(adapters, labels_of(adapters), strict=True)):
        evaluator = Evaluator(
            [adapter], task, on.part(i, len(adapters)), split=question.split, examples=question.examples
        )
        groups = players(adapter, question.players)
        games = [Game(evaluator, groups, worth="loss", rescale=rescale) for rescale in scales]
        sets = _sets(question, games[0])
        if on.confirm and not rows:
            logits = task.classifies or of_logits(task, question.metric)
            costs = [game.cost(sets, logits=logits) * len(adapters) for game in games]
            on.confirm(sum(costs[1:], costs[0]))
        fixed = patterns.fixed(patterns.choice_of(adapter))
        del fixed["all"]
        evaluator.total = len({mask.key for game in games for mask in masks_of(game, sets, fixed)})
        for game in games:
            scores = KeepSetScores(game, sets, fixed, metric=question.metric, seed=question.seed)
            who = {"adapter": label, "method": method_of(adapter, label), "seed": adapter.record.get("seed")}
            who["rescaled"] = game.rescale
            rows += [{**who, **row} for row in scores.rows(question.grid)]
            summaries.append({**who, **scores.summary(question.grid)})
            for table, found in scores.by_example.items():
                behind[table] += found
    if on.by_example:
        for table, found in behind.items():
            on.by_example(table, found)
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "metrics": told(scores.metrics),
            "player_names": groups.names,
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"adapters": summaries, "by_method": _by_method(summaries)}),
        evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task)),
    )


def check(question: Stability, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    counts = [len(players(adapter, question.players)) for adapter in adapters]
    if len(set(counts)) > 1:
        raise OptionError(f"these adapters have {shorten(sorted(set(counts)), 9)} players; look at them one by one")


def keep_sets(n: int, samples: int, seed: int = 0) -> Bools:
    """Different keep-sets of every size from 0 to n: `samples` of each drawn evenly, or all where there are no more."""
    generator = np.random.default_rng(seed)
    by_size: list[Bools] = []
    for k in range(n + 1):
        if math.comb(n, k) <= samples:
            by_size.append(_of_size(n, k))
            continue
        drawn: dict[bytes, Bools] = {}
        while len(drawn) < samples:
            row = np.zeros(n, np.bool_)
            row[generator.permutation(n)[:k]] = True
            drawn[row.tobytes()] = row
        by_size.append(np.array(list(drawn.values())))
    return np.concatenate(by_size)


def _of_size(n: int, k: int) -> Bools:
    rows = np.zeros((math.comb(n, k), n), np.bool_)
    for row, members in zip(rows, itertools.combinations(range(n), k), strict=True):
        row[list(members)] = True
    return rows


def _sets(question: Stability, game: Game) -> Bools:
    """The keep-sets to look at: all, or a sample of every size together with all that lack or have one player."""
    n, every = game.n_players, question.every
    drawn = keep_sets(n, question.samples, question.seed)
    if every is False or (every is None and (n > 16 or len(drawn) * 16 < 2**n)):
        return drawn
    if n > 20:
        raise OptionError(f"2^{n} keep-sets are too many to enumerate; only samples of them can be had")
    whole = all_coalitions(n)
    if every is None:
        costs = [game.blocks(sets) for sets in (whole, drawn)]
        return whole if costs[0] <= _AFFORDABLE * costs[1] else drawn
    return whole


def _by_method(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ε over the adapters of each method: mean and standard deviation."""
    rows = [{**row, "method": s["method"], "rescaled": s["rescaled"]} for s in summaries for row in s["epsilon"]]
    table = []
    for head, members in grouped(rows, "method", "rescaled", "family", "metric"):
        mean, spread = mean_and_spread(np.array([row["value"] for row in members]))
        table.append({**head, "mean": mean, "spread": spread, "adapters": len(members)})
    return table
