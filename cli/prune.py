"""`lora-lab prune`: a smaller adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    adapter: Annotated[str, typer.Argument(help="The adapter.")],
    keep: Annotated[
        str | None,
        typer.Option(
            help="What stays: every-other, odd, even, low, middle, high, type:q,k, top-shapley:K, top-norm:K, random:K."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="magnitude, random or delta-magnitude: which entries go, with --sparsity.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of the entries that become 0.")] = None,
    per_matrix: Annotated[
        bool, typer.Option("--per-matrix/--global", help="That share of every matrix, or of all entries together.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Ranks to keep of every module.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of every module's ‖ΔW‖² to keep.")] = None,
    rank_by: Annotated[str, typer.Option(help="svd: the best of that rank; units: the largest rank-1 terms.")] = "svd",
    players: Annotated[
        list[str] | None, typer.Option(help="What K counts: layer, module, type, type-layer … or NAME=REGEX.")
    ] = None,
    worth: Annotated[str, typer.Option(help="For top-shapley: accuracy, loss, log-likelihood or margin.")] = "accuracy",
    samples: Annotated[int, typer.Option(help="For top-shapley: marginal contributions a player.")] = 200,
    task: Annotated[str | None, typer.Option(help="For top-shapley: the task; by default the adapter's own.")] = None,
    split: Annotated[str, typer.Option(help="For top-shapley: the split to choose on.")] = "validation",
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    seed: Annotated[int, typer.Option(help="Of random choices.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="For top-shapley: cpu, cuda …")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="NAME.safetensors, or a name for a PEFT folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Write a smaller adapter that PEFT loads: fewer modules (--keep), fewer entries (--sparsity), or a lower rank.

    A label names what is kept. Layers are counted within their encoder; the modules that go do not come back on
    loading, and the scale of what stays is kept. Entries that became 0 are still stored, so a sparse adapter is a
    smaller file only where whole ranks or modules fell away; the bytes are told.

    Example:  lora-lab prune a.safetensors --keep every-other -o small
    """
    from ..adapters.adapter import Adapter
    from ..errors import OptionError
    from ..files.disk import refuse_existing
    from ..pruning import patterns
    from ..pruning.entries import prune_weights
    from ..pruning.modules import structured
    from ..pruning.ranks import prune_rank
    from ..tasks.choosing import task_of

    ways = [keep is not None, sparsity is not None or method is not None, rank is not None or energy is not None]
    if sum(ways) != 1:
        raise OptionError("say how to prune, in one way: --keep, --method with --sparsity, or --rank (or --energy)")
    if ways[1] and sparsity is None:
        raise OptionError(f"--method {method} needs --sparsity, a share from 0 to 1")
    if output is None:
        raise OptionError("-o names the adapter to write: NAME.safetensors, or a name for a PEFT folder")
    refuse_existing(output, force=force, inputs=[Path(adapter)])
    loaded = Adapter.load(adapter, config=config, alpha=alpha, adapter_name=adapter_name)
    if keep is not None:
        by = common.parse_players(players)
        choice = patterns.choice_of(loaded, by=by, seed=seed)
        chosen = partial(task_of, loaded, given=task, trust_record=trust_record)
        options = {"by": by, "worth": worth, "samples": samples, "split": split, "seed": seed}
        choice = replace(choice, shapley=partial(_shapley, loaded, chosen, device, options))
        pruned = structured(loaded, patterns.keep(choice, keep), pattern=keep)
    elif ways[1]:
        assert sparsity is not None
        criterion = method or "magnitude"
        pruned = prune_weights(loaded, sparsity=sparsity, by=criterion, per_matrix=per_matrix, seed=seed)
    else:
        pruned = prune_rank(loaded, rank=rank, energy=energy, by=rank_by, seed=seed)
    pruned.adapter.save(output, force=force)
    report = _report(output, pruned)
    if json:
        common.print_json(report)
    else:
        show(report)


def _shapley(loaded: Any, task: Callable[[], Any], device: str | None, options: dict[str, Any]) -> dict[str, float]:
    """Shapley values on the task's validation split, computed when they are asked for."""
    from ..analysis import shapley
    from ..tasks.task import resolve_device

    with common.progress("asking for coalitions") as report:
        return shapley.values_of(loaded, task(), **options, device=resolve_device(device), progress=report)


def _report(output: Path, pruned: Any) -> dict[str, Any]:
    return {
        "path": str(output),
        "modules": list(pruned.modules),
        "ranks": list(pruned.ranks) if pruned.ranks else None,
        "sparsity": pruned.sparsity,
        "error": pruned.error,
        "errors": dict(pruned.errors),
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
    saved = f"{1 - after / before:.0%} saved" if after < before else "none saved: zeros are stored like other numbers"
    rows.append(("bytes of tensors", f"{after:,} of {before:,} ({saved})"))
    common.table(f"Pruned to {report['path']}", ("", "kept"), rows)
