"""The game on an adapter with gates: what gradients say of every player along the line of equal gates."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.game import Game
from lora_lab.errors import DivergedError, OptionError, TunerError
from lora_lab.results.stats import Floats
from lora_lab.scoring.execution import Cost
from lora_lab.scoring.gates import PASSES, SMOOTH, GatedPass


class GatedGame(Game):
    """A game whose players have gates, too (see `games.gates.Gated`)."""

    nodes: int = 0
    """Passes with gradients that were made, each over all examples."""
    values: Floats | None = None
    """Aumann–Shapley values of what was asked along the gates last, [n]."""
    by_example: Floats | None = None
    """The same on each example, [n, examples]; None where a layer's rows are not the examples."""

    def along(
        self, gates: Floats, shares: Floats, *, temperature: float = 2.0, batch: int = 0
    ) -> tuple[Floats, Floats, Floats]:
        """Worths [m] and slopes [m, n] with all gates at each of these values, and the worths at 0 and 1.

        A forward and a backward pass a gate, whatever the number of players; the accuracy is smoothed (see
        `scoring.gates.SMOOTH`), so that its ends take two passes without gradients. DivergedError where a worth is not
        finite.
        """
        units = tuple(self.players.units.values())
        passes = [GatedPass(units, float(gate), self.worth, temperature, batch) for gate in gates]
        smoothed = SMOOTH[self.worth].stands_in
        if smoothed:
            passes += [GatedPass(units, gate, self.worth, temperature, batch, slopes=False) for gate in (0.0, 1.0)]
        answers = self.evaluator.gather(passes)
        for asked, (worths, slopes, _) in zip(passes, answers, strict=True):
            if not (np.isfinite(worths).all() and np.isfinite(slopes).all()):
                label = self.evaluator.adapter.label
                raise DivergedError(
                    f"{label}: the {self.worth} or its gradient is not finite with gates of {asked.gate:g}"
                )
        inner = answers[: len(gates)]
        slopes = np.array([found.mean(0, dtype=np.float64) for _, found, _ in inner])
        self.nodes += len(gates)
        self.values, self.by_example = shares @ slopes, None
        if all(apart for *_, apart in inner):
            self.by_example = sum(share * found.T for share, (_, found, _) in zip(shares, inner, strict=True))
        worths = np.array([found.mean() for found, *_ in inner])
        ends = np.array([found.mean() for found, *_ in answers[len(gates) :]])
        return worths, slopes, ends if smoothed else self(np.array([[False] * len(units), [True] * len(units)]))

    def cost_along(self, gates: int) -> Cost:
        """What asking along so many gates would compute, in passes without gradients."""
        passes = PASSES * gates + 2 * SMOOTH[self.worth].stands_in
        blocks = round(passes * self.evaluator.layout.blocks * self.evaluator.batches)
        return Cost(round(passes), blocks, blocks, self.evaluator.seconds(passes))


def check(adapter: Adapter, worth: str) -> None:
    """TunerError where a gate means nothing for this adapter, OptionError for a worth that has no gradient."""
    if worth not in SMOOTH:
        raise OptionError(f"the worth {worth} has no gradient for gates; there are: {', '.join(SMOOTH)}")
    for name, site in adapter.sites.items():
        if site.scale is None:
            raise TunerError(f"{adapter.source}: {adapter.tuner} has no scale ({name}), so a gate means nothing")


def summed_up(game: GatedGame, values: Floats, total: float) -> dict[str, Any]:
    """How far the values from gradients alone are from efficient, and from the values given."""
    assert game.values is not None
    difference = np.abs(game.values - values)
    return {
        "passes": game.nodes,
        "efficiency_gap": abs(float(game.values.sum()) - total),
        "largest": float(difference.max()),
        "player": game.player_names[int(difference.argmax())],
    }
