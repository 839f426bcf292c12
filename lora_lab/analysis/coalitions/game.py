"""The game on an adapter: which of its parts are on, and what is the model worth then?

Dropout stability, structured pruning and Shapley values are three questions put to one `Game`. It is called as shapiq
calls games: coalitions bool [n, players] → worths float [n].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from lora_lab.adapters.groups import Players
from lora_lab.analysis.measured import of_logits
from lora_lab.errors import LoraLabWarning, OptionError, TunerError, shorten, unknown
from lora_lab.games.coalitions import Bools
from lora_lab.registry import Registry
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import LayerMask
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost
from lora_lab.scoring.layout import State
from lora_lab.tasks.scores.metrics import Metric
from lora_lab.tasks.task import Scores


def less_loss(scores: Scores) -> Floats:
    """Minus the loss of each example; in classification the log-likelihood of the right label."""
    return -scores.loss


def margin(scores: Scores) -> Floats:
    """How far each example's right answer is ahead of the best other one, in nats."""
    return scores.margin


WORTHS: Registry[Callable[[Scores], Floats]] = Registry(
    "worth",
    "lora_lab.worths",
    None,
    {
        "loss": less_loss,
        "log-likelihood": less_loss,
        "margin": margin,
    },
)
"""Name → worth of each example, signed so that what helps is positive; every metric of a task is a worth besides."""


class Game:
    """Players of an adapter and the worth of their coalitions: bool [n, players] → float [n].

    The worth is a metric of the task (the main one by default), with a minus where less is better, or one of WORTHS;
    OptionError for another name. Modules of no player are always on, and so are heads. With `rescale` the updates of a
    coalition of k of n players are multiplied by n/k. A worth is NaN where the loss is not finite or the metric has no
    value, and a warning names the coalition; the others keep theirs.
    """

    def __init__(
        self, evaluator: Evaluator, players: Players, *, worth: str | None = None, rescale: bool = False
    ) -> None:
        if rescale and not evaluator.adapter.scalable:
            raise TunerError(f"{evaluator.adapter.source}: {evaluator.adapter.tuner} has no scale to multiply")
        self.evaluator, self.players, self.rescale = evaluator, players, rescale
        self.n_players = len(players)
        self.player_names = players.names
        self._asked = worth
        if evaluator.task.metrics:
            _ = self.worth  # or the error

    @cached_property
    def worth(self) -> str:
        """Its name."""
        task = self.evaluator.task
        if not task.metrics:  # one of the user's own may know its columns only after a scoring
            (whole,) = self.evaluator.scores([self.mask(np.ones(self.n_players, np.bool_))])
            task.columns(whole, self.evaluator.data)
        name = self._asked or task.metrics[0]
        if name not in task.metrics and name not in WORTHS:
            raise unknown(f"worth of task {task.name}:", name, list(dict.fromkeys([*task.metrics, *WORTHS])))
        return name

    @property
    def metric(self) -> Metric | None:
        """The metric of the task that it is, if it is one."""
        task = self.evaluator.task
        return task.metric(self.worth) if self.worth in task.metrics else None

    def __call__(self, coalitions: Bools) -> Floats:
        """Worth of each coalition."""
        means: Floats = self.per_example(coalitions).mean(1)
        return means

    def per_example(self, coalitions: Bools) -> Floats:
        """For each coalition numbers of the examples whose mean is its worth, [n, examples]; NaN where it has none.

        Of a metric that is no mean of examples, these are `Metric.influence`.
        """
        rows = np.atleast_2d(coalitions)
        scores = self.scores(rows, logits=self._reads_logits)
        values = np.stack([_finite(self._values(s), s) for s in scores])
        lost = [i for i, s in enumerate(scores) if np.isnan(values[i]).any() and loss_is_finite(s).all()]
        self.warn(f"{self.worth} has no value", [self.name_of(rows[i]) for i in lost], len(rows))
        return values

    def scores(self, coalitions: Bools, *, logits: bool = False) -> list[Scores]:
        """Scores of each coalition; those whose loss is not finite are named in a warning."""
        rows = np.atleast_2d(coalitions)
        scores = self.evaluator.scores([self.mask(row) for row in rows], logits=logits)
        bad = [self.name_of(row) for row, s in zip(rows, scores, strict=True) if not loss_is_finite(s).all()]
        self.warn("the loss is not finite", bad, len(scores))
        return scores

    def cost(self, coalitions: Bools, *, logits: bool = False) -> Cost:
        """What calling the game with these coalitions would compute."""
        masks = [self.mask(row) for row in np.atleast_2d(coalitions)]
        return self.evaluator.cost(masks, logits=logits or self._reads_logits)

    def blocks(self, coalitions: Bools) -> int:
        """Block evaluations a batch for these coalitions, if nothing were known."""
        return self.evaluator.layout.cost([self.mask(row).states for row in coalitions])

    def mask(self, coalition: Bools) -> LayerMask:
        """The states that a coalition means."""
        if len(coalition) != self.n_players:
            raise OptionError(f"a coalition of {len(coalition)} places for {self.n_players} players")
        factor = self.n_players / max(1, int(coalition.sum())) if self.rescale else 1.0
        switched: dict[str, State] = {}
        ranks: dict[str, list[bool]] = {}
        for on, units in zip(coalition, self.players.units.values(), strict=True):
            for name, rank in units:
                if rank is None:
                    switched[name] = factor if on else 0.0
                else:
                    ranks.setdefault(name, []).append(bool(on))
        switched |= {name: _ranks(mask, factor) for name, mask in ranks.items()}
        return LayerMask(tuple(switched.get(name, 1.0) for name in self.evaluator.names))

    def name_of(self, coalition: Bools) -> str:
        """A coalition in words."""
        on = [name for name, is_on in zip(self.player_names, coalition, strict=True) if is_on]
        off = [name for name in self.player_names if name not in on]
        if not on or not off:
            return "no player" if off else "all players"
        return shorten(on, 6) if len(on) <= len(off) else f"all but {shorten(off, 6)}"

    @property
    def _reads_logits(self) -> bool:
        """Whether the worth is made of columns that the task makes of logits."""
        return self.metric is not None and of_logits(self.evaluator.task, [self.worth])

    def _values(self, scores: Scores) -> Floats:
        """Numbers of the examples whose mean is the worth."""
        if self.metric is None:
            return WORTHS[self.worth](scores)
        values = self.metric.influence(self.evaluator.task.columns(scores, self.evaluator.data))
        return values if self.metric.higher else -values

    def warn(self, why: str, coalitions: Sequence[str], of: int) -> None:
        """Name the coalitions that are left out and say why; nothing of none."""
        if coalitions:
            label, shown = self.evaluator.adapter.label, "; ".join(coalitions[:3])
            text = f"{label}: {why} for {len(coalitions)} of {of} coalitions, which are left out: {shown}"
            warnings.warn(text, LoraLabWarning, stacklevel=4)


def loss_is_finite(scores: Scores) -> Bools:
    """Of each example; of a task without a loss, all are."""
    found: Bools = np.isfinite(scores.columns.get("loss", np.zeros(len(scores))))
    return found


def _finite(worth: Floats, scores: Scores) -> Floats:
    return np.where(loss_is_finite(scores), worth, np.nan)


def _ranks(mask: Sequence[bool], factor: float) -> State:
    if all(mask) or not any(mask):
        return factor if all(mask) else 0.0
    return tuple(factor if on else 0.0 for on in mask)
