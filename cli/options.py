"""Options that several verbs share, each told once, with what is done with them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import typer

from lora_lab.cli import parsing
from lora_lab.cli.terminal import messages, print_json, progress
from lora_lab.errors import OptionError
from lora_lab.options import check_options, option
from lora_lab.progress import duration
from lora_lab.registry import Later
from lora_lab.scoring.execution import Cost, Execution

if TYPE_CHECKING:
    import torch

    from lora_lab.adapters.adapter import Adapter
    from lora_lab.adapters.files.serving import Fitted
    from lora_lab.results.result import Result
    from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Reading:
    """How an adapter is read where its files do not say."""

    help_panel: ClassVar = "Adapters"

    config: Path | None = option(None, "adapter_config.json for a file that has none in its header or beside it.")
    alpha: float | None = option(None, "lora_alpha, where no configuration is to be had.")
    adapter_name: str | None = option(None, "Which adapter, where the keys of a file hold several.")

    def load(self, paths: Sequence[str]) -> list[Adapter]:
        """The adapters."""
        from lora_lab.adapters.adapter import Adapter

        options: dict[str, Any] = {"config": self.config, "alpha": self.alpha, "adapter_name": self.adapter_name}
        return [Adapter.load(path, **options) for path in paths]


@dataclass(frozen=True)
class Loading(Reading):
    """How adapters are read, and brought to common names of modules."""

    rename: list[str] | None = option(
        None,
        "OLD=NEW: modules of an adapter that begin with OLD begin with NEW instead, as language_model.model="
        "model.language_model; an empty side stands for nothing (repeatable).",
    )

    def load(self, paths: Sequence[str]) -> list[Adapter]:
        """The adapters, renamed."""
        from lora_lab.adapters.renames import rename_all

        return rename_all(super().load(paths), parsing.renames(self.rename or []))


@dataclass(frozen=True)
class Several(Loading):
    """The same, of several adapters: what they are called, and which belong together."""

    label: list[str] | None = option(
        None,
        "A name for tables and figures, once for each adapter; by default its file's, with what tells it apart.",
    )
    group: list[str] | None = option(
        None,
        "METHOD=PATTERN: adapters whose path, file or label matches (with * and ?) were trained by that method; for "
        "files that do not record it, which are no group otherwise (repeatable).",
    )

    def load(self, paths: Sequence[str]) -> list[Adapter]:
        """The adapters, renamed, each with a name of its own."""
        from lora_lab.adapters.naming import named

        return named(super().load(paths), self.label or [], parsing.methods(self.group or []))


def _trust() -> Any:
    return option(
        False,
        "Take the adapters' records at their word: code that comes with the base, paths anywhere, any repository, "
        "revision and device map. Only for adapters whose makers you trust. Without it, one that was not made by your "
        "own lora-lab may name a built-in task, its own base, datasets on the hub, and files in its own folder.",
    )


@dataclass(frozen=True)
class OneTask:
    """The task that all adapters are scored on."""

    help_panel: ClassVar = "Task"

    task: str | None = option(None, "Built-in task or task file; by default the adapters' own.")
    trust_record: bool = _trust()

    def of(self, adapters: Sequence[Adapter]) -> Task:
        """The task."""
        from lora_lab.tasks.choosing import task_of

        return task_of(*adapters, given=self.task, trust_record=self.trust_record)


@dataclass(frozen=True)
class TaskEach:
    """The task of each adapter."""

    help_panel: ClassVar = "Task"

    task: list[str] | None = option(
        None, "Built-in task or task file, for all adapters or once for each; by default their own."
    )
    trust_record: bool = _trust()

    def of(self, adapters: Sequence[Adapter]) -> list[Task]:
        """A task for each adapter."""
        from lora_lab.tasks.choosing import tasks_of

        return tasks_of(adapters, self.task or [], trust_record=self.trust_record)


@dataclass(frozen=True)
class Device:
    """Where something small is computed, in this process."""

    help_panel: ClassVar = "Computing"

    device: str | None = option(None, "cpu, cuda …; by default a GPU where there is one.")

    def resolved(self) -> torch.device:
        """The device."""
        from lora_lab.tasks.task import resolve_device

        return resolve_device(self.device)

    def place(self) -> torch.device | None:
        """Where matrices are computed: on a device that is asked for, else on the CPU."""
        return None if self.device is None else self.resolved()


@dataclass(frozen=True)
class Workers(Device):
    """Where something large is computed, and by whom."""

    jobs: int | None = option(None, "Compute in so many processes of this machine; by default in one.", least=1)
    ray: str | None = option(
        None,
        "Compute on workers of a Ray cluster: auto (the one that runs), HOST:PORT, or local:N workers of its own; by "
        "default on none.",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Computing(Workers):
    """The same, and whether it may take long."""

    yes: bool = option(False, "Go on without asking, however long it takes.")

    @contextlib.contextmanager
    def execution(self, doing: str, cache: Path | None = None) -> Iterator[Execution]:
        """Workers, where they are asked for, and a bar while the context lasts."""
        import torch

        from lora_lab.scoring.sharing.workers import open_workers

        with open_workers(self.jobs, self.ray, self.device) as workers, progress(doing) as report:
            device = torch.device(workers.device) if workers else self.resolved()
            yield Execution(device=device, cache=cache, workers=workers, progress=report, confirm=self._confirm)

    def _confirm(self, cost: Cost) -> None:
        """Tell what a run will cost; one of more than ten minutes is asked about, or refused if nobody can answer."""
        shared = f" of {cost.naive_block_evaluations} without sharing" if cost.naive_block_evaluations else ""
        blocks = f"{cost.block_evaluations} block evaluations{shared}, " if cost.block_evaluations else ""
        messages.print(f"to be computed: up to {cost.variants} variants, {blocks}about {duration(cost.seconds)}")
        if cost.seconds <= _LONG or self.yes:
            return
        if not (sys.stdin and sys.stdin.isatty()):
            raise OptionError(
                f"this may take {duration(cost.seconds)}; --yes goes ahead, fewer samples or examples take less"
            )
        typer.confirm("go ahead?", abort=True, err=True)


@dataclass(frozen=True)
class Coalitions(Computing):
    """The same of what scores coalitions: how many go together."""

    batched: int | None = option(
        None,
        "Score so many coalitions in each forward pass. By default as many as pay on a GPU, and on a CPU one after "
        "another, as with 0. Scores are the same up to rounding, and are kept apart from others.",
        least=0,
        title="coalitions at once",
    )
    compile: bool = option(
        False, "Compile passes of several coalitions (torch.compile): minutes at first, for less in each of many."
    )

    @contextlib.contextmanager
    def execution(self, doing: str, cache: Path | None = None) -> Iterator[Execution]:
        """The same, which says so."""
        with super().execution(doing, cache) as on:
            yield replace(on, coalitions_at_once=self.batched, compile=self.compile)


def told(cost: Cost) -> None:
    """Say how many weights of a base are decomposed, and how long it takes."""
    messages.print(f"{cost.variants} weights of the base are decomposed: about {duration(cost.seconds)}")


_LONG = 600.0  # seconds from which a run is asked about first


@dataclass(frozen=True)
class AsJson:
    """How it is printed."""

    help_panel: ClassVar = "Output"

    json: bool = option(False, "Print JSON instead of a table.")


@dataclass(frozen=True)
class Output:
    """The folder that a result goes to with its figure, and what is printed of it."""

    help_panel: ClassVar = "Output"

    output: Path = option(Path("out"), "Folder for VERB.json, .pdf and .png.", flag="o output")
    force: bool = option(False, "Replace the results that are there.")
    json: bool = option(False, "Print the result as JSON instead of a table.")
    latex: bool = option(False, "Also write the main table as VERB.tex.")
    csv: bool = option(False, "Also write the rows as VERB.csv.")

    @property
    def tables(self) -> list[str]:
        """The endings of the tables that are wanted."""
        return [ending for wanted, ending in ((self.latex, "tex"), (self.csv, "csv")) if wanted]

    def print(self, result: Result, show: Callable[[Any], None]) -> None:
        """The result as JSON, or as tables."""
        if self.json:
            print_json(result.to_json())
        else:
            show(result)


@dataclass(frozen=True)
class AdapterFile:
    """The adapter that is written, and what is printed of how it was made."""

    help_panel: ClassVar = "Output"

    output: Path | None = option(
        None, "Where the adapter goes: NAME.safetensors, or a name for a folder. It has no default.", flag="o output"
    )
    force: bool = option(False, "Replace what is there.")
    json: bool = option(False, "Print what was done as JSON.")

    def path(self) -> Path:
        """Where the adapter goes; OptionError without."""
        if self.output is None:
            raise OptionError("-o names the adapter to write: NAME.safetensors, or a name for a folder")
        return self.output


@dataclass(frozen=True)
class AdapterOutput(AdapterFile):
    """The same, in a format, and made for a server."""

    format: str | None = option(
        None,
        "NAMES: the format that is written; by default the one that was read.",
        names=Later("lora_lab.adapters.formats.registry", "WRITTEN"),
    )
    server: str | None = option(
        None,
        "NAMES: write what that server or tool takes (one rank, its format, a list of modules …); what is changed is "
        "told, and what it cannot take is refused.",
        names=Later("lora_lab.adapters.files.serving", "SERVERS"),
        flag="for",
    )
    uniform_rank: bool = option(False, "One rank and one scale in all modules: smaller ranks are filled with zeros.")

    def path(self) -> Path:
        """Where the adapter goes; OptionError without, or where no such file is in the format or for the server."""
        path = super().path()
        if self.server is not None:
            from lora_lab.adapters.files.serving import server

            facts = server(self.server)
            if self.format not in (None, facts.format):
                raise OptionError(f"{self.server} takes the format {facts.format}, not {self.format}")
            if facts.folder and path.suffix == ".safetensors":
                raise OptionError(f"{path}: {self.server} takes a folder; a name without an ending is needed")
        if self.format is not None:
            self.check(self.format)
        return path

    def check(self, read: str) -> None:
        """Refuse a path that is none for the format, by default the one that was `read`; before anything is done."""
        if self.server is None:
            from lora_lab.adapters.files.writing import check_place

            check_place(super().path(), self.format or read)

    def fit(self, adapter: Adapter) -> Fitted:
        """The adapter as it is to be written, with the recipe that makes it again, and what a server changed in it."""
        from lora_lab.adapters.files.converting import converted
        from lora_lab.adapters.files.serving import Fitted, fitted, uniform
        from lora_lab.cli.verbs import step

        made = replace(adapter, record={**adapter.record, "recipe": {"steps": [step()]}})
        if self.server is not None:
            return fitted(made, self.server)
        even, changes = uniform(made) if self.uniform_rank else (made, [])
        written = converted(even, self.format)
        return Fitted(written.adapter, (*changes, *written.changes), self._hints(written.adapter))

    def _hints(self, adapter: Adapter) -> list[str]:
        """What is to be known of a lone file whose configuration other programs look for beside it."""
        from lora_lab.adapters.formats.registry import FORMATS

        if self.output is None or self.output.suffix != ".safetensors" or not FORMATS[adapter.layout.format].settings:
            return []
        return [
            "its configuration is in its header, where lora-lab reads it; other programs load a folder, which a name "
            "without an ending writes"
        ]


@dataclass(frozen=True)
class InPlace(AdapterOutput):
    """The same, where it may take the place of the one that was read."""

    in_place: bool = option(False, "Replace the adapter that is read, if lora-lab wrote it; without -o.")

    def at(self, adapter: str) -> Self:
        """With the place that it goes to; OptionError where both that of the adapter and another one are named."""
        if not self.in_place:
            return self
        if self.output is not None:
            raise OptionError("--in-place writes where the adapter lies, and -o elsewhere; one of them is needed")
        return replace(self, output=Path(adapter), force=True)

    def inputs(self, adapter: str) -> list[Path]:
        """What the output must not replace."""
        return [] if self.in_place else [Path(adapter)]
