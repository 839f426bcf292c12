"""`lora-lab fuse`: a base with adapters in it, as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.cli.options import Device, Loading
from lora_lab.cli.terminal import messages, print_json, progress, size, table
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.progress import duration
from lora_lab.registry import Later


@dataclass(frozen=True)
class Fusing:
    """How adapters are fused."""

    coefficients: tuple[float, ...] = option((), "One an adapter (1,0.5), by which its ΔW is multiplied; by default 1.")
    heads: str | None = option(
        None,
        "What becomes of heads and other whole tensors in which adapters differ: NAMES; by default they are refused.",
        names=Later("lora_lab.fusing.changes", "HEADS"),
    )
    max_shard_size: float = option(5.0, "Gigabytes (10⁹ bytes) that a file has at most.", above=0)


@dataclass(frozen=True)
class CheckpointOutput:
    """The folder that is written, and what is printed of it."""

    output: Path | None = option(None, "The folder to write. It has no default.", flag="o output")
    force: bool = option(False, "Replace a checkpoint that was written by this verb.")
    json: bool = option(False, "Print what was done as JSON.")

    def path(self) -> Path:
        """Where the checkpoint goes; OptionError without."""
        if self.output is None:
            raise OptionError("-o names the folder to write")
        if self.output.suffix in (".safetensors", ".bin", ".pt", ".gguf"):
            raise OptionError(f"{self.output}: a folder is written, with a name that has no ending of a file")
        return self.output


def command(
    *,
    base: Annotated[str, typer.Argument(help="Folder or file of the base's weights, or a hub id in the cache.")],
    adapters: Annotated[list[str], typer.Argument(help="The adapters.")],
    how: Fusing,
    loading: Loading,
    device: Device,
    output: CheckpointOutput,
) -> None:
    """Write the checkpoint base + Σ ΔW: what servers and converters take that know no adapters.

    ΔW is what an adapter adds to a weight matrix, Σ the sum over the adapters. Every tuner that PEFT can merge is
    taken; heads and trained tokens are put in place. One tensor at a time is in memory, each keeps the base's dtype,
    and what rounding to it takes of ΔW is told. A run that was killed goes on where it was. With an adapter on one of
    two tied embeddings, the two are kept apart from then on, as they were at work.

    Example:  lora-lab fuse ./llama-3-8b a.safetensors -o fused
    """
    from lora_lab.adapters.describe import labels_of
    from lora_lab.cli.verbs import step
    from lora_lab.files.disk import refuse_existing
    from lora_lab.fusing.fuse import FuseOptions, Fusion
    from lora_lab.hub import checkpoint_folder

    path, folder, inputs = output.path(), checkpoint_folder(base), [Path(adapter) for adapter in adapters]
    refuse_existing(path, force=output.force, inputs=[folder, *inputs])
    loaded = loading.load(adapters)
    fusion = Fusion(folder, loaded, FuseOptions(how.coefficients, how.heads, how.max_shard_size))
    files = f"{len(fusion.shards)} file{'s' if len(fusion.shards) > 1 else ''}"
    messages.print(f"to be written: {size(fusion.bytes)} in {files}, about {duration(fusion.seconds)}")
    with progress("fusing") as report:
        place, record = device.resolved(), {"recipe": {"steps": [step()]}}
        fused = fusion.write(path, force=output.force, inputs=inputs, device=place, progress=report, record=record)
    said: dict[str, Any] = {
        "path": str(path),
        "base": base,
        "adapters": labels_of(loaded),
        "coefficients": fusion.changes.coefficients,
        **{name: value for name, value in vars(fused).items() if name != "path"},
    }
    if output.json:
        print_json(said)
    else:
        show(said)


def show(report: dict[str, Any]) -> None:
    """What was fused, as a table."""
    rows: list[tuple[str, object]] = [("base", report["base"])]
    for label, coefficient in zip(report["adapters"], report["coefficients"], strict=True):
        rows.append(("adapter", label if coefficient == 1 else f"{coefficient:g} × {label}"))
    rows.append(("parameters changed", report["parameters"]))
    error = f"{report['error']:.4g}" if report["error"] else "0"
    if report["error"]:
        worst = max(report["errors"], key=lambda name: report["errors"][name])
        error += f", most in {worst}: {report['errors'][worst]:.4g}"
    rows.append(("relative error of ΔW, from rounding", error))
    rows.append(("written", f"{size(report['bytes'])}, {len(report['files'])} files"))
    if report["resumed"]:
        rows.append(("finished by an earlier run", f"{report['resumed']} files"))
    rows += [("note", note) for note in report["notes"]]
    table(f"Fused to {report['path']}", ("", ""), rows, texts=2)
