"""`lora-lab merge`: one adapter out of several."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from ..merging import methods

    rows = []
    for name, merge in methods.MERGES.items():
        options = ", ".join(key if value is None else f"{key}={value}" for key, value in merge.defaults().items())
        rows.append((name + (" *" if merge.reads_data else ""), merge.about, options, merge.variant))
    headings = ("method", "what comes out", "options (--set)", "published variant")
    common.table("Methods (* looks at data)", headings, rows, texts=4)
    raise typer.Exit


def command(
    adapters: Annotated[list[str], typer.Argument(help="The adapters, of one base model.")],
    method: Annotated[str, typer.Option(help="How; `lora-lab merge --methods` lists them.")] = "task-arithmetic",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, e.g. density=0.2 (repeatable).")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="One an adapter (1,1,0.5); or for each adapter a line over the layers (0:1,11:0.5), --weights given "
            "once for each; or a .json file of {module regex: weights}."
        ),
    ] = None,
    coefficient: Annotated[float, typer.Option(help="The merged ΔW is multiplied by it.")] = 1.0,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="Choose on the validation splits: coefficient=0.3,0.5,1 or any option of the method (a grid), or "
            "coefficient=0.1..2 (scipy). Repeatable."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut to this rank, the error is told; by default exact.")] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Heads that differ: keep-own (each its own, beside it), average (a plain mean), or first."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the file.")] = "float32",
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base model: for DoRA, HiRA and others, whose ΔW needs it."),
    ] = None,
    rename: common.RenameOption = None,
    task: common.TasksOption = None,
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    device: common.DeviceOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="NAME.safetensors, or a name for a PEFT folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "--overwrite", help="Replace what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the methods with their options.", is_eager=True, callback=_list)
    ] = False,
) -> None:
    """Merge adapters into one that PEFT loads, with the ΔW that the method says: no base model is needed for it.

    Ranks, alphas and modules may differ between the adapters; where one leaves a module alone, its ΔW there is 0.
    Nothing is cut unless --rank says so. fisher, regmean, lorahub and adamerging look at data: the training or
    validation splits of the tasks that the adapters record (or --task).

    Example:  lora-lab merge a.safetensors b.safetensors c.safetensors --method ties --set density=0.2 -o merged
    """
    from ..adapters.adapter import Adapter
    from ..adapters.renames import rename_all, require_shared_modules
    from ..errors import OptionError
    from ..files.disk import refuse_existing
    from ..merging import merged as merge
    from ..merging import search as searching
    from ..merging.export import save
    from ..merging.methods import MERGES
    from ..merging.sources import Sources, base_of, parse_weights
    from ..tasks.choosing import tasks_of
    from ..tasks.task import resolve_device

    if output is None:
        raise OptionError("-o names the adapter to write: NAME.safetensors, or a name for a PEFT folder")
    options = common.parse_set(set_, MERGES[method].defaults(common.pairs(set_)), method)
    spaces = searching.parse(search or [], method, options)
    if "coefficient" in spaces and coefficient != 1:
        raise OptionError("the coefficient is both set and searched")
    refuse_existing(output, force=force, inputs=[Path(path) for path in adapters])
    parsed = parse_weights(weights or [], len(adapters))
    loaded = [Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name) for path in adapters]
    loaded = rename_all(loaded, common.parse_renames(rename))
    require_shared_modules(loaded)
    needed = MERGES[method].reads_data or spaces or task
    tasks = tasks_of(loaded, task or [], trust_record=trust_record) if needed else None
    sources = Sources(
        loaded,
        parsed,
        base=base_of(loaded, base, trust_record=trust_record),
        tasks=tasks,
        device=resolve_device(device),
    )
    trials = None
    with common.progress(f"merging by {method}") as report:
        if spaces:
            found = searching.search(sources, method, spaces, options=options, coefficient=coefficient, progress=report)
            options, coefficient, trials = dict(found.options), found.coefficient, found.trials
        made = merge.merge(
            sources,
            method,
            options=options,
            coefficient=coefficient,
            rank=rank,
            heads=heads,
            dtype=dtype,
            trials=trials,
            progress=report,
        )
    save(made, output, inputs=[Path(path) for path in adapters], force=force)
    report_ = _report(output, made)
    if json:
        common.print_json(report_)
    else:
        show(report_)


def _report(output: Path, made: Any) -> dict[str, Any]:
    from ..adapters.adapter import Adapter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = Adapter.load(output).record
    return {"path": str(output), **record["merge"], "errors": dict(made.errors)}


def show(report: dict[str, Any]) -> None:
    """What was merged, as a table."""
    from ..merging.export import words

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
    common.table(f"Merged to {report['path']}", ("", ""), rows)
    trials = report.get("trials") or []
    if trials:
        common.console.print()
        title = f"{len(trials)} tried on the validation splits, best first (means over the tasks)"
        best = sorted(trials, key=lambda trial: (-trial["accuracy"], trial["loss"]))
        common.table(title, list(best[0]), [list(trial.values()) for trial in best[:10]], texts=0)
