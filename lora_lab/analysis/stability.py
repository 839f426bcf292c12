"""Is an adapter stable when parts of it are dropped?

Working definition, after Kuditipudi et al. 2019 (arXiv:1906.06247): θ is ε-stable over a family of keep-sets if
max_S [L(θ_S) − L(θ)] ≤ ε, with only the players in S on. The family matters, so every ε says of which it is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, identity, labels_of, method_of
from lora_lab.adapters.groups import players
from lora_lab.analysis.game import Cost, Game, Progress, game_of, measured
from lora_lab.errors import OptionError, TaskError, some
from lora_lab.games.estimators import Bools, all_coalitions
from lora_lab.games.progressive import Stratum, binomial, inequality, stratum
from lora_lab.pruning import patterns
from lora_lab.results.result import Result, columns, fingerprint, finite, grouped
from lora_lab.results.stats import (
    INTERVALS,
    Floats,
    Sampled,
    half_of_strata,
    half_width,
    mean_and_error,
    mean_and_spread,
    proportion,
)
from lora_lab.scoring.examples import examples_of
from lora_lab.scoring.workers import Workers
from lora_lab.tasks.task import Scores, Task

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Probabilities of the p-curve."""

METRICS = ("loss", "error")
_AFFORDABLE = 2.0
"""All keep-sets are enumerated if that takes at most so many times the block evaluations of sampling."""


def stability(
    adapters: Sequence[Adapter],
    task: Task,
    *,
    by: str | Mapping[str, str] = "layer",
    samples: int = 50,
    grid: Sequence[float] = GRID,
    rescale: bool = True,
    every: bool | None = None,
    split: str = "test",
    examples: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    confirm: Callable[[Cost], None] | None = None,
    workers: Workers | None = None,
) -> Result:
    """Loss and error over families of keep-sets: by size, by probability, one left out, one alone, fixed patterns.

    By size: all keep-sets, or `samples` different ones of each size k (`every` forces or forbids enumeration). By
    probability: the same keep-sets, weighted by Binomial(G, p), a coin for every player (CoTo's masks in training have
    at least one on; see `progressive`). With `rescale` everything comes a second time with the updates multiplied by
    G/k. Every mean has a 95 % interval for the choice of keep-sets and of examples together.
    """
    check(adapters, by=by, samples=samples, grid=grid)
    began = time.perf_counter()
    factors = [False, True] if rescale and all(adapter.scalable for adapter in adapters) else [False]
    data: dict[str, Any] = {"split": split, "examples": examples, "device": device, "cache": cache}
    data |= {"progress": progress, "workers": workers}
    rows: list[dict[str, Any]] = []
    summaries = []
    for adapter, label in zip(adapters, labels_of(adapters), strict=True):
        game = game_of(adapter, task, by, worth="loss", **data)
        games = [Game(game.outcomes, game.players, rescale=rescaled) for rescaled in factors]
        chosen = _sets(game, samples, seed, every)
        if confirm and not rows:
            costs = [each.cost(chosen, logits=task.classifies) * len(adapters) for each in games]
            confirm(sum(costs[1:], costs[0]))
        fixed = patterns.fixed(patterns.choice_of(adapter))
        del fixed["all"]
        for each in games:
            rescaled = each.rescale
            seen = _Seen(each, chosen, fixed, seed)
            who = {"adapter": label, "method": method_of(adapter, label), "seed": adapter.record.get("seed")}
            rows += [{**who, "rescaled": rescaled, **row} for row in seen.rows(grid)]
            summaries.append({**who, "rescaled": rescaled, **seen.summary(grid)})
    settings = {
        "players": by if isinstance(by, str) else dict(by),
        "samples": samples,
        "grid": list(grid),
        "rescale": rescale,
        "every": every,
        "examples": examples,
        "seed": seed,
    }
    return Result(
        "stability",
        finite(columns(rows)),
        {
            "task": task.record,
            "split": split,
            **settings,
            "player_names": game.player_names,
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"adapters": summaries, "by_method": _by_method(summaries)}),
        measured(
            game.outcomes,
            adapters,
            began=began,
            run=run_id(adapters, task, split=split, by=settings.pop("players"), **settings),
        ),
    )


