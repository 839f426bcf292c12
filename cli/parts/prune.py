"""`lora-lab prune`: a smaller adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.analysis.questions import Shapley
from lora_lab.cli.options import Coalitions, Computing, InPlace, OneTask, Reading, told
from lora_lab.cli.terminal import foretell, print_json, progress, table
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.registry import Later
from lora_lab.scoring.execution import Execution


@dataclass(frozen=True)
class Pruning:
    """How: by modules, by entries, or by ranks."""

    keep: str | None = option(
        None,
        "What stays: NAMES; with what they need, as in type:q,k or random:K.",
        names=Later("lora_lab.pruning.patterns", "KEEPS"),
    )
    method: str | None = option(
        None,
        "Which entries go, with --sparsity, of A and B or (delta-…) of ΔW: NAMES.",
        names=Later("lora_lab.pruning.entries", "CRITERIA"),
        title="criterion",
    )
    sparsity: float | None = option(None, "Share of the entries that become 0.", least=0, most=1)
    per_matrix: bool = option(
        False, "That share of every matrix, or of all entries together.", flag="per-matrix/global"
    )
    rank: int | None = option(
        None, "Ranks to keep of every module; the most of them with --energy, --cumulative or --ratio.", least=1
    )
    energy: float | None = option(
        None, "Share of every module's ‖ΔW‖² to keep (the square of kohya's sv_fro).", above=0, most=1
    )
    cumulative: float | None = option(
        None, "Share of the sum of every module's singular values to keep (kohya's sv_cumulative).", above=0, most=1
    )
    ratio: float | None = option(
        None, "Keep singular values above the module's largest divided by this (kohya's sv_ratio).", least=1
    )
    rank_by: str = option(
        "svd",
        "NAMES: the best of that rank, the largest of its own rank-1 terms, or any of them.",
        names=Later("lora_lab.pruning.ranks", "RANK_ORDERS"),
    )

    intruders: float | None = option(
        None,
        "Multiply the intruders by this: the leading directions of W + ΔW that are like none of W's in --base.",
        least=0,
    )

    def __post_init__(self) -> None:
        by_entries = self.sparsity is not None or self.method is not None
        by_rank = any(value is not None for value in self.cut.values())
        if (self.keep is not None) + by_entries + by_rank + (self.intruders is not None) != 1:
            raise OptionError(
                "say how to prune, in one way: --keep, --method with --sparsity, --rank (--energy, --cumulative, "
                "--ratio), or --intruders"
            )
        if by_entries and self.sparsity is None:
            raise OptionError(f"--method {self.method} needs --sparsity, a share from 0 to 1")

    @property
    def cut(self) -> dict[str, Any]:
        """How far the ranks are cut, as `prune_rank` has it."""
        return {name: getattr(self, name) for name in ("rank", "energy", "cumulative", "ratio")}


@dataclass(frozen=True)
class Intruders:
    """Which directions count as intruders, and what becomes of ranks."""

    base: Path | None = option(None, "For --intruders: the checkpoint, which is read one weight at a time.")
    top: int = option(10, "For --intruders: leading directions of W + ΔW that may be intruders.", least=1)
    threshold: float = option(
        0.5, "For --intruders: the cosine with each of W's below which a direction is one.", least=0, most=1
    )
    exact: bool = option(
        False, "For --intruders: as many more ranks as a module has intruders; else it is cut back to its own."
    )


@dataclass(frozen=True)
class Choosing:
    """How layers are chosen."""

    players: str | Mapping[str, str] = option(
        "layer", "What K counts: NAMES, or NAME=REGEX.", names=Later("lora_lab.adapters.groups", "PLAYERS")
    )
    worth: str | None = option(
        None,
        "For patterns by values: a metric of the task (by default its main one), or NAMES.",
        names=Later("lora_lab.analysis.coalitions.game", "WORTHS"),
        flag="metric worth",
    )
    samples: int = option(200, "For top-shapley: marginal contributions a player.", least=1)
    split: str = option("validation", "For patterns by values: the split to choose on.")
    seed: int = option(0, "Of random choices.", least=0)

    def shapley(self) -> Shapley:
        """The question whose values choose."""
        return Shapley(self.players, self.worth, samples=self.samples, split=self.split, seed=self.seed)


@dataclass(frozen=True)
class Pruners(Coalitions):
    """Where modules are pruned and layers are chosen, and by whom."""

    device: str | None = option(
        None,
        "cpu, cuda …: where modules are cut, each moved there when its turn comes, and where models are run for "
        "top-shapley. By default modules are cut on the CPU, with the same numbers on every machine, and models run on "
        "a GPU where there is one.",
    )
    jobs: int | None = option(
        None,
        "With --rank, --energy, --cumulative, --ratio or --sparsity, prune so many modules at a time, by default up to "
        "four; the result is the same to the bit. For patterns by values, compute in so many processes.",
        least=1,
    )


@dataclass(frozen=True)
class ChoosingTask(OneTask):
    """The task that they are chosen on."""

    task: str | None = option(None, "For patterns by values: the task; by default the adapter's own.")


def command(
    adapter: Annotated[str, typer.Argument(help="The adapter.")],
    how: Pruning,
    choosing: Choosing,
    intruders: Intruders,
    task: ChoosingTask,
    reading: Reading,
    computing: Pruners,
    output: InPlace,
) -> None:
    """Write a smaller adapter that PEFT loads: fewer modules (--keep), fewer entries (--sparsity), or a lower rank.

    Or one with smaller intruders (--intruders 0.75 --base model), directions that the base's own weights do not have:
    that restores some of what the base knew. One of these ways must be chosen.

    An adapter adds ΔW = BA to a weight matrix W, B and A of few columns and rows: its ranks. A label such as
    every-other names what is kept. Layers are counted within their encoder; the modules that go do not come back on
    loading, and the scale of what stays is kept. Entries that became 0 are still stored, so a sparse adapter is a
    smaller file only where whole ranks or modules fell away; the bytes are told.

    Example:  lora-lab prune a.safetensors --keep every-other -o small
    """
    from lora_lab.files.disk import refuse_existing
    from lora_lab.pruning.entries import prune_weights
    from lora_lab.pruning.forecast import forecast
    from lora_lab.pruning.ranks import prune_rank

    output = output.at(adapter)
    path = output.path()
    refuse_existing(path, force=output.force, inputs=output.inputs(adapter))
    (loaded,) = reading.load([adapter])
    output.check(loaded.layout.format)
    if how.keep is not None:
        pruned = _structured(loaded, how.keep, choosing, task, computing)
    elif how.sparsity is not None:
        by = how.method or "magnitude"
        foretell("to be pruned", forecast(loaded, criterion=by, jobs=computing.jobs))
        entries: dict[str, Any] = {
            "sparsity": how.sparsity,
            "by": by,
            "per_matrix": how.per_matrix,
            "seed": choosing.seed,
        }
        pruned = prune_weights(loaded, **entries, jobs=computing.jobs, place=computing.place())
    elif how.intruders is not None:
        pruned = _lowered(loaded, how.intruders, intruders, computing)
    else:
        foretell("to be pruned", forecast(loaded, rank=how.rank, jobs=computing.jobs))
        ranks = {**how.cut, "by": how.rank_by, "seed": choosing.seed}
        pruned = prune_rank(loaded, **ranks, jobs=computing.jobs, place=computing.place())
    fitted = output.fit(pruned.adapter)
    fitted.adapter.save(path, force=output.force)
    report = {**_report(path, pruned), "changes": list(fitted.changes), "advice": list(fitted.advice)}
    if output.json:
        print_json(report)
    else:
        show(report)


def _structured(loaded: Any, keep: str, choosing: Choosing, task: OneTask, computing: Computing) -> Any:
    """The adapter with what a pattern keeps; values of the task are computed when a pattern asks for them."""
    from lora_lab.pruning import patterns
    from lora_lab.pruning.modules import structured

    def values(estimator: str | None) -> dict[str, float]:
        with computing.execution("asking for coalitions") as on:
            return replace(choosing.shapley(), estimator=estimator).values(loaded, task.of([loaded]), on)

    choice = replace(patterns.choice_of(loaded, by=choosing.players, seed=choosing.seed), values=values)
    return structured(loaded, patterns.keep(choice, keep), pattern=keep)


def _lowered(loaded: Any, factor: float, of: Intruders, computing: Computing) -> Any:
    """The adapter with smaller intruders."""
    from lora_lab.pruning.intruders import lower_intruders

    if of.base is None:
        raise OptionError("--intruders needs --base, the checkpoint in whose weights they are looked for")
    with progress("decomposing the base's weights") as report:
        on = Execution(device=computing.resolved(), progress=report, confirm=told)
        return lower_intruders(
            loaded, base=of.base, factor=factor, top=of.top, threshold=of.threshold, exact=of.exact, on=on
        )


def _report(output: Path, pruned: Any) -> dict[str, Any]:
    return {
        "path": str(output),
        "modules": list(pruned.modules),
        "ranks": list(pruned.ranks) if pruned.ranks else None,
        "sparsity": pruned.sparsity,
        "error": pruned.error,
        "errors": dict(pruned.errors),
        "intruders": dict(pruned.intruders) if hasattr(pruned, "intruders") else None,
        "cut": getattr(pruned, "cut", None),
        "bytes": list(pruned.bytes),
    }


def show(report: dict[str, Any]) -> None:
    """What was pruned, as a table."""
    before, after = report["bytes"]
    rows = [("modules", f"{report['modules'][0]} of {report['modules'][1]}")]
    if report["ranks"]:
        rows.append(("ranks, summed", f"{report['ranks'][0]} of {report['ranks'][1]}"))
    if report["sparsity"] is not None:
        rows.append(("entries that are 0", f"{report['sparsity']:.1%}"))
    if report["error"] is not None:
        rows.append(("relative error of ΔW", f"{report['error']:.4f}"))
    if report["intruders"] is not None:
        rows.append(("intruders", f"{sum(report['intruders'].values())} in {len(report['intruders'])} modules"))
        rows.append(("error of the cut to these ranks", f"{report['cut']:.4f}"))
    none = "none saved" + ": zeros are stored like other numbers" * (report["sparsity"] is not None)
    saved = f"{1 - after / before:.0%} saved" if after < before else none
    rows.append(("bytes of tensors", f"{after:,} of {before:,} ({saved})"))
    worst = sorted(((error, name) for name, error in report["errors"].items() if error), reverse=True)[:5]
    rows += [(f"relative error of {name}", f"{error:.4f}") for error, name in worst if len(report["errors"]) > 1]
    rows += [("changed", change) for change in report["changes"]] + [("", line) for line in report["advice"]]
    table(f"Pruned to {report['path']}", ("", "kept"), rows)
