"""The game on an adapter: which of its parts are on, and what is the model worth then?

Dropout stability, structured pruning and Shapley values are three questions put to one `Game`. It is called as shapiq
calls games: coalitions bool [n, players] → worths float [n].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from lora_lab.adapters.groups import Players
from lora_lab.errors import LoraLabWarning, OptionError, TunerError, shorten
from lora_lab.games.coalitions import Bools
from lora_lab.registry import Registry
from lora_lab.results.stats import Floats
from lora_lab.scoring.changes import LayerMask
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost
from lora_lab.scoring.prefixes import State
from lora_lab.tasks.task import Scores

WORTHS: Registry[Callable[[Scores], Floats]] = Registry(
    "worth",
    "lora_lab.worths",
    None,
    {
        "accuracy": lambda scores: scores.correct.astype(np.float64),
        "loss": lambda scores: -scores.loss,
        "log-likelihood": lambda scores: -scores.loss,
        "margin": lambda scores: scores.margin,
    },
)
"""Name → worth of each example, signed so that what helps is positive.

In classification the loss is the negative log-likelihood of the right label, so that the two are one number here.
"""


class Game:
    """Players of an adapter and the worth of their coalitions: bool [n, players] → float [n], a mean over examples.

    Modules of no player are always on, and so are heads. With `rescale` the updates of a coalition of k of n players
    are multiplied by n/k. A worth is NaN where the loss is not finite, and a warning names the coalition; the others
    keep theirs.
    """

    def __init__(
        self, evaluator: Evaluator, players: Players, *, worth: str = "accuracy", rescale: bool = False
    ) -> None:
        _ = WORTHS[worth]
        if rescale and not evaluator.adapter.scalable:
            raise TunerError(f"{evaluator.adapter.source}: {evaluator.adapter.tuner} has no scale to multiply")
        self.evaluator, self.players, self.worth, self.rescale = evaluator, players, worth, rescale
        self.n_players = len(players)
        self.player_names = players.names

    def __call__(self, coalitions: Bools) -> Floats:
        """Worth of each coalition."""
        means: Floats = self.per_example(coalitions).mean(1)
        return means

    def per_example(self, coalitions: Bools) -> Floats:
        """Worth of each coalition on each example, [n, examples]; NaN where the loss is not finite."""
        return np.stack([_finite(WORTHS[self.worth](s), s) for s in self.scores(coalitions)])

    def scores(self, coalitions: Bools, *, logits: bool = False) -> list[Scores]:
        """Scores of each coalition; those whose loss is not finite are named in a warning."""
        rows = np.atleast_2d(coalitions)
        scores = self.evaluator.scores([self.mask(row) for row in rows], logits=logits)
        bad = [self.name_of(row) for row, s in zip(rows, scores, strict=True) if not np.isfinite(s.loss).all()]
        if bad:
            label = self.evaluator.adapter.label
            warnings.warn(
                f"{label}: the loss is not finite for {len(bad)} of {len(scores)} coalitions, "
                f"which are left out: {'; '.join(bad[:3])}",
                LoraLabWarning,
                stacklevel=3,
            )
        return scores

    def cost(self, coalitions: Bools, *, logits: bool = False) -> Cost:
        """What calling the game with these coalitions would compute."""
        return self.evaluator.cost([self.mask(row) for row in np.atleast_2d(coalitions)], logits=logits)

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


def _finite(worth: Floats, scores: Scores) -> Floats:
    return np.where(np.isfinite(scores.loss), worth, np.nan)


def _ranks(mask: Sequence[bool], factor: float) -> State:
    if all(mask) or not any(mask):
        return factor if all(mask) else 0.0
    return tuple(factor if on else 0.0 for on in mask)
