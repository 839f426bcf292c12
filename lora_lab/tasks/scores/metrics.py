"""Metrics by name: numbers of a whole split, as functions of means over its examples, so that all have an interval.

A metric is never averaged over batches. F1, a correlation or a perplexity is no mean of examples, but a function of
means of columns that are (its sufficient statistics): so a bootstrap over examples resamples any of them in one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.errors import TaskError, shorten
from lora_lab.registry import Registry
from lora_lab.results.stats import Sampled, interval, proportion
from lora_lab.tasks.scores import calibration

Column = npt.NDArray[Any]
"""One value an example: [n], or of several models [models, n]."""
Floats = npt.NDArray[np.float64]


def _as_they_are(*columns: Column) -> Sequence[Column]:
    return columns


def _the_mean(mean: Floats) -> Floats:
    return mean


@dataclass(frozen=True)
class Metric:
    """A number of a split: g(mean of each sufficient column)."""

    about: str
    needs: tuple[str, ...]
    """The columns of scores that it is made of."""
    of: Callable[..., Floats]
    """Means of the sufficient columns, each [k] → the metric, [k]."""
    sufficient: Callable[..., Sequence[Column]] = _as_they_are
    """The columns that it needs, each [..., examples] of a whole split → those whose means it is a function of.

    Of several models at once the examples are the last axis, so that labels can be those of all models together.
    """
    higher: bool = True
    """Whether more is better."""
    unit: str = "share"
    share: bool = False
    """Whether it is the mean of outcomes from 0 to 1; its interval is then Wilson's."""
    least: int = 1
    """Examples without which it has no value."""
    on_request: bool = False
    """Whether it is told only where it is asked for by name."""
    null: Callable[..., Floats] | None = None
    """(The columns that it needs, seed) → its values of models without what it measures; None where these have 0."""

    @property
    def is_mean(self) -> bool:
        """Whether it is the plain mean of one column, so that every example has a value of its own."""
        return self.share or (self.of is _the_mean and self.sufficient is _as_they_are)

    def of_outcomes(self, part: Column) -> bool:
        """Whether it is the mean of outcomes from 0 to 1, of which `part` are some."""
        return self.share or (self.is_mean and part.dtype == np.bool_)

    def value(self, columns: Mapping[str, Column]) -> float:
        """Its value alone; NaN where it has none. TaskError as of `estimate`."""
        means = [np.atleast_1d(part.mean()) for part in self.parts(columns)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(self.of(*means)[0])

    def estimate(self, columns: Mapping[str, Column], *, seed: int) -> tuple[float, float, float]:
        """Its value, and the ends of its 95 % interval over the examples (bootstrap); NaN where it has none.

        TaskError where the scores lack a column, or there are too few examples.
        """
        parts = self.parts(columns)
        if self.of_outcomes(parts[0]):
            return proportion(parts[0])
        values = np.stack([part.astype(np.float64) for part in parts])
        with np.errstate(invalid="ignore", divide="ignore"):
            return Sampled.of(values, seed=seed).estimate(lambda means: self.of(*means))

    def without(self, columns: Mapping[str, Column], *, seed: int) -> tuple[float, float, float]:
        """Mean of its `null`, and the ends of the middle 95 %."""
        assert self.null is not None
        drawn = self.null(*(columns[name] for name in self.needs), seed=seed)
        return float(drawn.mean()), *interval(drawn)

    def influence(self, columns: Mapping[str, Column]) -> Floats:
        """One number an example, [n], whose mean is the metric's value and whose spread tells the value's error.

        With g the metric and x_i its sufficient columns, of mean m,

            ψ_i = g(m) + ∇g(m)·(x_i − m),

        so that sums and differences of metrics have columns of their own, and the variance of a column's mean is that
        of the delta method (the infinitesimal jackknife, Jaeckel 1972). Of a mean, ψ is the column itself. All NaN
        where the metric has no value. Spearman's ranks are those of the split, as if an example moved no other's.
        TaskError as of `estimate`.

        Intervals of 95 % by Student's t, simulated, hold the truth in .92 to .96 of the cases from 50 examples on and
        in .87 to .93 of 20; but of F1 of a label that only 5 % of the examples have in .91 of 200, .63 of 50 and .23
        of 20, where often none is found, which says nothing of how many there might be.
        """
        return self.influence_of(self.parts(columns))

    def influence_of(self, given: Sequence[Column]) -> Floats:
        """The same from its sufficient columns."""
        if self.is_mean:
            return given[0].astype(np.float64)
        parts = np.stack([part.astype(np.float64) for part in given])
        means = parts.mean(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(self.of(*means)[0])
            if not math.isfinite(value):
                return np.full(parts.shape[1], math.nan)
            slopes = _gradient(self.of, means[:, 0], parts.std(1) / math.sqrt(parts.shape[1]))
        linear: Floats = value + slopes @ (parts - means)
        return linear

    def require(self, examples: int) -> None:
        """TaskError where it has no value on so few examples."""
        if examples < self.least:
            raise TaskError(f"{examples} examples; {self.about} needs {self.least} or more")

    def parts(self, columns: Mapping[str, Column]) -> list[Column]:
        """Its sufficient columns, each [..., examples]; TaskError where they are not to be had."""
        absent = [name for name in self.needs if name not in columns]
        if absent:
            raise TaskError(f"no {absent[0]!r} among the scores: {shorten(columns, 12)}; the metric needs it")
        given = [columns[name] for name in self.needs]
        shape = given[0].shape
        self.require(shape[-1])
        parts = [np.asarray(part) for part in self.sufficient(*given)]
        odd = [list(part.shape) for part in parts if part.shape != shape]
        if odd or not parts:
            made = f"columns of shape {odd[0]}" if odd else "no columns"
            raise TaskError(f"`sufficient` of {self.about!r} gave {made} of ones of {list(shape)}; the same is needed")
        return parts


def mean_of(column: str, about: str | None = None, **more: Any) -> Metric:
    """The plain mean of a column."""
    return Metric(about or f"mean of {column}", (column,), _the_mean, **{"unit": "", **more})


def _gradient(of: Callable[..., Floats], means: Floats, errors: Floats) -> Floats:
    """∇g at the means [p], by differences of fourth order: (8(g(h) − g(−h)) − (g(2h) − g(−2h))) / 12h each.

    A step h is a thousandth of the mean's standard error, which is at most the mean of what is not negative: so no step
    leaves where g is defined. What is constant is left out, as it tells no example from another.
    """
    steps = 1e-3 * errors
    moved = np.flatnonzero(errors > 1e-12 * np.abs(means))
    gradient = np.zeros(len(means))
    if len(moved):
        # [p, 4 places of each column that moves]
        places = np.repeat(means[:, None], 4 * len(moved), axis=1)
        for k, j in enumerate(moved):
            places[j, 4 * k : 4 * k + 4] += steps[j] * np.array([1, -1, 2, -2])
        up, down, up2, down2 = of(*places).reshape(-1, 4).T
        gradient[moved] = (8 * (up - down) - (up2 - down2)) / (12 * steps[moved])
    return gradient


def _moments(x: Column, y: Column) -> list[Column]:
    """What a correlation is a function of; both columns centred, which changes nothing and loses no digits."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return [x, y, x * x, y * y, x * y]


def _correlation(x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    """cov(x, y) / √(var x · var y)."""
    spread: Floats = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
    found: Floats = np.divide(xy - x * y, spread, out=np.full_like(spread, math.nan), where=spread > 0)
    return found


def _ranks(prediction: Column, target: Column) -> list[Column]:
    """Moments of ranks; these are of the whole split, also in its resamples."""
    from scipy.stats import rankdata

    return _moments(rankdata(prediction, axis=-1), rankdata(target, axis=-1))


def _hits(prediction: Column, target: Column) -> list[Column]:
    """True positives, false positives, false negatives; positive is 1."""
    said, is_so = prediction == 1, target == 1
    return [said & is_so, said & ~is_so, ~said & is_so]


def _f1(hits: Floats, false: Floats, missed: Floats) -> Floats:
    """2·TP / (2·TP + FP + FN)."""
    whole = 2 * hits + false + missed
    found: Floats = np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0)
    return found


def _labels(prediction: Column, target: Column) -> list[Column]:
    """Whether they agree, then for each label whether it is predicted, and whether it is right."""
    labels = np.union1d(prediction, target)
    return [prediction == target, *(prediction == label for label in labels), *(target == label for label in labels)]


def _matthews(agree: Floats, *shares: Floats) -> Floats:
    """(c − Σ p_k t_k) / √((1 − Σ p_k²)(1 − Σ t_k²)), 0 where all labels are one (Gorodkin 2004)."""
    said, is_so = np.stack(shares[: len(shares) // 2]), np.stack(shares[len(shares) // 2 :])
    spread: Floats = np.sqrt(np.maximum(1 - (said**2).sum(0), 0) * np.maximum(1 - (is_so**2).sum(0), 0))
    above = agree - (said * is_so).sum(0)
    found: Floats = np.divide(above, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return found


def _ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, 0 of nothing."""
    found: Floats = np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
    return found


def _over_tokens(mean: Column, tokens: Column) -> Sequence[Column]:
    """Means of examples' tokens as sums over them, and how many these are."""
    return mean * tokens, tokens


def _errors(prediction: Column, target: Column) -> list[Column]:
    """The squared error, and first and second moment of the target, which is centred to lose no digits."""
    centred = target - target.mean(-1, keepdims=True)
    return [(prediction - target) ** 2, centred, centred**2]


def _explained(error: Floats, y: Floats, yy: Floats) -> Floats:
    """1 − Σ(ŷ − y)² / Σ(y − ȳ)²."""
    spread = yy - y * y
    found: Floats = 1 - np.divide(error, spread, out=np.full_like(spread, math.nan), where=spread > 0)
    return found


def averaged(metric: Metric, needs: Sequence[Sequence[str]], about: str) -> Metric:
    """The mean of a metric over several groups of columns, such as those of every output or label."""
    names = tuple(dict.fromkeys(name for group in needs for name in group))
    places = [[names.index(name) for name in group] for group in needs]

    def sufficient(*columns: Column) -> list[Column]:
        return [part for group in places for part in metric.sufficient(*(columns[i] for i in group))]

    def of(*means: Floats) -> Floats:
        size = len(means) // len(places)
        each = [metric.of(*means[start : start + size]) for start in range(0, len(means), size)]
        mean: Floats = np.mean(each, axis=0)
        return mean

    return replace(metric, about=about, needs=names, sufficient=sufficient, of=of, share=False)


_PAIR = ("prediction", "target")
_ECE = Metric(
    f"calibration error: mean |accuracy − confidence| over {calibration.BINS} bins of equal mass",
    ("confidence", "correct"),
    calibration.calibration_error,
    calibration.gaps,
    higher=False,
    least=calibration.BINS,
    on_request=True,
    null=calibration.errors_if_calibrated,
)

METRICS = Registry(
    "metric",
    "lora_lab.metrics",
    Metric,
    {
        "loss": mean_of("loss", "mean loss of an example", higher=False, unit="nats"),
        "accuracy": mean_of("correct", "share of examples that are right", unit="share", share=True),
        "token_accuracy": mean_of(
            "correct", "mean over texts of the share of tokens that are predicted right", unit="share", share=True
        ),
        "perplexity": Metric(
            "exp of the mean loss over all tokens, so that a long text counts for more than a short one",
            ("loss", "tokens"),
            lambda loss, tokens: np.exp(loss / tokens),
            _over_tokens,
            higher=False,
            unit="",
        ),
        "acc": mean_of("acc", "the option of the highest log-likelihood is right", unit="share", share=True),
        "acc_norm": mean_of("acc_norm", "the same per character of the option", unit="share", share=True),
        "acc_bytes": mean_of("acc_bytes", "the same per byte of the option", unit="share", share=True),
        "exact_match": mean_of("exact_match", "share of answers that are as they should be", unit="share", share=True),
        "unextracted": mean_of(
            "unextracted", "share of answers in which none was found", higher=False, unit="share", share=True
        ),
        "unfinished": mean_of(
            "unfinished", "share of answers that came to no end", higher=False, unit="share", share=True
        ),
        "rouge1": mean_of("rouge1", "mean ROUGE-1 of an answer (F, rouge-score)", unit="share"),
        "rouge2": mean_of("rouge2", "mean ROUGE-2 of an answer (F, rouge-score)", unit="share"),
        "rougeL": mean_of("rougeL", "mean ROUGE-L of an answer (F, rouge-score)", unit="share"),
        "won": mean_of(
            "correct", "share of pairs whose chosen answer has the higher log-likelihood", unit="share", share=True
        ),
        "won_per_token": mean_of("won_per_token", "the same of the log-likelihood per token", unit="share", share=True),
        "won_by_reward": mean_of(
            "won_by_reward", "share of pairs whose chosen answer has the higher reward by DPO", unit="share", share=True
        ),
        "margin": mean_of("margin", "mean of the right answer's margin over the best other", unit="nats"),
        "reward_margin": mean_of(
            "reward_margin", "mean reward by DPO of the chosen answer over the other", unit="nats"
        ),
        "rmse": Metric(
            "root of the mean squared error",
            _PAIR,
            lambda square: np.sqrt(square),
            lambda prediction, target: [(prediction - target) ** 2],
            higher=False,
            unit="",
        ),
        "pearson": Metric("Pearson's correlation", _PAIR, _correlation, _moments, unit="", least=2),
        "spearman": Metric("Spearman's correlation of ranks", _PAIR, _correlation, _ranks, unit="", least=2),
        "r2": Metric(
            "share of the target's variance that is explained: 1 − Σ(ŷ − y)² / Σ(y − ȳ)²",
            _PAIR,
            _explained,
            _errors,
            unit="",
            least=2,
        ),
        "f1": Metric("F1 of label 1", _PAIR, _f1, _hits),
        "micro_f1": Metric("F1 over all pairs of an example and a label", ("hits", "false", "missed"), _f1),
        "subset_accuracy": mean_of(
            "correct", "share of examples all of whose labels are right", unit="share", share=True
        ),
        "span_f1": Metric(
            "F1 over spans, right where type, first and last word are (seqeval)",
            ("spans_correct", "spans_predicted", "spans_true"),
            lambda both, said, there: _ratio(2 * both, said + there),
        ),
        "span_precision": Metric(
            "share of the predicted spans that are right (seqeval)", ("spans_correct", "spans_predicted"), _ratio
        ),
        "span_recall": Metric(
            "share of the spans that are predicted (seqeval)", ("spans_correct", "spans_true"), _ratio
        ),
        "tag_accuracy": Metric("share of all words whose tag is right", ("correct", "tokens"), _ratio, _over_tokens),
        "tag_loss": Metric(
            "mean loss of all words", ("loss", "tokens"), _ratio, _over_tokens, higher=False, unit="nats"
        ),
        "answer_f1": mean_of(
            "answer_f1", "mean F1 of an answer's words and those of the best right one (SQuAD)", unit="share"
        ),
        "mcc": Metric("Matthews' correlation of labels", _PAIR, _matthews, _labels, unit=""),
        "brier": mean_of(
            "brier", "Brier score, the mean of Σ(p − y)² over the labels, 0 to 2", higher=False, on_request=True
        ),
        "ece": _ECE,
        "ece_by_reward": replace(
            _ECE, about=f"{_ECE.about} of the chance by DPO's rewards", needs=("confidence", "won_by_reward")
        ),
    },
)
"""Metrics by name; a task that gives the columns that one needs can name it."""
