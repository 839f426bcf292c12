"""`lora-lab merge`: one adapter out of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.cli import parsing
from lora_lab.cli.options import AdapterOutput, Computing, Device, Several, TaskEach
from lora_lab.cli.terminal import console, foretell, print_json, progress, table
from lora_lab.errors import OptionError
from lora_lab.options import option


@dataclass(frozen=True)
class Merging:
    """How adapters are merged."""

    method: str = option("task-arithmetic", "How; `lora-lab merge --methods` lists them.")
    options: Mapping[str, Any] = option({}, "An option of the method, e.g. density=0.2 (repeatable).", flag="set")
    weights: list[str] | None = option(
        None,
        "One an adapter (1,1,0.5), by default 1 each; or for each adapter a line over the layers (0:1,11:0.5), "
        "--weights given once for each; or a .json file of {module regex: weights}.",
    )
    coefficient: float = option(1.0, "The merged ΔW is multiplied by it.")
    search: list[str] | None = option(
        None,
        "Choose on the validation splits: coefficient=0.3,0.5,1 or any option of the method (a grid), or "
        "coefficient=0.1..2 (scipy). Repeatable.",
    )
    metric: tuple[str, ...] = option(
        (), "For --search: a metric (repeatable); each task is judged by the first that it has."
    )
    rank: int | str | None = option(
        None,
        "Cut to this rank, the error is told: a number, largest (of the adapters, in each module) or sum (of theirs). "
        "By default exact, but a merge by single entries (ties, dare, della …), which has no low rank, is cut to the "
        "sum. --search scores it at this rank.",
        least=1,
    )
    exact: bool = option(
        False, "Cut nothing: a merge by single entries is written whole, as large as the weights that it changes."
    )
    heads: str | None = option(
        None,
        "What becomes of heads that differ: keep-own (each its own, beside it), average (a plain mean), or first; by "
        "default a merge with such heads is refused.",
    )
    dtype: str | None = option(
        None, "float32, bfloat16 or float16 (fp32, bf16, fp16), of the file; by default the adapters' own, the widest."
    )
    base: str | None = option(None, "Folder or hub id of the base model: for DoRA, HiRA and others, whose ΔW needs it.")


@dataclass(frozen=True)
class Searching(Computing):
    """Where a search is computed, and by whom."""

    jobs: int | None = option(
        None,
        "Merge so many modules at a time, by default up to four; the result is the same to the bit. With --search, try "
        "what it names in so many processes: combinations side by side, or the coefficients of a list; an interval in "
        "one. Methods that look at data are never divided.",
        least=1,
    )
    device: str | None = option(
        None,
        "cpu, cuda …: where modules are merged, each moved there when its turn comes, and where models are run for "
        "methods that look at data. By default modules are merged on the CPU, with the same numbers on every machine, "
        "and models run on a GPU where there is one.",
    )
    ray: str | None = option(
        None,
        "The same on workers of a Ray cluster: auto (the one that runs), HOST:PORT, or local:N workers of its own; "
        "by default on none.",
    )
    yes: bool = option(False, "Search without asking, however long it takes.")


@dataclass(frozen=True)
class Written(AdapterOutput):
    """The merged adapter."""

    force: bool = option(False, "Replace what is there.", flag="force overwrite")


@dataclass(frozen=True)
class Listing:
    """What is listed instead."""

    methods: bool = option(False, "List the methods, what they look at, and where they are published.")


def _list(as_json: bool) -> None:
    from lora_lab.merging.methods import MERGES

    methods: list[dict[str, Any]] = [
        {
            "name": name,
            "about": merge.about,
            "formula": merge.formula,
            "works_on": merge.kind.about,
            "options": merge.defaults(),
            "data": merge.data,
            "gauge_free": merge.gauge_free,
            "source": merge.source,
            "variant": merge.variant,
        }
        for name, merge in MERGES.items()
    ]
    if as_json:
        print_json(methods)
        return
    rows = []
    for method in methods:
        options = ", ".join(key if value is None else f"{key}={value}" for key, value in method["options"].items())
        gauge = "free" if method["gauge_free"] else "hangs"
        published = ": ".join(part for part in (method["source"], method["variant"]) if part)
        rows.append((method["name"], method["data"], gauge, method["about"], options, published))
    headings = ("method", "data", "gauge", "what comes out", "options (--set)", "source: published variant")
    table("Methods", headings, rows, texts=6)
    console.print(
        "data: what of the tasks' examples is looked at, nothing (none), inputs alone, or labels as well; gauge: hangs "
        "where other factors (BR, R⁻¹A) of the same ΔW, such as a re-exported adapter has, give another merge"
    )


def command(
    *,
    adapters: Annotated[list[str] | None, typer.Argument(help="The adapters, of one base model.")] = None,
    how: Merging,
    task: TaskEach,
    loading: Several,
    computing: Searching,
    output: Written,
    listing: Listing,
) -> None:
    """Merge adapters into one that PEFT loads, with the ΔW that the method says: no base model is needed for it.

    An adapter adds ΔW = BA to the weight matrix of each module that it changes; B and A have few columns and rows, as
    many as its rank. Ranks, alphas and modules may differ between the adapters; where one leaves a module alone, its ΔW
    there is 0. A sum is exact unless --rank cuts it; what is lost by a cut or by rounding is told. Some methods look at
    data (`--methods` says which): the training or validation splits of the tasks that the adapters record (or --task).

    Large files are read and merged module by module, and what is done is kept beside the output: a merge that was ended
    goes on from there when it is run again. Of methods that look at data, or that need a base model, it begins anew.

    Example:  lora-lab merge a.safetensors b.safetensors c.safetensors --method ties --set density=0.2 -o merged
    """
    if listing.methods:
        _list(output.json)
        return
    if not adapters:
        raise OptionError("no adapter was given")
    from lora_lab.files.disk import refuse_existing
    from lora_lab.merging.merged import merge
    from lora_lab.merging.methods import MERGES
    from lora_lab.merging.writing.export import recorded, save
    from lora_lab.merging.writing.spool import spooled

    path = output.path()
    options = parsing.typed(how.options, MERGES[how.method].defaults(how.options), how.method)
    spaces = _spaces(how, options, computing)
    inputs = [Path(adapter) for adapter in adapters]
    refuse_existing(path, force=output.force, inputs=inputs)
    weights = parsing.weights(how.weights or [], len(adapters))
    loaded = loading.load(adapters)
    output.check(loaded[0].layout.format)
    read_data = MERGES[how.method].reads_data or bool(spaces or task.task)
    sources = _sources(loaded, weights, how, task if read_data else None, computing, task.trust_record)
    _foretell(sources, how, options, computing.jobs)
    options, settings = _settings(sources, how, options, spaces, computing)
    with spooled(path, sources, how.method, options, settings) as spool:
        with progress(f"merging by {how.method}") as report_step:
            merged = merge(
                sources, how.method, options=options, progress=report_step, jobs=computing.jobs, spool=spool, **settings
            )
        fitted = output.fit(merged.adapter)
        with progress("hashing, writing and checking") as report_step:
            report_step(0, 3)
            merged = recorded(replace(merged, adapter=fitted.adapter), inputs)
            save(merged, path, inputs=inputs, force=output.force, progress=report_step)
    told = {"changes": list(fitted.changes), "advice": list(fitted.advice)}
    report = {"path": str(path), **merged.adapter.record["merge"], "errors": dict(merged.errors), **told}
    (print_json if output.json else show)(report)


def _spaces(how: Merging, options: dict[str, Any], computing: Searching) -> Any:
    """What is searched; OptionError where it does not go together with what is set."""
    spaces = parsing.searches(how.search or [], how.method, options)
    if how.metric and not spaces:
        raise OptionError("--metric chooses among what --search tries; without it there is nothing to choose")
    if "coefficient" in spaces and how.coefficient != 1:
        raise OptionError("the coefficient is both set and searched")
    if not spaces and computing.ray:
        raise OptionError("--ray shares out what --search tries; a single merge is divided by --jobs alone")
    return spaces


def _sources(loaded: Any, weights: Any, how: Merging, task: TaskEach | None, device: Device, trust: bool) -> Any:
    """The adapters ready to be merged, with their tasks where a method or a search looks at data."""
    from lora_lab.adapters.renames import require_shared_modules
    from lora_lab.merging.sources import Sources, base_of

    require_shared_modules(loaded)
    tasks = task.of(loaded) if task else None
    base = base_of(loaded, how.base, trust_record=trust)
    return Sources(loaded, weights, base=base, tasks=tasks, device=device.resolved(), place=device.place())


def _foretell(sources: Any, how: Merging, options: Any, jobs: int | None) -> None:
    """Tell what a merge will take, in one line, where that is much."""
    from lora_lab.merging.forecast import forecast

    foretell(
        "to be merged",
        forecast(sources, how.method, options=options, jobs=jobs, rank=how.rank, exact=how.exact, dtype=how.dtype),
    )


def _settings(
    sources: Any, how: Merging, options: dict[str, Any], spaces: Any, computing: Searching
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method's options and those of any merge, as given, or as a search finds them best where there is one."""
    from lora_lab.merging.budgets import EXACT
    from lora_lab.merging.validation.search import search

    coefficient, trials = how.coefficient, None
    if spaces:
        rank = EXACT if how.exact else how.rank
        with computing.execution(f"merging by {how.method}") as on:
            choice: dict[str, Any] = {"coefficient": coefficient, "rank": rank, "metric": how.metric}
            best = search(sources, how.method, spaces, options=options, **choice, on=on)
            options, coefficient, trials = dict(best.options), best.coefficient, best.trials
    told = {name: getattr(how, name) for name in ("rank", "exact", "heads", "dtype")}
    return options, {"coefficient": coefficient, **told, "trials": trials}


