"""Which adapters are put beside each other by their weights alone, in which parts; and what a base or merges tell."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lab.errors import MismatchError, OptionError
from lora_lab.options import check_options, option
from lora_lab.registry import Later
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.result import Result


@dataclass(frozen=True)
class Compare:
    """Which parts are compared, and how; `run` answers."""

    kind: ClassVar[str] = "compare"

    levels: tuple[str, ...] = option(
        ("layer", "type"),
        "Parts besides the total, with commas: NAMES.",
        choices=Later("lora_lab.geometry.comparing", "LEVELS"),
    )
    energy: float = option(
        1.0,
        "Share of ‖ΔW‖² in each module that its subspaces hold: below 1, directions of small singular values do not "
        "count for angles and overlap.",
        above=0,
        most=1,
    )
    digits: int = option(
        4, "Digits to which ΔW is rounded for its hash; more tell more adapters apart.", least=1, most=12
    )
    similar: float = option(
        0.999,
        "Cosine above which two adapters are called near-duplicates: rounding to 16 bits leaves .99999, to 8 bits "
        ".9993; independent ones have some hundredths.",
        least=0,
        most=1,
    )
    signs: bool = option(
        False,
        "Also count the entries of ΔW that agree in sign, for which ΔW itself is made, block by block: half a minute "
        "for each pair at 8 billion parameters.",
    )
    tsne: bool = option(False, "Also place the adapters by t-SNE, which needs four of them and scikit-learn.")
    top: int = option(
        10, "With `base`: leading directions of W + ΔW that may be intruders, and of W that ΔW is shared with.", least=1
    )
    threshold: float = option(
        0.5, "With `base`: a direction is an intruder if its cosine with all of W's is below this.", least=0, most=1
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def record(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return {**vars(self), "levels": list(self.levels)}

    def check(self, adapters: Sequence[Adapter], base: Path | None = None, merges: Sequence[Result] = ()) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.adapters.models.bases import same_base
        from lora_lab.adapters.renames import require_shared_modules
        from lora_lab.analysis.merge_tables.predictors import collected
        from lora_lab.geometry.placing import require_enough

        if len(adapters) < (1 if base else 2):
            raise OptionError(
                f"{len(adapters)} adapter{'s' * (not adapters)} given; to compare, two or more are needed"
            )
        if self.tsne:
            require_enough(len(adapters))
        require_shared_modules(adapters)
        same_base(adapters, given=base is not None)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for adapter in adapters:
            for name in adapter.updates:
                own = _shape(adapter, name)
                shape, source = shapes.setdefault(name, (own, adapter.source))
                if shape != own:
                    raise MismatchError(
                        f"{source} and {adapter.source}: {name} is {_size(shape)} and {_size(own)}; adapters of one "
                        "base model are needed"
                    )
        collected(adapters, merges)

    def run_id(self, adapters: Sequence[Adapter], base: Path | None = None, merges: Sequence[Result] = ()) -> str:
        """What the answer hangs on, hashed."""
        from lora_lab.results.result import fingerprint

        about = [
            [adapter.label, adapter.record.get("method"), adapter.record.get("seed"), adapter.config, adapter.digest]
            for adapter in adapters
        ]
        further = [base and _digest(base), [[each.columns, each.summary] for each in merges]]
        return fingerprint([self.kind, about, self.record, *(further if any(further) else ())])

    def run(
        self,
        adapters: Sequence[Adapter],
        on: Execution = Execution(),
        *,
        base: Path | None = None,
        merges: Sequence[Result] = (),
    ) -> Result:
        """The answer; MismatchError where adapters share no module, or one of another shape.

        base: the checkpoint in whose weights ΔW is looked for. merges: results of comparing merges of these adapters,
        beside which the numbers of pairs are put as predictors.
        """
        from lora_lab.adapters.describe import labels_of
        from lora_lab.analysis.merge_tables.predictors import forecast
        from lora_lab.geometry import comparing
        from lora_lab.geometry.intruders import rows_of
        from lora_lab.results.result import Result, columns, provenance

        began = time.perf_counter()
        self.check(adapters, base, merges)
        labels = labels_of(adapters)
        found = comparing.measure(adapters, energy=self.energy, signs=self.signs, progress=on.report)
        parts = comparing.parts_of(found.modules, self.levels)
        pairs = list(itertools.combinations(range(len(adapters)), 2))
        rows = [row for part in parts for pair in pairs if (row := comparing.pair_row(found, pair, *part))]
        totals = {(row["indices"][0], row["indices"][1]): row for row in rows if row["level"] == "total"}
        tables = {
            "adapters": comparing.about(adapters, labels, found, self.digits),
            "parts": [row for part in parts for row in comparing.part_rows(found, labels, *part)],
            "twins": comparing.twins(totals, labels, self.similar),
            **comparing.placed(totals, found, labels, tsne=self.tsne),
            **comparing.order_of(totals, len(adapters)),
        }
        if base:
            from lora_lab.fusing.weights import inside_of  # and with it transformers

            inside = inside_of(base, adapters, self.top, on)
            norms = [{name: one.norm for name, one in alone.items()} for alone in found.alone]
            tables["inside"] = rows_of(inside, norms, labels, parts, self.threshold)
        if merges:
            tables["forecast"] = forecast(adapters, totals, merges)
        described = [comparing.described_by(*each) for each in zip(adapters, found.alone, strict=True)]
        return Result(
            self.kind,
            columns([{**comparing.named(labels, (row["indices"][0], row["indices"][1])), **row} for row in rows]),
            {**self.record, "base": base and base.name, "adapters": described},
            tables,
            provenance(
                inputs=[Path(adapter.source) for adapter in adapters],
                elapsed_s=time.perf_counter() - began,
                run=self.run_id(adapters, base, merges),
            ),
        )


def _shape(adapter: Adapter, name: str) -> tuple[int, ...]:
    """Of ΔW; of a LoRA from the header of its file alone."""
    from lora_lab.adapters.formats.peft.peft_format import shape_of

    if adapter.why_not_additive:
        return adapter.updates[name].shape
    return tuple(shape_of(adapter.sites[name], adapter.tensors, adapter.config))


def _digest(base: Path) -> str:
    """A hash of all files of a folder, or of one file."""
    from lora_lab.files import file_hash
    from lora_lab.tasks import digests

    return digests.of_folder(base) if base.is_dir() else file_hash(base)


def _size(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
