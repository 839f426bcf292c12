"""What can be asked, with every option: help, bounds and choices stand here once. What answers is loaded when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lab.analysis.question import Question
from lora_lab.options import option
from lora_lab.registry import Later
from lora_lab.scoring.execution import Cost, Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.result import Result
    from lora_lab.tasks.task import Task


def player_option() -> Any:
    """What is switched or mixed together."""
    return option(
        "layer",
        "NAMES, or NAME=REGEX (repeatable).",
        names=Later("lora_lab.adapters.groups", "PLAYERS"),
        title="player",
    )


def split_option() -> Any:
    """The split that is scored."""
    return option("test", "NAMES.", choices=Later("lora_lab.tasks.splits", "SPLITS"))


def example_option() -> Any:
    """How many of its examples."""
    return option(None, "Score on so many examples of the split, drawn with seed 0; by default on all.", least=1)


def metric_option(default: str = "the task's main one and its loss") -> Any:
    """What is told of models."""
    return option((), f"A metric of the task (repeatable; the first is the main one); by default {default}.")


def behaviour_option() -> Any:
    """Texts beside the task."""
    return option(
        None,
        "Texts that have nothing to do with the task (.txt with one a line; .jsonl or .csv with a column text, and one "
        "target for encoders with a decoder): how much worse their loss is than the base's (forgetting), KL(base ‖ "
        "with the adapter), and calibration on the task.",
    )


def in_words(ratio: Sequence[float]) -> str:
    """(1.0, 2.0) → '1:2'."""
    return ":".join(f"{weight:g}" for weight in ratio)


@dataclass(frozen=True)
class Interpolate(Question):
    """The task's metrics along the line between every two of the adapters, with barriers: how much worse it gets.

    Every number carries a 95 % interval over the examples: metrics and barriers by a paired bootstrap with `seed` (one
    resampling for all points of a curve), shares of examples by `stats.proportion`. `factors` brings the norm-matched
    curve with it wherever there is a ΔW. `ratios` are weights for the first adapters of every combination, normalised
    to sum 1. End points are the adapters themselves.
    """

    kind = "interpolate"
    of_transforms = True

    points: int = option(11, "Points on each line, both ends among them.", least=2)
    spaces: tuple[str, ...] = option(
        ("factors", "delta"),
        "What is averaged between the ends.",
        flag="",
        choices=Later("lora_lab.merging.paths", "SPACES"),
        title="space",
    )
    ratios: tuple[tuple[float, ...], ...] = option(
        (), "Also score weighted mixtures of the adapters, e.g. 0:1,1:2,1:1,1:1:1; by default none."
    )
    metric: tuple[str, ...] = metric_option()
    behaviour: str | None = behaviour_option()
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    @property
    def record(self) -> dict[str, Any]:
        """The fields in JSON types; ratios in words, such as 1:2."""
        return {**self.fields, "ratios": [in_words(ratio) for ratio in self.ratios]}

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.lines import connectivity

        connectivity.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """Curves, mixtures and barriers."""
        from lora_lab.analysis.lines import connectivity

        self.check(adapters)
        return connectivity.answer(self, adapters, task, on)


@dataclass(frozen=True)
class Shapley(Question):
    """Shapley values of every adapter's players (see `players`), each from its own game.

    Without an `estimator`, all coalitions are enumerated where that takes fewer block evaluations than as many pairs as
    `samples` orders have coalitions. Else those pairs are joined with what gradients tell (`joint`); `samples`
    antithetic orders are drawn where the worth has no gradient or the tuner no place for a gate. Every value has the
    standard error of its choice of coalitions (`se`: 0 for exact values; `stats.mean_and_error`), that of the examples
    (`se_examples`), and a 95 % interval from both.
    `order` 2 adds pairwise interactions with intervals of the choice of coalitions alone.
    """

    kind = "shapley"

    players: str | Mapping[str, str] = player_option()
    worth: str | None = option(
        None,
        "A metric of the task (by default its main one), or NAMES; what helps is positive.",
        names=Later("lora_lab.analysis.coalitions.game", "WORTHS"),
        flag="metric worth",
    )
    estimator: str | None = option(
        None,
        "NAMES, or shapiq:NAME; by default exact where that is cheaper, else joint (antithetic without gates).",
        names=Later("lora_lab.games.estimators", "ESTIMATORS"),
    )
    samples: int = option(200, "How often each player is seen joining a coalition; for permutations, orders.", least=1)
    until_se: float | None = option(
        None,
        "Stop once every standard error is this small (in units of the worth); by default only the samples count.",
        above=0,
        title="standard error to stop at",
    )
    budget: int | None = option(
        None, "Ask for at most so many different coalitions; by default as many as the samples take."
    )
    order: int = option(1, "2 adds pairwise interactions.", least=1, most=2)
    options: Mapping[str, Any] = option({}, "Option of the estimator, e.g. nodes=5.", flag="set")
    split: str = split_option()
    examples: int | None = example_option()
    seed: int = option(0, "Draws the coalitions.", least=0)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.coalitions import shapley

        super().check(adapters)
        shapley.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every player of every adapter."""
        from lora_lab.analysis.coalitions import shapley

        self.check(adapters)
        return shapley.answer(self, adapters, task, on)

    def values(self, adapter: Adapter, task: Task, on: Execution = Execution()) -> dict[str, float]:
        """Player → Shapley value, without intervals."""
        from lora_lab.analysis.coalitions import shapley

        return shapley.values(self, adapter, task, on)

    def cost(self, adapter: Adapter, task: Task, on: Execution = Execution()) -> Cost:
        """What the values of one adapter would cost."""
        from lora_lab.analysis.coalitions import shapley

        return shapley.cost(self, adapter, task, on)