def show(report: dict[str, Any]) -> None:
    """What was merged, as a table."""
    from lora_lab.merging.writing.export import words

    rows: list[tuple[str, object]] = [("method", report["method"])]
    if report["options"]:
        rows.append(("options", ", ".join(f"{name}={value}" for name, value in report["options"].items())))
    rows.append(("weights", words(report["weights"])))
    if report["coefficient"] != 1:
        rows.append(("coefficient", f"{report['coefficient']:g}"))
    rows.append(("modules", len(report["errors"])))
    for label, count in report["absent"].items():
        rows.append((f"{label} leaves alone", f"{count} modules, its ΔW is 0 there"))
    rows.append(("ranks", report["ranks"]))
    worst = max(report["errors"], key=lambda name: report["errors"][name])
    error = (
        "0 (exact)" if not report["error"] else f"{report['error']:.4g}, most in {worst}: {report['errors'][worst]:.4g}"
    )
    rows.append(("relative error of ΔW", error))
    if report["heads"]:
        rows.append(("heads", report["heads"]))
    rows += [("changed", change) for change in report["changes"]] + [("", line) for line in report["advice"]]
    table(f"Merged to {report['path']}", ("", ""), rows)
    trials = report.get("trials") or []
    if trials:
        console.print()
        title = f"{len(trials)} tried on the validation splits, best first (means over the tasks)"
        best = sorted(trials, key=lambda trial: trial["place"])
        table(title, list(best[0]), [list(trial.values()) for trial in best[:10]], texts=0)
