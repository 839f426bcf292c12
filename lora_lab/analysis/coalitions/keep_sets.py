"""What the keep-sets of one adapter came to: means over families of them with intervals, the worst one, ε.

A metric that is no mean of examples has the numbers of the examples that `Metric.influence` gives, so that means over
keep-sets and their intervals are made of it as of any other; ε is that of the metric itself, by a bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.analysis.coalitions.game import Game, loss_is_finite
from lora_lab.analysis.measured import cells, known, of_logits, sampled
from lora_lab.errors import TaskError
from lora_lab.games.coalitions import Bools
from lora_lab.games.progressive import Stratum, binomial, inequality, stratum
from lora_lab.results.stats import Floats, half_of_strata, half_width, mean_and_error, proportion
from lora_lab.scoring.changes import LayerMask
from lora_lab.tasks.scores.metrics import Column, Metric
from lora_lab.tasks.task import Scores


def masks_of(game: Game, sets: Bools, fixed: Mapping[str, list[str]]) -> list[LayerMask]:
    """Everything that `KeepSetScores` scores."""
    return [*map(game.mask, _with_ends(sets)), *_pattern_masks(game, fixed)]


def _with_ends(sets: Bools) -> Bools:
    """The keep-sets, and those that leave one player out or keep one alone where they are not among them."""
    n, drawn = sets.shape[1], {row.tobytes() for row in sets}
    ends = np.concatenate([~np.eye(n, dtype=np.bool_), np.eye(n, dtype=np.bool_)])
    added = np.array([row for row in ends if row.tobytes() not in drawn]).reshape(-1, n)
    return np.concatenate([sets, added])


def _pattern_masks(game: Game, fixed: Mapping[str, list[str]]) -> list[LayerMask]:
    """The modules that each pattern keeps; where the game rescales, times that of all over that of these."""
    evaluator = game.evaluator
    shares = {name: len(kept) / len(evaluator.names) for name, kept in fixed.items()}
    return [evaluator.keeping(kept, 1 / shares[name] if game.rescale else 1.0) for name, kept in fixed.items()]


class KeepSetScores:
    """The metrics asked for of one adapter's keep-sets, with or without rescaling.

    Keep-sets whose loss is not finite or that have no value of a metric are left out, and warnings name them. TaskError
    where the whole adapter is one of them.
    """

    def __init__(
        self, game: Game, sets: Bools, fixed: Mapping[str, list[str]], *, metric: Sequence[str] = (), seed: int
    ) -> None:
        n, task = game.n_players, game.evaluator.task
        self._game, self._seed = game, seed
        self._sampled, self._sets = len(sets), _with_ends(sets)
        self.metrics = known(game.evaluator, [game.mask(np.ones(n, np.bool_))], metric)
        """By name, the main one (or the first that was asked for) first."""
        logits = of_logits(task, metric)
        self._scores = game.scores(self._sets, logits=logits or task.classifies)
        self._fixed, of_fixed = self._score_fixed(fixed, logits)
        every = [*self._scores, *of_fixed]
        self._names = [*map(game.name_of, self._sets), *self._fixed]
        self._size = self._sets.sum(1)
        self._finite = [bool(loss_is_finite(s).all()) for s in every]
        self._columns = [task.columns(s, game.evaluator.data) for s in every]
        self._values = {name: self._by_example(name) for name in self.metrics}
        """Metric → the numbers of the examples, [keep-sets and fixed patterns, examples]; NaN where it has no value."""
        self._good = np.all([np.isfinite(values).all(1) for values in self._values.values()], axis=0)
        self._full = int(np.flatnonzero(self._size == n)[0])
        self._require()
        self.by_example: dict[str, list[Floats]] = {"rows": [], "epsilon": []}
        """Table → for each of its rows numbers of the examples, of rows with several metrics by the first."""
        self._by_size: dict[int, list[int]] = {}
        """Size → the keep-sets with values, without those added to leave each player out once."""
        for i in range(self._sampled):
            if self._good[i]:
                self._by_size.setdefault(int(self._size[i]), []).append(i)
        self._reach = {name: self._farthest(name) for name in self.metrics}
        self._moments = {(name, k): self._averaged(name, k) for name in self.metrics for k in self._by_size}

    def rows(self, grid: Sequence[float]) -> list[dict[str, Any]]:
        """One row for every family of keep-sets."""
        n = self._game.n_players
        sizes = sorted(self._by_size.items())
        rows = [self._row("k-of-G", str(k), k / n, indices, exhaustive=self._whole(k)) for k, indices in sizes]
        rows += [self._p_row(p) for p in grid if binomial(n, p)[list(self._by_size)].any()]
        for family, size, wanted in (("leave-one-out", n - 1, False), ("one-alone", 1, True)):
            for i, name in enumerate(self._game.player_names):
                one = [j for j, row in enumerate(self._sets) if self._size[j] == size and row[i] == wanted]
                if self._good[one[0]]:
                    rows.append(self._row(family, name, size / n, one[:1], exhaustive=True))
        for i, (name, share) in enumerate(self._fixed.items(), start=len(self._sets)):
            rows.append(self._row("fixed", name, share, [i], exhaustive=True))
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
            "fixed patterns": ([i for i in range(len(self._sets), len(self._names)) if self._good[i]], True),
        }
        return {
            "keep_sets": self._sampled,
            "exhaustive": self._enumerated,
            **{name: float(values[self._full].mean()) for name, values in self._values.items()},
            "epsilon": [
                self._epsilon(family, name, indices, whole)
                for family, (indices, whole) in families.items()
                if indices
                for name in self.metrics
            ],
            "inequality": list(inequality(self._strata(), n, grid)),
            "always_on": list(self._game.players.left_out),
        }

    @property
    def _enumerated(self) -> bool:
        return bool(self._sampled == 2**self._game.n_players)

    def _score_fixed(self, fixed: Mapping[str, list[str]], logits: bool) -> tuple[dict[str, float], list[Scores]]:
        """Pattern → share of the modules kept, which is k/G here; and the scores of each."""
        evaluator = self._game.evaluator
        shares = {name: len(kept) / len(evaluator.names) for name, kept in fixed.items()}
        scores = evaluator.scores(_pattern_masks(self._game, fixed), logits=logits)
        bad = [name for name, each in zip(fixed, scores, strict=True) if not loss_is_finite(each).all()]
        self._game.warn("the loss is not finite", bad, len(scores))
        return shares, scores

    def _by_example(self, name: str) -> Floats:
        nothing = np.full(self._game.evaluator.examples, np.nan)
        each = zip(self._finite, self._columns, strict=True)
        values = np.stack([self.metrics[name].influence(found) if finite else nothing for finite, found in each])
        lost = [self._names[i] for i in np.flatnonzero(self._finite) if np.isnan(values[i]).any()]
        self._game.warn(f"{name} has no value", lost, len(values))
        return values

    def _require(self) -> None:
        """TaskError where the whole adapter has no value."""
        source = self._game.evaluator.adapter.source
        if not self._finite[self._full]:
            raise TaskError(f"{source}: its loss is not finite with everything on")
        for name, values in self._values.items():
            if np.isnan(values[self._full]).any():
                raise TaskError(f"{source}: {name} has no value with everything on")

    def _averaged(self, metric: str, k: int) -> tuple[Floats, Floats]:
        """Of the keep-sets of a size: means over the sets, by example, and means over the examples, by set."""
        values = self._values[metric][self._by_size[k]]
        return values.mean(0), values.mean(1)

    def _farthest(self, metric: str) -> float:
        """The largest difference between two keep-sets of one size; if there is none, between any two."""
        means = [self._values[metric][indices].mean(1) for indices in self._by_size.values()]
        within = max((float(np.ptp(of_size)) for of_size in means), default=0.0)
        return within or (float(np.ptp(np.concatenate(means))) if means else 0.0)

    def _error(self, metric: str, k: int) -> float:
        """Standard error of the mean over the keep-sets of a size that comes from not having all of them.

        Drawing m of N without replacement: se² = s²/m · (1 − m/N).
        """
        means, of = self._moments[metric, k][1], math.comb(self._game.n_players, k)
        if len(means) < 2 or self._whole(k):
            return 0.0
        return float(mean_and_error(means[:, None], self._reach[metric])[1][0]) * math.sqrt(1 - len(means) / of)

    def _whole(self, k: int) -> bool:
        return len(self._by_size[k]) == math.comb(self._game.n_players, k)

    def _row(self, family: str, label: str, share: float, indices: list[int], *, exhaustive: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"family": family, "label": label, "share": share, "sets": len(indices)}
        row["exhaustive"] = exhaustive
        size = math.comb(self._game.n_players, round(share * self._game.n_players))
        for metric in self.metrics:
            values = self._values[metric][indices]
            means = values.mean(1)
            by_sets = 0.0 if exhaustive else half_width(means, reach=self._reach[metric], of=size)
            row |= self._interval(metric, values.mean(0), by_sets)
            row[f"{metric}_spread"] = float(means.std(ddof=1)) if len(means) > 1 else 0.0
            row |= self._worst(metric, dict(zip(indices, means.tolist(), strict=True)))
        return row

    def _worst(self, metric: str, means: Mapping[int, float]) -> dict[str, Any]:
        """Of keep-sets and their values, the worst one's: the least where more is better, and else the largest."""
        worst = (min if self.metrics[metric].higher else max)(means, key=means.__getitem__)
        return {f"{metric}_worst": means[worst], f"{metric}_worst_set": self._names[worst]}

    def _p_row(self, p: float) -> dict[str, Any]:
        """The keep-sets of all sizes k as strata of weight w_k = P(k of G on): a mean over sizes of means over sets.

        Mean over sets: μ = Σ_k w_k μ_k. Its variance that comes from the choice of sets: Σ_k w_k² se_k². The variance
        of a set's value among sets as p draws them: Σ_k w_k (σ_k² + μ_k²) − μ², with σ_k² of all N_k sets of the size,
        (N_k − 1)/N_k times the unbiased estimate from a sample.
        """
        weights = self._weights(p)
        row: dict[str, Any] = {"family": "p", "label": f"{p:g}", "share": p, "sets": self._sampled}
        row["exhaustive"] = self._enumerated
        for metric in self.metrics:
            mean, variance = np.zeros(self._game.evaluator.examples), 0.0
            strata: list[tuple[float, int]] = []  # variance of a size's share, and its keep-sets
            possible: dict[int, float] = {}
            for k in weights:
                by_example, means = self._moments[metric, k]
                mean = mean + weights[k] * by_example
                of = math.comb(self._game.n_players, k)
                inside = float(means.var(ddof=1)) * (of - 1) / of if len(means) > 1 else 0.0
                variance += weights[k] * (inside + float(means.mean()) ** 2)
                strata.append(((weights[k] * self._error(metric, k)) ** 2, len(means)))
                if weights[k] > 0:
                    possible |= dict(zip(self._by_size[k], means.tolist(), strict=True))
            row |= self._interval(metric, mean, half_of_strata(strata))
            row[f"{metric}_spread"] = math.sqrt(max(0.0, variance - float(mean.mean()) ** 2))
            row |= self._worst(metric, possible)
        return row

    def _weights(self, p: float) -> dict[int, float]:
        """Probability of each size at p, of those of which there is a keep-set: w_k = B(k; G, p) / Σ_j B(j; G, p)."""
        chances = binomial(self._game.n_players, p)
        sizes = sorted(self._by_size)
        return {k: float(chances[k] / chances[sizes].sum()) for k in sizes}

    def _epsilon(self, family: str, name: str, indices: Sequence[int], whole: bool) -> dict[str, Any]:
        """max over the family of how much worse than the whole adapter; of a sample, a lower bound of the family's."""
        metric, among = self.metrics[name], [self._full, *indices]
        columns = {each: np.stack([self._columns[i][each] for i in among]) for each in metric.needs}
        bad = sampled(metric, metric.parts(columns), self._seed, worse=True)
        value, low, high = bad.largest(lambda L: L[1:] - L[0])
        worst = indices[int((bad.means[1:] - bad.means[0]).argmax())]
        self.by_example["epsilon"].append(self._values[name][worst] - self._values[name][self._full])
        return {
            "family": family,
            "metric": name,
            "value": value,
            "low": low,
            "high": high,
            "worst_set": self._names[worst],
            "sets": len(indices),
            "lower_bound": not whole,
        }

    def _interval(self, name: str, values: Floats, by_sets: float) -> dict[str, float]:
        if name == next(iter(self.metrics)):
            self.by_example["rows"].append(values)
        first = self.metrics[name].parts(self._columns[self._full])[0]
        return _interval(name, self.metrics[name], first, values, by_sets)

    def _strata(self) -> dict[int, Stratum]:
        """What the keep-sets of each size say of the progressive-optimisation inequality; nothing of a language model.

        Its logits, a vocabulary for every token, are not kept.
        """
        if not self._game.evaluator.task.classifies:
            return {}
        labels, n = self._game.evaluator.labels, self._game.n_players
        sizes: dict[int, list[npt.NDArray[np.float32]]] = {}
        for i in range(self._sampled):
            if self._finite[i]:
                sizes.setdefault(int(self._size[i]), []).append(_logits(self._scores[i]))
        return {k: stratum(logits, labels, math.comb(n, k)) for k, logits in sizes.items()}


def _logits(scores: Scores) -> npt.NDArray[np.float32]:
    assert scores.logits is not None
    return scores.logits


def _interval(name: str, metric: Metric, part: Column, values: Floats, by_sets: float) -> dict[str, float]:
    """The mean of the numbers of the examples and the ends of its interval, which the choice of sets widens.

    `part` tells whether they are outcomes from 0 to 1, in which the interval stays; a loss in nats is not negative.
    """
    value, half, outcomes = float(values.mean()), half_width(values), metric.of_outcomes(part)
    low, high = proportion(values)[1:] if outcomes else (value - half, value + half)
    low, high = value - math.hypot(value - low, by_sets), value + math.hypot(high - value, by_sets)
    if not math.isnan(value):
        if outcomes or (metric.unit == "nats" and not metric.higher):
            low = min(value, max(0.0, low))
        high = min(1.0, high) if outcomes else high
    return cells(name, (value, low, high))
