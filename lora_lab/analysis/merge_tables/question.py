"""What can be asked of merges, with every option, as in questions.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lab.analysis.question import Question
from lora_lab.analysis.questions import in_words, split_option
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.registry import Later
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from torch import nn

    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.result import Result
    from lora_lab.tasks.task import Task


def _ranks() -> list[str]:
    from lora_lab.merging.budgets import EXACT, RANKS

    return [*RANKS, EXACT]


@dataclass(frozen=True)
class CompareMerges(Question):
    """How good every merge is on the tasks of its adapters, each with its own head; see table.py.

    Tasks are judged, and coefficients chosen, by their main metric or the first `metric` that they have. Every number
    on the `split` has a 95 % interval over examples (bootstraps with `seed`; Wilson's for one task's accuracy). A share
    of which more is better is normalised, divided by the adapter's own; of other metrics it is told what is lost. The
    summary has the validation curves over the
    coefficients. A method that cannot merge a set is left out, and the summary says why.

    Merges come back at equal rank, so that none is ahead by the size of its file. The first of them, or the one that
    `against` names, is what the others are compared with: paired differences, p-values corrected by Holm. `nulls` are
    adapters that keep some properties of the real ones and nothing else (see geometry/nulls.py). In the place of the
    others they ask: does merging with these keep more of an adapter's task than merging with any adapters of their
    norm, or spectrum? In the place of all: how much of the score has nothing to do with what was learnt? A draw is
    treated as the real adapters are, its coefficient chosen on the validation splits (with `quick_nulls` it takes
    theirs); 20 and more give a p-value.
    """

    kind = "compare-merges"
    of_transforms = True

    methods: tuple[str, ...] = option(("all",), "Names with commas, NAME:RULE for an inner rule, or all.")
    options: Mapping[str, Mapping[str, Any]] = option(
        {}, "METHOD.OPTION=VALUE, e.g. ties.density=0.3 (repeatable).", flag="set"
    )
    coefficients: tuple[float, ...] = option(
        (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0),
        "Factors of the merged ΔW to choose from on the validation splits, with commas.",
        title="coefficient",
    )
    ratios: tuple[tuple[float, ...], ...] = option(
        ((0.0, 1.0), (1.0, 2.0), (1.0, 1.0), (1.0, 1.0, 1.0)), "For seeds of one task: weights of the mixtures."
    )
    ranks: tuple[int | str, ...] = option(
        ("largest",),
        "Rank at which all merges come back: a number, largest (of the adapters, in each module), sum (of theirs), or "
        "exact; several with commas (largest,exact) give rows of each.",
        flag="rank",
        least=1,
        choices=_ranks,
        title="rank",
    )
    nulls: tuple[str, ...] = option(
        (),
        "Merge with nulls of the adapters, too: NAMES, with commas. By default none: each draw costs as much as the "
        "merge itself, for every method.",
        choices=Later("lora_lab.geometry.nulls", "NULLS"),
        title="null",
    )
    draws: int = option(20, "Draws of each null; from 20 on there are p-values.", least=1)
    replaced: tuple[str, ...] = option(
        ("others", "all"),
        "What nulls stand for: others (all but the adapter whose task is scored), all, or both.",
        choices=Later("lora_lab.analysis.merge_tables.coefficients", "REPLACED"),
        title="what is replaced",
    )
    quick_nulls: bool = option(
        False,
        "Score draws at the coefficient that the adapters chose, and choose none for each: about a tenth of the work, "
        "which favours the adapters, so that being below a null is told too rarely and being above it too often.",
    )
    against: str | None = option(
        None, "The merge of the table that all others are compared with, by its name there; by default the first."
    )
    base_name: str | None = option(None, "Folder or hub id of the base model, for DoRA, HiRA and others.", flag="base")
    split: str = split_option()
    examples: int | None = option(
        None,
        "Score on so many examples of the split, and choose coefficients on so many of the validation split, drawn "
        "with seed 0; by default on all. Methods that look at data have an option of their own.",
        least=1,
    )
    metric: tuple[str, ...] = option(
        (), "A metric (repeatable): each task is judged by the first that it has, by default its main one."
    )
    seed: int = option(0, "Seed of the bootstrap and of the nulls.", least=0)

    @property
    def record(self) -> dict[str, Any]:
        """The fields in JSON types; ratios in words, such as 1:2."""
        return {**self.fields, "ratios": [in_words(ratio) for ratio in self.ratios]}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the answer hangs on: coefficients are chosen on the validation split, and some methods look
        at the training data.
        """
        from lora_lab.analysis.merge_tables.sets import specs_of
        from lora_lab.merging.methods import MERGES

        reads_data = any(MERGES[spec.method].reads_data for spec in specs_of(self.methods, self.options))
        return tuple(dict.fromkeys(("validation", self.split, *["train"] * reads_data)))

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these methods and options, before anything is computed."""
        from lora_lab.analysis.merge_tables.sets import joined, reference_of, specs_of
        from lora_lab.geometry.nulls import require_null

        if len(adapters) < 2:
            raise OptionError("a merge needs two adapters or more")
        if not (self.ranks and self.replaced):
            raise OptionError("no rank is given" if not self.ranks else "it is not said what the nulls stand for")
        reference_of(self.against, *joined(specs_of(self.methods, self.options, self.ranks)))
        for adapter in adapters if self.nulls else ():
            for null in self.nulls:
                require_null(adapter, null)

    def check_sets(self, adapters: Sequence[Adapter], tasks: Sequence[Task]) -> None:
        """Raise what `run` would raise for adapters of these tasks, one a task each."""
        from lora_lab.analysis.merge_tables.sets import merge_sets_of

        self.check(adapters)
        merge_sets_of(adapters, tasks, self.ratios)

    def run_id(self, adapters: Sequence[Adapter], tasks: Sequence[Task]) -> str:  # type: ignore[override]
        """What the answer hangs on, hashed: the adapters, the examples of every task, and the question."""
        from lora_lab.analysis.merge_tables import table

        return table.run_id(self, adapters, tasks)

    def run(  # type: ignore[override]
        self,
        adapters: Sequence[Adapter],
        tasks: Sequence[Task],
        on: Execution = Execution(),
        *,
        base: Callable[[], nn.Module] | None = None,
    ) -> Result:
        """Every merge of every set; `tasks`, one an adapter, and `base`, for adapters whose ΔW hangs on its weights."""
        from lora_lab.analysis.merge_tables import table

        return table.answer(self, adapters, tasks, on, base)
