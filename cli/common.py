"""What several verbs share: where output goes, tables, progress."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import FileError, LoraLabWarning, OptionError
from ..escape import visible, visible_json
from ..files.disk import refuse_existing
from ..files.ownership import foreign
from .terminal import Plain

if TYPE_CHECKING:
    import torch

    from ..analysis.game import Cost
    from ..results.result import Result
    from ..scoring.workers import Workers

# In a pipe or a file there is no width to keep to, and a cut table would lose numbers.
console = Plain(width=None if sys.stdout and sys.stdout.isatty() else 160)
messages = Plain(stderr=True)


class Outputs:
    """The files that a verb leaves in a folder: <verb>.json, .pdf, .png, and a journal while it runs."""

    def __init__(self, folder: Path, verb: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder}: not a folder; -o names the folder for {verb}.json and its figure")
        self.folder = folder
        self.json, self.pdf, self.png = (folder / f"{verb}.{ending}" for ending in ("json", "pdf", "png"))
        self.journal = folder / f".{verb}.journal"
        self.cache = folder / ".outcomes"
        """Per-example scores, by adapter and data, that every later question below this folder finds again."""

    def earlier(self, run: str, *, force: bool) -> Result | None:
        """The result of this very run, if it is there already, its figure drawn again where that is missing.

        Another run's result is in the way unless forced; one that is damaged counts as none, which is told.
        """
        from ..results.result import Result

        refuse_existing(*(path for path in (self.pdf, self.png) if path.exists()), force=True)
        if force or not os.path.lexists(self.json):
            refuse_existing(self.json, force=force)
            return None
        reason = foreign(self.json)
        try:
            found = Result.load(self.json)
        except FileError as error:
            if reason:
                refuse_existing(self.json, force=False)
            warnings.warn(f"{error}; computed again", LoraLabWarning, stacklevel=2)
            return None
        if found.provenance.get("run") != run:
            refuse_existing(self.json, force=False)
        messages.print(f"{self.json}: this very result is there already; --force replaces it")
        self.journal.unlink(missing_ok=True)  # of a run that was killed when all was done but this
        self._draw_missing(found)
        return found

    def save(self, result: Result) -> list[Path]:
        """Write the result and its figure; the journal is done with."""
        from .. import plots

        drawn = plots.figure([result])  # first: a result that cannot be drawn is not left behind alone
        result.save(self.json)
        plots.save(drawn, self.pdf, self.png, force=True)
        self.journal.unlink(missing_ok=True)
        return [self.json, self.pdf, self.png]

    def _draw_missing(self, result: Result) -> None:
        from .. import plots

        missing = [path for path in (self.pdf, self.png) if not plots.shows(path, [result])]
        if missing:
            plots.save(plots.figure([result]), *missing, force=True)
            say_written(missing)


def print_json(content: object) -> None:
    """Strict JSON on standard output."""
    from ..results.result import finite

    print(visible_json(json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)))


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int = 1) -> None:
    """A table on standard output; the first column (or so many) is text, the others are set right."""
    shown = Table(
        title=visible(title), title_justify="left", box=None, pad_edge=False, padding=(0, 1), header_style="bold"
    )
    for i, heading in enumerate(headings):
        heading = "\n".join(map(visible, heading.split("\n")))
        shown.add_column(heading, justify="left" if i < texts else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(visible(cell) if isinstance(cell, str) else number(cell) for cell in row))
    console.print(shown)


def number(value: object, digits: int = 3) -> str:
    """A number for a table; – for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def estimate(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval."""
    return number(value) if low is None else f"{number(value)} [{number(low)}, {number(high)}]"


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, on standard error, gone when the work is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=messages, transient=True) as shown:
        row = shown.add_task(visible(what), total=None)

        def report(done: int, total: int) -> None:
            shown.update(row, completed=done, total=total)

        yield report


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


def say_written(paths: Iterable[Path]) -> None:
    """Name the files written, on standard error."""
    messages.print("wrote " + ", ".join(str(path) for path in paths))


def parse_seeds(text: str) -> list[int]:
    """'0-4' or '0,3,7' → seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            seeds += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as error:
            raise OptionError(f"seeds {text!r}: numbers and ranges are needed, such as 0-4 or 0,3,7") from error
    if not seeds or len(set(seeds)) < len(seeds):
        raise OptionError(f"seeds {text!r}: one or more different seeds are needed, such as 0-4")
    return seeds


def parse_renames(given: Sequence[str] | None) -> list[tuple[str, str]]:
    """['model=model.language_model'] → [('model', 'model.language_model')]."""
    found = []
    for text in given or []:
        old, equals, new = text.partition("=")
        if not equals or old == new:
            raise OptionError(f"--rename {text!r}: OLD=NEW is needed, two different beginnings of modules' names")
        found.append((old.strip("."), new.strip(".")))
    return found


def parse_groups(given: Sequence[str]) -> str | dict[str, str]:
    """['block'] → 'block'; ['low=layers\\.[0-2]\\.', …] → {name: regular expression}."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    pairs = [text.partition("=") for text in given]
    for name, equals, pattern in pairs:
        if not (name and equals and pattern):
            raise OptionError(f"group {name!r}: NAME=REGEX is needed, or one of block, module alone")
    return {name: pattern for name, _, pattern in pairs}


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


def computed(
    outputs: Outputs,
    run: str,
    what: str,
    compute: Callable[..., Result],
    *,
    force: bool,
    yes: bool,
    ray: str | None,
    device: str | None,
) -> Result:
    """The result of this very run if it is there, else computed (asking first if it is long), saved and named."""
    result = outputs.earlier(run, force=force)
    if result is None:
        ask = confirm(yes)
        with workers_on(ray, device) as (workers, place), progress(what) as report:
            result = compute(cache=outputs.cache, progress=report, confirm=ask, workers=workers, device=place)
        say_written(outputs.save(result))
    return result


def parse_players(given: Sequence[str] | None) -> str | dict[str, str]:
    """['type'] → 'type'; ['attention=attn', …] → {name: regular expression}."""
    if not given:
        return "layer"
    return parse_groups(given)


def parse_set(given: Sequence[str] | None, known: Mapping[str, object], what: str) -> dict[str, int | float | str]:
    """['nodes=5'] → {'nodes': 5}; `known` has the options' defaults, whose types they get."""
    from ..errors import unknown

    found: dict[str, int | float | str] = {}
    for name, value in pairs(given).items():
        if name not in known:
            if not known:
                raise OptionError(f"{what} has no options to set")
            raise unknown(f"option of {what}", name, list(known))
        default = known[name]
        if isinstance(default, bool):
            found[name] = _truth(value, f"--set {name}={value}")
            continue
        kind = _literal(value) if default is None else type(default)
        try:
            found[name] = kind(value)  # type: ignore[call-arg]
        except ValueError as error:
            raise OptionError(f"--set {name}={value}: {name} is a {kind.__name__}") from error
    return found


def _truth(text: str, given: str) -> bool:
    """'true' → True."""
    if text.lower() not in ("true", "false"):
        raise OptionError(f"{given}: true or false is needed")
    return text.lower() == "true"


def parse_numbers(text: str, option: str) -> list[float]:
    """'0.1,1' → [0.1, 1.0]."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{option} {text!r}: numbers with commas between them are needed, as 0.5,1") from error
    if not all(math.isfinite(number) for number in numbers):
        raise OptionError(f"{option} {text!r}: finite numbers are needed")
    return numbers


def pairs(given: Sequence[str] | None) -> dict[str, str]:
    """['nodes=5'] → {'nodes': '5'}."""
    found = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"--set {text!r}: NAME=VALUE is needed")
        if name in found:
            raise OptionError(f"--set {name} is given twice")
        found[name] = value
    return found


def keywords(function: Callable[..., object]) -> dict[str, object]:
    """The keyword-only options of a function, with their defaults."""
    import inspect

    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _literal(text: str) -> type[int] | type[float]:
    """The type of an option that has no default: a whole number where it is written as one."""
    return int if text.lstrip("+-").isdigit() else float


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