def check(adapters: Sequence[Adapter], *, by: str | Mapping[str, str], samples: int, grid: Sequence[float]) -> None:
    """Raise what `stability` would raise for these options, before anything is computed."""
    if not adapters:
        raise OptionError("no adapter was given")
    if samples < 2:
        raise OptionError(f"{samples} keep-sets of each size; at least 2 are needed")
    wrong = [p for p in grid if not 0 <= p <= 1]
    if wrong:
        raise OptionError(f"p = {wrong[0]} is no probability; numbers from 0 to 1 are needed")
    counts = [len(players(adapter, by)) for adapter in adapters]
    if len(set(counts)) > 1:
        raise OptionError(f"these adapters have {some(sorted(set(counts)), 9)} players; look at them one by one")


def run_id(adapters: Sequence[Adapter], task: Task, *, split: str, **options: Any) -> str:
    """What a run's result hangs on: the adapters, the examples, and the options."""
    return fingerprint(["stability", INTERVALS, [identity(a) for a in adapters], examples_of(task, split), options])


def keep_sets(n: int, samples: int, seed: int = 0) -> Bools:
    """Different keep-sets of every size from 0 to n: `samples` of each drawn evenly, or all where there are no more."""
    generator = np.random.default_rng(seed)
    found: list[Bools] = []
    for k in range(n + 1):
        if math.comb(n, k) <= samples:
            found.append(_of_size(n, k))
            continue
        drawn: dict[bytes, Bools] = {}
        while len(drawn) < samples:
            row = np.zeros(n, np.bool_)
            row[generator.permutation(n)[:k]] = True
            drawn[row.tobytes()] = row
        found.append(np.array(list(drawn.values())))
    return np.concatenate(found)


def _sets(game: Game, samples: int, seed: int, every: bool | None) -> Bools:
    """The keep-sets to look at: all, or a sample of every size together with all that lack or have one player."""
    n = game.n_players
    drawn = keep_sets(n, samples, seed)
    if every is False or (every is None and (n > 16 or len(drawn) * 16 < 2**n)):
        return drawn
    if n > 20:
        raise OptionError(f"2^{n} keep-sets are too many to enumerate; leave out --every")
    whole = all_coalitions(n)
    if every is None:
        costs = [game.blocks(sets) for sets in (whole, drawn)]
        return whole if costs[0] <= _AFFORDABLE * costs[1] else drawn
    return whole


