"""What several verbs share that are not made from dataclasses yet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from .outputs import Outputs as Outputs
from .parsing import groups, numbers, renames, seeds, typed
from .parsing import keywords as keywords
from .parsing import pairs as pairs
from .terminal import console as console
from .terminal import estimate as estimate
from .terminal import messages as messages
from .terminal import number as number
from .terminal import print_json as print_json
from .terminal import progress as progress
from .terminal import say_written as say_written
from .terminal import table as table

if TYPE_CHECKING:
    import torch

    from ..analysis.game import Cost
    from ..scoring.workers import Workers


parse_seeds, parse_numbers, parse_groups = seeds, numbers, groups


def parse_renames(given: Sequence[str] | None) -> list[tuple[str, str]]:
    """See parsing."""
    return renames(given or [])


def parse_players(given: Sequence[str] | None) -> str | dict[str, str]:
    """See parsing."""
    return parse_groups(given) if given else "layer"


def parse_set(given: Sequence[str] | None, known: Mapping[str, object], what: str) -> dict[str, int | float | str]:
    """See parsing."""
    return typed(pairs(given or []), known, what)


@contextlib.contextmanager
def workers_on(ray: str | None, device: str | None) -> Iterator[tuple[Workers | None, torch.device]]:
    """The workers that --ray asks for (None without it), and the device, theirs or this process's own."""
    import torch

    from ..scoring.workers import open_workers
    from ..tasks.task import resolve_device

    with open_workers(ray=ray, device=device) as workers:
        yield workers, torch.device(workers.device) if workers else resolve_device(device)


# Options that several verbs share, to the word.
TaskOption = Annotated[str | None, typer.Option(help="Built-in task or task file; by default the adapters' own.")]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--task", help="Built-in task or task file, for all adapters or once for each; by default their own."),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-record",
        help="Take the adapters' records at their word: code that comes with the base, paths anywhere, any repository, "
        "revision and device map. Only for adapters whose makers you trust. Without it, one that was not made by your "
        "own lora-lab may name a built-in task, its own base, datasets on the hub, and files in its own folder.",
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="adapter_config.json for a file that has none in its header or beside it.")
]
AlphaOption = Annotated[float | None, typer.Option(help="lora_alpha, where no configuration is to be had.")]
NameOption = Annotated[str | None, typer.Option(help="Which adapter, where the keys of a file hold several.")]
RenameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        help="OLD=NEW: modules of an adapter that begin with OLD begin with NEW instead, as language_model.model="
        "model.language_model; an empty side stands for nothing (repeatable).",
    ),
]
SplitOption = Annotated[str, typer.Option(help="train, validation or test.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda …; by default a GPU where there is one.")]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Compute on workers of a Ray cluster: auto (the one that runs), HOST:PORT, or local:N workers of its own.",
    ),
]
PlayersOption = Annotated[
    list[str] | None,
    typer.Option(help="layer, module, type, type-layer, encoder-type-layer, rank, or NAME=REGEX (repeatable)."),
]
ExamplesOption = Annotated[int | None, typer.Option(help="Score on so many examples of the split, drawn with seed 0.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Go on without asking, however long it takes.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the results that are there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


_LONG = 600.0  # seconds from which a run is asked about first


def confirm(yes: bool) -> Callable[[Cost], None]:
    """Tells what a run will cost; one of more than ten minutes is asked about, or refused where nobody can answer."""

    def ask(cost: Cost) -> None:
        shared = f" of {cost.naive_block_evaluations} without sharing" if cost.naive_block_evaluations else ""
        blocks = f"{cost.block_evaluations} block evaluations{shared}, " if cost.block_evaluations else ""
        messages.print(f"to be computed: up to {cost.variants} variants, {blocks}about {_duration(cost.seconds)}")
        if cost.seconds <= _LONG or yes:
            return
        if not (sys.stdin and sys.stdin.isatty()):
            raise OptionError(
                f"this may take {_duration(cost.seconds)}; --yes goes ahead, --examples and --samples shorten it"
            )
        typer.confirm("go ahead?", abort=True, err=True)

    return ask


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