@dataclass(frozen=True)
class Stability(Question):
    """Metrics over families of keep-sets: by size, by probability, one left out, one alone, fixed patterns.

    By size: all keep-sets, or `samples` different ones of each size k (`every` forces or forbids enumeration). By
    probability: the same keep-sets, weighted by Binomial(G, p), a coin for every player (CoTo's masks in training have
    at least one on; see `progressive`). With `rescale` everything comes a second time with the updates multiplied by
    G/k. Every mean has a 95 % interval for the choice of keep-sets and of examples together.
    """

    kind = "stability"

    players: str | Mapping[str, str] = player_option()
    samples: int = option(50, "Keep-sets of each size, where there are more.", least=2)
    grid: tuple[float, ...] = option(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "Chances of each player to be on, at which the mean metric is estimated, with commas.",
        flag="p",
        least=0,
        most=1,
        title="probability p",
    )
    rescale: bool = option(True, "Everything a second time with the updates multiplied by G/k, k of G players on.")
    every: bool | None = option(None, "All 2^G keep-sets or only samples; by default all where that costs little more.")
    split: str = split_option()
    examples: int | None = example_option()
    metric: tuple[str, ...] = metric_option()
    seed: int = option(0, "Draws the keep-sets and the bootstrap.", least=0)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.coalitions import stability

        super().check(adapters)
        stability.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every family of keep-sets of every adapter."""
        from lora_lab.analysis.coalitions import stability

        self.check(adapters)
        return stability.answer(self, adapters, task, on)


@dataclass(frozen=True)
class Sweep(Question):
    """Metrics of every adapter pruned in every way; several adapters are summed up by method.

    structured: `patterns` of modules kept (fixed ones; half of the layers by norm, and by Shapley values and cheaper
    rankings computed on the validation split; as many random layers). unstructured: `criteria` at `sparsities`. rank:
    each lower rank by SVD, by the largest units, and random units. Random rows are means over `draws`; every number has
    a 95 % interval.
    """

    kind = "sweep"
    of_transforms = True

    kinds: tuple[str, ...] = option(
        ("structured", "unstructured", "rank"),
        "What is pruned: patterns of modules, single entries, ranks.",
        flag="",
        choices=Later("lora_lab.analysis.coalitions.sweep", "KINDS"),
        title="kind of pruning",
    )
    patterns: tuple[str, ...] = option(
        (),
        "NAMES, with commas; by default all that the adapter has layers for.",
        choices=Later("lora_lab.pruning.patterns", "KEEPS"),
        title="pattern",
    )
    sparsities: tuple[float, ...] = option(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
        "Shares of entries set to 0, with commas.",
        least=0,
        most=1,
        title="sparsity",
    )
    criteria: tuple[str, ...] = option(
        ("magnitude", "random"),
        "Which entries are set to 0, of A and B or (delta-…) of ΔW: NAMES, with commas.",
        choices=Later("lora_lab.pruning.entries", "CRITERIA"),
        title="criterion",
    )
    per_matrix: bool = option(
        False, "That share of every matrix, or of all entries together.", flag="per-matrix/global"
    )
    draws: int = option(5, "Draws of every random control.", least=1)
    split: str = split_option()
    examples: int | None = example_option()
    metric: tuple[str, ...] = metric_option()
    seed: int = option(0, "Of random controls and the bootstrap.", least=0)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the answer hangs on: Shapley values choose layers on the validation split."""
        return tuple(dict.fromkeys((self.split, "validation"))) if "structured" in self.kinds else (self.split,)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.analysis.coalitions import sweep

        super().check(adapters)
        sweep.check(self, adapters)

    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """A row for every way of pruning every adapter."""
        from lora_lab.analysis.coalitions import sweep

        self.check(adapters)
        return sweep.answer(self, adapters, task, on)


@dataclass(frozen=True)
class Evaluate(Question):
    """Scores of every adapter on its own task, and of every base model alone, with 95 % intervals over the examples."""

    kind = "evaluate"

    split: str = split_option()
    base: bool = option(True, "Score the base model without an adapter, too.")
    metric: tuple[str, ...] = metric_option("all that it has")
    examples: int | None = example_option()
    behaviour: str | None = behaviour_option()
    seed: int = option(0, "Seed of the bootstrap.", least=0)

    def run(
        self,
        adapters: Sequence[Adapter],
        task: Task | Sequence[Task] | None = None,
        on: Execution = Execution(),
    ) -> Result:
        """A row for every adapter and every base; `task`: one for all, one an adapter, or (None) the adapters' own."""
        from lora_lab.analysis import evaluate
        from lora_lab.tasks.choosing import tasks_of

        self.check(adapters)
        return evaluate.answer(self, adapters, tasks_of(adapters) if task is None else task, on)
