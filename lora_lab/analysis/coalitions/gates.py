"""The game on an adapter with gates: what gradients say of every player along the line of equal gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.coalitions.game import Game
from lora_lab.errors import DivergedError, OptionError, TunerError
from lora_lab.games.gates import Diagonal, Rows
from lora_lab.results.stats import Floats
from lora_lab.scoring.execution import Cost
from lora_lab.scoring.gates import PASSES, SMOOTH, GatedPass, MeasuredPass, Passed, PlacesOfGates


class GatedGame(Game):
    """A game whose players have gates, too (see `games.gates.Gated`)."""

    nodes: int = 0
    """Passes with gradients that were made, each over all examples."""
    values: Floats | None = None
    """Aumann–Shapley values of what was asked along the gates last, [n]."""
    by_example: Floats | None = None
    """The same on each example, [n, examples]; None where a layer's rows are not the examples."""

    @property
    def why_no_gates(self) -> str | None:
        """Why its players have no gates, or None."""
        try:
            check(self.evaluator.adapter, self.worth)
        except (OptionError, TunerError) as error:
            return str(error)
        found: str | None = self.evaluator.gather([PlacesOfGates(tuple(self.players.units.values()))])[0]
        return found

    def along(self, gates: Floats, shares: Floats, *, temperature: float = 2.0, batch: int = 0) -> Diagonal:
        """What is found with all gates at each of these values, by example where a layer's rows are the examples.

        A forward and a backward pass a gate, whatever the number of players; the accuracy is smoothed (see
        `scoring.gates.SMOOTH`). DivergedError where a worth is not finite.
        """
        options = {"temperature": temperature, "batch": batch}
        inner = self.passes([float(gate) for gate in gates], **options)
        outer = self.passes([0.0, 1.0], **options, slopes=False) if inner[0].smoothed else self._corners(inner[0].apart)
        smooth, ends = ([found.smooth(self.worth, temperature) for found in made] for made in (inner, outer))
        slopes = np.array([found.slopes.mean(0, dtype=np.float64) for found in smooth])
        self.values, self.by_example, rows = shares @ slopes, None, None
        if all(found.apart for found in inner):
            self.by_example = sum(share * found.slopes.T for share, found in zip(shares, smooth, strict=True))
            finish = None if inner[0].smoothed else SMOOTH[self.worth].finish
            rows = Rows(_stack(inner, "numbers"), _stack(inner, "slopes"), _stack(outer, "numbers"), finish)
        return Diagonal(gates, shares, _stack(smooth, "numbers").mean(1), slopes, _stack(ends, "numbers").mean(1), rows)

    def slopes(self, gates: Floats, **options: Any) -> Floats:
        """∂worth/∂gate [m, n] with gates [m, n]; of one row, the values by example are its slopes."""
        temperature = options.get("temperature", 2.0)
        made = self.passes([tuple(row) for row in gates.tolist()], **options)
        found = [each.smooth(self.worth, temperature) for each in made]
        self.by_example = found[0].slopes.T.astype(np.float64) if len(found) == 1 and found[0].apart else None
        return np.array([each.slopes.mean(0, dtype=np.float64) for each in found])

    def outputs(self) -> Floats:
        """Σ_x ‖ΔW x‖² of every player over all examples, [n]."""
        return self.evaluator.answers([MeasuredPass(tuple(self.players.units.values()))])[0].numbers

    def _corners(self, apart: bool) -> list[Passed]:
        """What two passes with gates of 0 and 1 would give, which are coalitions."""
        number = Game(self.evaluator, self.players, worth=SMOOTH[self.worth].known_as or self.worth)
        ends = number.per_example(np.array([[False] * self.n_players, [True] * self.n_players]))
        if not np.isfinite(ends).all():
            label = self.evaluator.adapter.label
            raise DivergedError(f"{label}: the loss is not finite with no player or with all, between which gates lead")
        return [Passed(end, np.zeros((len(end), 0), np.float32), apart, False) for end in ends]

    def passes(self, gates: Sequence[float | tuple[float, ...]], **options: Any) -> list[Passed]:
        """What every example gives with gates at these values, one for all or one a player; kept in the journal."""
        units = tuple(self.players.units.values())
        asked = [GatedPass(units, each, self.worth, **options) for each in gates]
        answers = self.evaluator.answers(asked)
        for each, found in zip(asked, answers, strict=True):
            if not (np.isfinite(found.numbers).all() and np.isfinite(found.slopes).all()):
                label = self.evaluator.adapter.label
                raise DivergedError(
                    f"{label}: the {self.worth} or its gradient is not finite with gates of {each.gates}"
                )
        self.nodes += len(gates) if options.get("slopes", True) else 0
        return answers

    def cost_along(self, gates: int) -> Cost:
        """What asking along so many gates would compute, in passes without gradients."""
        passes = PASSES * gates + 2 * (SMOOTH[self.worth].smooth is not None and not self.evaluator.task.classifies)
        blocks = round(passes * self.evaluator.layout.blocks * self.evaluator.batches)
        return Cost(round(passes), blocks, blocks, self.evaluator.seconds(passes))


def check(adapter: Adapter, worth: str | None) -> None:
    """TunerError where a gate means nothing for this adapter, OptionError for a worth that has no gradient.

    None is the task's own, of which nothing is known yet.
    """
    if worth is not None and worth not in SMOOTH:
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


def _stack(passes: Sequence[Passed], name: str) -> Floats:
    return np.stack([getattr(found, name) for found in passes])