class _Seen:
    """What the keep-sets of one adapter came to, with or without rescaling."""

    def __init__(self, game: Game, chosen: Bools, fixed: Mapping[str, list[str]], seed: int) -> None:
        n = game.n_players
        ends = np.concatenate([~np.eye(n, dtype=np.bool_), np.eye(n, dtype=np.bool_)])
        known = {row.tobytes() for row in chosen}
        self._game, self._seed = game, seed
        self._sampled = len(chosen)
        self._sets = np.concatenate([chosen, np.array([r for r in ends if r.tobytes() not in known]).reshape(-1, n)])
        self._scores = game.scores(self._sets, logits=game.outcomes.task.classifies)
        self._size = self._sets.sum(1)
        self._good = [bool(np.isfinite(s.loss).all()) for s in self._scores]
        self._by_size: dict[int, list[int]] = {}
        """Size → the keep-sets with finite losses, without those added to leave each player out once."""
        for i in range(self._sampled):
            if self._good[i]:
                self._by_size.setdefault(int(self._size[i]), []).append(i)
        self._reach = {metric: self._farthest(metric) for metric in METRICS}
        self._moments = {(metric, k): self._averaged(metric, k) for metric in METRICS for k in self._by_size}
        self._fixed = self._score_fixed(fixed)
        self._full = self._scores[int(np.flatnonzero(self._size == n)[0])]
        if not np.isfinite(self._full.loss).all():
            raise TaskError(f"{game.outcomes.adapter.source}: its loss is not finite with everything on")

    def rows(self, grid: Sequence[float]) -> list[dict[str, Any]]:
        """One row for every family of keep-sets."""
        n = self._game.n_players
        sizes = sorted(self._by_size.items())
        rows = [self._row("k-of-G", str(k), k / n, chosen, exhaustive=self._whole(k)) for k, chosen in sizes]
        rows += [self._p_row(p) for p in grid]
        for family, size, wanted in (("leave-one-out", n - 1, False), ("one-alone", 1, True)):
            for i, name in enumerate(self._game.player_names):
                one = [j for j, row in enumerate(self._sets) if self._size[j] == size and row[i] == wanted]
                if self._good[one[0]]:
                    rows.append(self._row(family, name, size / n, one[:1], exhaustive=True))
        for name, (share, scores) in self._fixed.items():
            rows.append(self._cells("fixed", name, share, [scores], [name], exhaustive=True))
        return rows

    def summary(self, grid: Sequence[float]) -> dict[str, Any]:
        """ε by family and metric, and both sides of the progressive-optimisation inequality."""
        n = self._game.n_players
        proper = [i for i in range(self._sampled) if 0 < self._size[i] < n and self._good[i]]
        lacking_one = [i for i, size in enumerate(self._size) if size == n - 1 and self._good[i]]
        families = {
            "non-empty keep-sets": (proper, self._enumerated),
            "half or more kept": ([i for i in proper if 2 * self._size[i] >= n], self._enumerated),
            "leave-one-out": (lacking_one, True),
        }
        epsilon = [
            self._epsilon(family, metric, [self._scores[i] for i in chosen], [self._name(i) for i in chosen], whole)
            for family, (chosen, whole) in families.items()
            if chosen
            for metric in METRICS
        ]
        if self._fixed:
            scores, names = [s for _, s in self._fixed.values()], list(self._fixed)
            epsilon += [self._epsilon("fixed patterns", metric, scores, names, True) for metric in METRICS]
        return {
            "keep_sets": self._sampled,
            "exhaustive": self._enumerated,
            "loss": self._full.mean_loss,
            "error": 1 - self._full.accuracy,
            "epsilon": epsilon,
            "inequality": list(inequality(self._strata(), n, grid)),
            "always_on": list(self._game.players.left_out),
        }

    @property
    def _enumerated(self) -> bool:
        return bool(self._sampled == 2**self._game.n_players)

    def _score_fixed(self, fixed: Mapping[str, list[str]]) -> dict[str, tuple[float, Scores]]:
        """Pattern → share of the modules kept, which is k/G here, and the scores."""
        outcomes = self._game.outcomes
        shares = [len(kept) / len(outcomes.names) for kept in fixed.values()]
        variants = [
            outcomes.keeping(kept, 1 / share if self._game.rescale else 1.0)
            for kept, share in zip(fixed.values(), shares, strict=True)
        ]
        return dict(zip(fixed, zip(shares, outcomes.of(variants), strict=True), strict=True))

    def _averaged(self, metric: str, k: int) -> tuple[Floats, Floats]:
        """Of the keep-sets of a size: means over the sets, by example, and means over the examples, by set."""
        values = np.stack([_values(self._scores[i], metric) for i in self._by_size[k]])
        return values.mean(0), values.mean(1)

    def _farthest(self, metric: str) -> float:
        """The largest difference between two keep-sets of one size; if there is none, between any two."""
        means = {k: [float(_values(self._scores[i], metric).mean()) for i in own] for k, own in self._by_size.items()}
        within = max((max(own) - min(own) for own in means.values()), default=0.0)
        every = [mean for own in means.values() for mean in own]
        return within or (max(every) - min(every) if every else 0.0)

    def _error(self, metric: str, k: int) -> float:
        """Standard error of the mean over the keep-sets of a size that comes from not having all of them."""
        means, of = self._moments[metric, k][1], math.comb(self._game.n_players, k)
        if len(means) < 2 or self._whole(k):
            return 0.0
        return float(mean_and_error(means[:, None], self._reach[metric])[1][0]) * math.sqrt(1 - len(means) / of)

    def _whole(self, k: int) -> bool:
        return len(self._by_size[k]) == math.comb(self._game.n_players, k)

    def _name(self, i: int) -> str:
        return self._game.name_of(self._sets[i])

    def _row(self, family: str, label: str, share: float, chosen: list[int], *, exhaustive: bool) -> dict[str, Any]:
        scores, names = [self._scores[i] for i in chosen], [self._name(i) for i in chosen]
        return self._cells(family, label, share, scores, names, exhaustive=exhaustive)

    def _cells(
        self,
        family: str,
        label: str,
        share: float,
        scores: Sequence[Scores],
        names: Sequence[str],
        *,
        exhaustive: bool,
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"family": family, "label": label, "share": share, "sets": len(scores)}
        row["exhaustive"] = exhaustive
        for metric in METRICS:
            values = np.stack([_values(s, metric) for s in scores])
            means = values.mean(1)
            size = math.comb(self._game.n_players, round(share * self._game.n_players))
            by_sets = 0.0 if exhaustive else half_width(means, reach=self._reach[metric], of=size)
            row |= _interval(metric, values.mean(0), by_sets)
            row[f"{metric}_spread"] = float(means.std(ddof=1)) if len(means) > 1 else 0.0
            row[f"{metric}_worst"] = float(means.max())
            row[f"{metric}_worst_set"] = names[int(means.argmax())]
        return row

    def _p_row(self, p: float) -> dict[str, Any]:
        weights = self._weights(p)
        row: dict[str, Any] = {"family": "p", "label": f"{p:g}", "share": p, "sets": self._sampled}
        row["exhaustive"] = self._enumerated
        for metric in METRICS:
            mean, variance = np.zeros(len(self._full)), 0.0
            sampled: list[tuple[float, int]] = []  # variance of a size's share, and its keep-sets
            worst, worst_set = -math.inf, ""
            for k in weights:
                by_example, means = self._moments[metric, k]
                mean = mean + weights[k] * by_example
                of = math.comb(self._game.n_players, k)
                inside = float(means.var(ddof=1)) * (of - 1) / of if len(means) > 1 else 0.0  # of all of the size
                variance += weights[k] * (inside + float(means.mean()) ** 2)
                sampled.append(((weights[k] * self._error(metric, k)) ** 2, len(means)))
                if weights[k] > 0 and means.max() > worst:
                    worst, worst_set = float(means.max()), self._name(self._by_size[k][int(means.argmax())])
            row |= _interval(metric, mean, half_of_strata(sampled))
            row[f"{metric}_spread"] = math.sqrt(max(0.0, variance - float(mean.mean()) ** 2))
            row[f"{metric}_worst"], row[f"{metric}_worst_set"] = worst, worst_set
        return row

    def _weights(self, p: float) -> dict[int, float]:
        """Probability of each size at p, over the sizes of which there is a keep-set."""
        every = binomial(self._game.n_players, p)
        there = sorted(self._by_size)
        return {k: float(every[k] / every[there].sum()) for k in there}

    def _epsilon(
        self, family: str, metric: str, scores: Sequence[Scores], names: Sequence[str], whole: bool
    ) -> dict[str, Any]:
        """max over the family of the rise above the whole adapter; of a sample, a lower bound of the family's."""
        values = np.stack([_values(self._full, metric), *(_values(s, metric) for s in scores)])
        if metric == "error" and self._full.correct.dtype == np.bool_ and np.isfinite(values).all():
            values = values.astype(np.bool_)
        sampled = Sampled.of(values, seed=self._seed)
        value, low, high = sampled.largest(lambda L: L[1:] - L[0])
        worst = int((sampled.means[1:] - sampled.means[0]).argmax())
        return {
            "family": family,
            "metric": metric,
            "value": value,
            "low": low,
            "high": high,
            "worst_set": names[worst],
            "sets": len(scores),
            "lower_bound": not whole,
        }

    def _strata(self) -> dict[int, Stratum]:
        """What the keep-sets of each size say of the progressive-optimisation inequality; nothing of a language model.

        Its logits, a vocabulary for every token, are not kept.
        """
        if not self._game.outcomes.task.classifies:
            return {}
        labels, n = self._game.outcomes.labels, self._game.n_players
        return {
            k: stratum([_logits(self._scores[i]) for i in own], labels, math.comb(n, k))
            for k, own in self._by_size.items()
        }


