"""`lora-lab verify`: whether a checkpoint has an adapter in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lora_lab.cli.options import AsJson, Device, Loading
from lora_lab.cli.terminal import console, messages, print_json, progress, size, table
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.progress import duration
from lora_lab.registry import Later

_SHOWN = 20  # parameters that are not as they should be; all are in the JSON


@dataclass(frozen=True)
class Expecting:
    """How the adapters should be in the checkpoint."""

    coefficients: tuple[float, ...] = option((), "One an adapter (1,0.5), by which its ΔW is multiplied; by default 1.")
    heads: str | None = option(
        None,
        "What becomes of heads and other whole tensors in which adapters differ: NAMES; by default they are refused.",
        names=Later("lora_lab.fusing.changes", "HEADS"),
    )


def command(
    *,
    base: Annotated[str, typer.Argument(help="Folder or file of the base's weights, or a hub id in the cache.")],
    paths: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER... MERGED", help="The adapter (or several), then the checkpoint in question."),
    ],
    how: Expecting,
    loading: Loading,
    device: Device,
    output: AsJson,
) -> None:
    """Is this checkpoint the base with the adapter in it? One verdict, and what became of every weight.

    The adapter adds ΔW to each weight that it changes. For each: exact, up to the rounding of its dtype, scaled by a
    factor (with the mistake that makes it), missing, transposed or other; and which tensors changed that no adapter
    names. Exit code 0 for yes, 1 for no.

    Example:  lora-lab verify ./llama-3-8b a.safetensors ./merged
    """
    from lora_lab import files
    from lora_lab.fusing.verify import BYTES_A_SECOND, verify
    from lora_lab.hub import checkpoint_folder

    if len(paths) < 2:
        raise OptionError("a base, one adapter or more, and the checkpoint to verify are needed")
    *adapters, merged = paths
    before, after = checkpoint_folder(base), checkpoint_folder(merged)
    loaded = loading.load(adapters)
    count = sum(files.open_checkpoint(each).bytes for each in (before, after))
    messages.print(f"to be read: {size(count)}, about {duration(count / BYTES_A_SECOND)}")
    place, settings = device.resolved(), vars(how)
    with progress("verifying") as report:
        found = verify(before, loaded, after, **settings, device=place, progress=report)
    if output.json:
        rows = [{**vars(finding), "right": finding.right} for finding in found.findings]
        print_json(
            {
                "path": merged,
                "right": found.right,
                "verdict": found.verdict,
                "unchanged": found.unchanged,
                "notes": list(found.notes),
                "findings": rows,
            }
        )
    else:
        show(found)
    if not found.right:
        raise typer.Exit(1)


def show(found: Any) -> None:
    """The verdict, how many weights are what, and those that are not as they should be."""
    kinds = Counter(finding.kind for finding in found.findings)
    table("Parameters", ("", "how many"), [*kinds.most_common(), ("as in the base", found.unchanged)])
    wrong = [finding for finding in found.findings if not finding.right]
    if wrong:
        headings = ("parameter", "is", "meaning", "× ΔW", "‖W' − W − ΔW‖ / ‖ΔW‖")
        rows = [(f.parameter, f.kind, f.meaning, f.factor, f.residual) for f in wrong[:_SHOWN]]
        table("Not as they should be", headings, rows, texts=3)
        if len(wrong) > _SHOWN:
            console.print(f"and {len(wrong) - _SHOWN} more; --json lists them")
    for note in found.notes:
        messages.print(f"note: {note}")
    console.print(found.verdict)
