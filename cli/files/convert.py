"""`lora-lab convert`: an adapter in another format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lora_lab.cli.options import InPlace, Loading
from lora_lab.cli.terminal import print_json, table
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.registry import Later


@dataclass(frozen=True)
class Written(InPlace):
    """The adapter in the other format."""

    format: str | None = option(
        None,
        "NAMES: the format; by default the one of --for, or else the one that was read.",
        names=Later("lora_lab.adapters.formats.registry", "WRITTEN"),
        flag="to",
    )
    dtype: str | None = option(None, "float32, bfloat16 or float16, of the factors; by default their own.")


def command(
    adapter: Annotated[str, typer.Argument(help="The adapter: a file or folder of any format, or a hub id.")],
    loading: Loading,
    output: Written,
) -> None:
    """Write an adapter in another format, with the same ΔW in float32; what it cannot carry is told, or refused.

    ΔW is what the adapter adds to the weights. Files of the diffusion world (kohya, diffusers) hold the models of a
    whole pipeline, PEFT's one model: of several it gets a folder for each, unet/, text_encoder/ …, and such a folder of
    folders is read as one adapter. A format with one rank or scale for all modules (mlx) has smaller ranks filled with
    zeros.

    Example:  lora-lab convert adapter/ --to mlx -o adapter-mlx
    """
    from lora_lab.adapters.files.converting import converted, save
    from lora_lab.files.disk import refuse_existing

    output = output.at(adapter)
    path = output.path()
    if output.format is output.dtype is output.server is None and not output.uniform_rank:
        raise OptionError("say into what: --to names the format, --for the server or tool, --dtype the type")
    inputs = output.inputs(adapter)
    refuse_existing(path, force=output.force, inputs=inputs)
    (loaded,) = loading.load([adapter])
    output.check(loaded.layout.format)
    fitted = output.fit(loaded)
    made = converted(fitted.adapter, dtype=output.dtype)
    written, told = save(made.adapter, path, inputs=inputs, force=output.force)
    report = {
        "path": str(path),
        "read": loaded.layout.format,
        **_report(written),
        "error": made.error,
        "changes": [*fitted.changes, *made.changes, *told],
        "advice": list(fitted.advice),
    }
    if output.json:
        print_json(report)
    else:
        show(report)


def _report(written: Any) -> dict[str, Any]:
    ranks = sorted({site.rank for site in written.sites.values() if site.rank})
    owned = [key for site in written.sites.values() for key in site.keys.values()]
    return {
        "written": written.layout.format,
        "tuner": written.tuner,
        "modules": len(written.sites),
        "ranks": [ranks[0], ranks[-1]] if ranks else [],
        "dtypes": sorted({str(written.tensors[key].dtype).removeprefix("torch.") for key in owned}),
    }


def show(report: dict[str, Any]) -> None:
    """What was converted, as a table."""
    rows: list[tuple[str, object]] = [
        ("format", f"{report['written']}, read as {report['read']}"),
        ("modules", report["modules"]),
    ]
    if report["ranks"]:
        low, high = report["ranks"]
        rows.append(("ranks", str(low) if low == high else f"{low} to {high}"))
    rows.append(("types", ", ".join(report["dtypes"])))
    rows.append(("relative error of ΔW", f"{report['error']:.3g}" if report["error"] else "0 (exact)"))
    rows += [("changed", change) for change in report["changes"]] + [("", line) for line in report["advice"]]
    table(f"Converted to {report['path']}", ("", ""), rows)
