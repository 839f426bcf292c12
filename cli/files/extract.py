"""`lora-lab extract`: an adapter out of two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from lora_lab.cli.options import AdapterFile, Device
from lora_lab.cli.terminal import console, messages, print_json, progress, size, table
from lora_lab.options import option
from lora_lab.progress import duration

_SHOWN = 20  # modules and leftover parameters; all are in the JSON


@dataclass(frozen=True)
class Extracting:
    """How much of each difference is kept."""

    rank: int | None = option(None, "Ranks of every module; the most of them with --energy or --ratio.", least=1)
    energy: float | None = option(None, "Share of every module's ‖ΔW‖² to keep.", above=0, most=1)
    ratio: float | None = option(
        None, "Keep singular values above the module's largest divided by this (kohya's sv_ratio).", least=1
    )
    keep_whole: bool = option(
        False, "Save what is no layer's weight (norms, biases, heads of another size) whole.", flag="keep-whole"
    )
    dtype: str = option("float32", "float32, bfloat16 or float16 (fp32, bf16, fp16), of the file.")


def command(
    *,
    base: Annotated[str, typer.Argument(help="Folder or file of the base's weights, or a hub id in the cache.")],
    tuned: Annotated[str, typer.Argument(help="The same of the model that was made of it.")],
    how: Extracting,
    device: Device,
    output: AdapterFile,
) -> None:
    """Write the adapter that makes one checkpoint of another: the difference of every layer at a low rank.

    The difference of a layer's two weights is its ΔW; the adapter's BA is the nearest to that of its rank. What is
    within the rounding of the tuned weights counts as no difference, so that a base with an adapter fused into it gives
    the adapter back at its rank. The error of every module is told, and what differs and cannot be an adapter. --rank,
    --energy or --ratio must say how much is kept.

    Example:  lora-lab extract ./llama-3-8b ./tuned -o a --rank 32
    """
    from lora_lab import files
    from lora_lab.cli.verbs import step
    from lora_lab.fusing.extract import BYTES_A_SECOND, ExtractOptions, extract
    from lora_lab.hub import checkpoint_folder

    path, options = output.path(), ExtractOptions(**vars(how))
    places = checkpoint_folder(base), checkpoint_folder(tuned)
    files.refuse_existing(path, force=output.force, inputs=places)
    count = sum(files.open_checkpoint(each).bytes for each in places)
    messages.print(f"to be read: {size(count)}, about {duration(count / BYTES_A_SECOND)}")
    with progress("extracting") as report:
        found = extract(*places, options, device=device.resolved(), progress=report)
    record = {**found.adapter.record, "recipe": {"steps": [step()]}}
    replace(found.adapter, record=record).save(path, force=output.force)
    said: dict[str, Any] = {
        "path": str(path),
        "modules": len(found.ranks),
        "ranks": dict(found.ranks),
        "error": found.error,
        "errors": dict(found.errors),
        "left": [vars(left) for left in found.left],
        "equal": found.equal,
        "bytes": sum(tensor.numel() * tensor.itemsize for tensor in found.adapter.tensors.values()),
    }
    if output.json:
        print_json(said)
    else:
        show(said)


def show(report: dict[str, Any]) -> None:
    """What was extracted, as tables."""
    ranks = sorted(report["ranks"].values())
    rows = [
        ("modules", str(report["modules"])),
        ("ranks", str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"),
        ("relative error of the differences", f"{report['error']:.4g}"),
        ("parameters that are equal", str(report["equal"])),
        ("bytes of tensors", size(report["bytes"])),
    ]
    table(f"Extracted to {report['path']}", ("", ""), rows)
    worst = sorted(report["errors"], key=lambda name: -report["errors"][name])[:_SHOWN]
    listed = [(name, report["ranks"][name], report["errors"][name]) for name in worst]
    table("Modules, the largest error first", ("module", "rank", "error"), listed)
    if len(report["errors"]) > _SHOWN:
        console.print(f"and {len(report['errors']) - _SHOWN} more; --json lists them")
    if report["left"]:
        left = [
            (each["parameter"], each["why"], "saved whole" if each["whole"] else "left out", each["share"])
            for each in report["left"][:_SHOWN]
        ]
        headings = ("parameter", "why", "", "‖difference‖ / ‖W‖")
        table(f"{len(report['left'])} that differ and are no ΔW of a layer", headings, left, texts=3)