def _values(scores: Scores, metric: str) -> Floats:
    return scores.loss if metric == "loss" else np.where(np.isfinite(scores.loss), scores.wrong, np.nan)


def _logits(scores: Scores) -> npt.NDArray[np.float32]:
    assert scores.logits is not None
    return scores.logits


def _interval(name: str, values: Floats, by_sets: float) -> dict[str, float]:
    """The mean of a loss or an error over examples, and the ends of its interval, which the choice of sets widens."""
    value, half = float(values.mean()), half_width(values)
    low, high = proportion(values)[1:] if name == "error" else (value - half, value + half)
    low, high = value - math.hypot(value - low, by_sets), value + math.hypot(high - value, by_sets)
    if not math.isnan(value):
        low, high = max(0.0, low), min(1.0, high) if name == "error" else high
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _of_size(n: int, k: int) -> Bools:
    rows = np.zeros((math.comb(n, k), n), np.bool_)
    for row, members in zip(rows, itertools.combinations(range(n), k), strict=True):
        row[list(members)] = True
    return rows


def _by_method(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ε over the adapters of each method: mean and standard deviation."""
    rows = [{**row, "method": s["method"], "rescaled": s["rescaled"]} for s in summaries for row in s["epsilon"]]
    found = []
    for head, members in grouped(rows, "method", "rescaled", "family", "metric"):
        mean, spread = mean_and_spread(np.array([row["value"] for row in members]))
        found.append({**head, "mean": mean, "spread": spread, "adapters": len(members)})
    return found
