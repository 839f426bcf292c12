"""What the keep-sets of one adapter came to: means over families of them with intervals, the worst one, ε."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.analysis.game import Game
from lora_lab.errors import TaskError
from lora_lab.games.coalitions import Bools
from lora_lab.games.progressive import Stratum, binomial, inequality, stratum
from lora_lab.results.stats import Floats, Sampled, half_of_strata, half_width, mean_and_error, proportion
from lora_lab.tasks.task import Scores

METRICS = ("loss", "error")


class KeepSetScores:
    """The scores of one adapter's keep-sets, with or without rescaling."""

    def __init__(self, game: Game, sets: Bools, fixed: Mapping[str, list[str]], seed: int) -> None:
        n = game.n_players
        ends = np.concatenate([~np.eye(n, dtype=np.bool_), np.eye(n, dtype=np.bool_)])
        drawn = {row.tobytes() for row in sets}
        self._game, self._seed = game, seed
        self._sampled = len(sets)
        added = np.array([row for row in ends if row.tobytes() not in drawn]).reshape(-1, n)
        self._sets = np.concatenate([sets, added])
        self._scores = game.scores(self._sets, logits=game.evaluator.task.classifies)
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
            raise TaskError(f"{game.evaluator.adapter.source}: its loss is not finite with everything on")

    def rows(self, grid: Sequence[float]) -> list[dict[str, Any]]:
        """One row for every family of keep-sets."""
        n = self._game.n_players
        sizes = sorted(self._by_size.items())
        rows = [self._row("k-of-G", str(k), k / n, indices, exhaustive=self._whole(k)) for k, indices in sizes]
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
            self._epsilon(family, metric, [self._scores[i] for i in indices], [self._name(i) for i in indices], whole)
            for family, (indices, whole) in families.items()
            if indices
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
        evaluator = self._game.evaluator
        shares = [len(kept) / len(evaluator.names) for kept in fixed.values()]
        masks = [
            evaluator.keeping(kept, 1 / share if self._game.rescale else 1.0)
            for kept, share in zip(fixed.values(), shares, strict=True)
        ]
        return dict(zip(fixed, zip(shares, evaluator.scores(masks), strict=True), strict=True))

    def _averaged(self, metric: str, k: int) -> tuple[Floats, Floats]:
        """Of the keep-sets of a size: means over the sets, by example, and means over the examples, by set."""
        values = np.stack([_values(self._scores[i], metric) for i in self._by_size[k]])
        return values.mean(0), values.mean(1)

    def _farthest(self, metric: str) -> float:
        """The largest difference between two keep-sets of one size; if there is none, between any two."""
        means = {
            k: [float(_values(self._scores[i], metric).mean()) for i in indices] for k, indices in self._by_size.items()
        }
        within = max((max(of_size) - min(of_size) for of_size in means.values()), default=0.0)
        every = [mean for of_size in means.values() for mean in of_size]
        return within or (max(every) - min(every) if every else 0.0)

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

    def _name(self, i: int) -> str:
        return self._game.name_of(self._sets[i])

    def _row(self, family: str, label: str, share: float, indices: list[int], *, exhaustive: bool) -> dict[str, Any]:
        scores, names = [self._scores[i] for i in indices], [self._name(i) for i in indices]
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
        """The keep-sets of all sizes k as strata of weight w_k = P(k of G on): a mean over sizes of means over sets.

        Mean over sets: μ = Σ_k w_k μ_k. Its variance that comes from the choice of sets: Σ_k w_k² se_k². The variance
        of a set's value among sets as p draws them: Σ_k w_k (σ_k² + μ_k²) − μ², with σ_k² of all N_k sets of the size,
        (N_k − 1)/N_k times the unbiased estimate from a sample.
        """
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
                inside = float(means.var(ddof=1)) * (of - 1) / of if len(means) > 1 else 0.0
                variance += weights[k] * (inside + float(means.mean()) ** 2)
                sampled.append(((weights[k] * self._error(metric, k)) ** 2, len(means)))
                if weights[k] > 0 and means.max() > worst:
                    worst, worst_set = float(means.max()), self._name(self._by_size[k][int(means.argmax())])
            row |= _interval(metric, mean, half_of_strata(sampled))
            row[f"{metric}_spread"] = math.sqrt(max(0.0, variance - float(mean.mean()) ** 2))
            row[f"{metric}_worst"], row[f"{metric}_worst_set"] = worst, worst_set
        return row

    def _weights(self, p: float) -> dict[int, float]:
        """Probability of each size at p, of those of which there is a keep-set: w_k = B(k; G, p) / Σ_j B(j; G, p)."""
        chances = binomial(self._game.n_players, p)
        sizes = sorted(self._by_size)
        return {k: float(chances[k] / chances[sizes].sum()) for k in sizes}

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
        if not self._game.evaluator.task.classifies:
            return {}
        labels, n = self._game.evaluator.labels, self._game.n_players
        return {
            k: stratum([_logits(self._scores[i]) for i in indices], labels, math.comb(n, k))
            for k, indices in self._by_size.items()
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
