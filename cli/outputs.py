"""Where results go, and the way from a question to its answer there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.analysis.question import Question
from lora_lab.cli.options import Computing, OneTask, Output, Reading, TaskEach
from lora_lab.cli.terminal import messages, say_written
from lora_lab.errors import FileError, LoraLabWarning

if TYPE_CHECKING:
    from lora_lab.results.result import Result


def answer(
    question: Question,
    paths: Sequence[str],
    loading: Reading,
    task: OneTask | TaskEach,
    computing: Computing,
    output: Output,
    *,
    doing: str,
    more: Callable[[Any, Any], dict[str, Any]] = lambda *_: {},
) -> Result:
    """The result of this very question if it is there, else computed, saved and named.

    `more` gives further arguments of `question.run` for the adapters and the task, and refuses what does not fit.
    """
    outputs = Outputs(output.output, question.kind)
    beside = outputs.beside(output)
    adapters = loading.load(paths)
    question.check(adapters)
    chosen: Any = task.of(adapters)
    further = more(adapters, chosen)
    result = outputs.earlier(question.run_id(adapters, chosen), force=output.force)
    if result is None:
        with computing.execution(doing, outputs.cache) as on:
            result = question.run(adapters, chosen, on, **further)
        say_written(outputs.save(result))
    save_tables(result, beside)
    return result


def save_tables(result: Result, beside: Sequence[Path], columns: Sequence[str] | None = None) -> None:
    """Write the tables that are wanted, and name them; `columns` of the one for LaTeX, if not the usual ones."""
    from lora_lab.results import tables

    for path in beside:
        say_written(tables.save(result, path, columns=columns))


class Outputs:
    """The files that a verb leaves in a folder: <verb>.json, .pdf and .png, and beside them what was scored.

    Without `drawn`, no figure.
    """

    def __init__(self, folder: Path, verb: str, *, drawn: bool = True) -> None:
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder}: not a folder; -o names the folder for {verb}.json and its figure")
        self.folder = folder
        self.json, self.pdf, self.png = (folder / f"{verb}.{ending}" for ending in ("json", "pdf", "png"))
        self.cache = folder / ".outcomes"
        """Per-example scores, by adapter and data, that every later question below this folder finds again."""
        self._verb, self._drawn = verb, drawn

    def beside(self, output: Output) -> list[Path]:
        """Where the tables go that are wanted; refused where other files are in the way."""
        from lora_lab.results import tables

        paths = [self.folder / f"{self._verb}.{ending}" for ending in output.tables]
        for path in paths:
            tables.refuse(path, force=output.force)
        return paths

    def earlier(self, run: str, *, force: bool) -> Result | None:
        """The result of this very run, if it is there already, its figure drawn again where that is missing.

        Another run's result is in the way unless forced; one that is damaged counts as none, which is told.
        """
        from lora_lab.files.disk import refuse_existing
        from lora_lab.files.ownership import foreign
        from lora_lab.results.result import Result

        refuse_existing(*(path for path in (self.pdf, self.png) if path.exists()), force=True)
        if force or not os.path.lexists(self.json):
            refuse_existing(self.json, force=force)
            return None
        reason = foreign(self.json)
        try:
            earlier = Result.load(self.json)
        except FileError as error:
            if reason:
                refuse_existing(self.json, force=False)
            warnings.warn(f"{error}; computed again", LoraLabWarning, stacklevel=2)
            return None
        if earlier.provenance.get("run") != run:
            refuse_existing(self.json, force=False)
        messages.print(f"{self.json}: this very result is there already; --force replaces it")
        self._draw_missing(earlier)
        return earlier

    def save(self, result: Result) -> list[Path]:
        """Write the result, and its figure if it is to have one."""
        if not self._drawn:
            for path in (self.pdf, self.png):  # of the result that is replaced, they would show other numbers
                path.unlink(missing_ok=True)
            result.save(self.json)
            return [self.json]
        from lora_lab import plots

        drawn = plots.figure([result])  # first: a result that cannot be drawn is not left behind alone
        result.save(self.json)
        plots.save(drawn, self.pdf, self.png, force=True)
        return [self.json, self.pdf, self.png]

    def _draw_missing(self, result: Result) -> None:
        if not self._drawn:
            return
        from lora_lab import plots

        missing = [path for path in (self.pdf, self.png) if not plots.shows(path, [result])]
        if missing:
            plots.save(plots.figure([result]), *missing, force=True)
            say_written(missing)
