"""`lora-lab run`: the steps of a recipe, of which only those are run that something has changed for."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.cli.program import application
from lora_lab.cli.studies import recipes, stamps
from lora_lab.cli.terminal import messages, print_json, size, table
from lora_lab.errors import FileError
from lora_lab.options import option

_FORMAT = "lora-lab run 2"
"""Of the state; the number counts its versions."""


@dataclass(frozen=True)
class Running:
    """What is done with the steps."""

    dry_run: bool = option(False, "Check every step and tell what would be run, and why; nothing is written.")
    force: bool = option(False, "Run every step again, and replace outputs that this recipe did not write.")
    json: bool = option(False, "Print what was done as JSON.")


def command(recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")], how: Running) -> None:
    """Run the steps of a recipe: merges, prunings, conversions, fusions, scores, one after the other.

    A step is a verb with its options by their long names; paths are relative to the recipe's folder. All steps are
    checked before the first one is run. A step is run when its options, what it reads or what it wrote have changed
    since, and left alone otherwise; what is known of that lies beside the recipe in NAME.state.json. A merge may be
    written in mergekit's words, too (merge_method, models, parameters).

    Example:  lora-lab run recipe.yaml --dry-run
    """
    from lora_lab.files.disk import refuse_existing

    steps = recipes.read(recipe)
    if not how.dry_run:
        refuse_existing(recipes.state_of(recipe), force=True)
    state = _State(recipes.state_of(recipe))
    said = []
    with contextlib.chdir(recipe.parent):
        changed: set[str] = set()
        for step in steps:
            why = "asked for" if how.force else state.why(step, changed)
            entry = {"step": step.number, "verb": step.verb, "output": step.output, "run": why, **state.last(step)}
            entry["bytes"] = sum(map(stamps.bytes_below, stamps.places(step)))
            said.append(entry)
            if why and how.dry_run:
                changed.add(os.path.normpath(step.output))
            if why is None or how.dry_run:
                continue
            messages.print(f"{step.name} → {step.output}: {why}")
            stamp = stamps.stamp(step)  # of what may change while the step is run, it is not known what was read
            own = state.begin(step)
            entry |= _run(step, force=how.force or own)
            state.note(step, stamp, entry["seconds"], entry["peak_memory"])
    if how.json:
        print_json({"recipe": str(recipe), "dry_run": how.dry_run, "steps": said})
    else:
        show(said, dry=how.dry_run)


def _run(step: recipes.Step, *, force: bool) -> dict[str, Any]:
    accepted = {name for p in recipes.command_named(step.verb).params for name in p.opts}
    words = step.words(*(["--force"] if force else []), *(["--yes"] if "--yes" in accepted else []))
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for what `run` says
        application([step.verb])(words, standalone_mode=False)
    return {"seconds": round(time.perf_counter() - start, 3), "peak_memory": _peak()}


def _peak() -> int | None:
    """Bytes of memory that this process has had at most; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _State:
    """What each step was run with, and what it wrote: beside the recipe, sealed with the user's key."""

    def __init__(self, path: Path) -> None:
        from lora_lab import files
        from lora_lab.files import trust

        self._path, self._seal = path.absolute(), trust.seal
        self._steps: dict[str, Any] = {}
        if path.exists():
            with contextlib.suppress(FileError, KeyError, TypeError, AttributeError):
                content = files.read_json(path)
                if content["format"] == _FORMAT and content["seal"] == self._sealed(content["steps"]):
                    self._steps = content["steps"]

    def _sealed(self, steps: dict[str, Any]) -> str:
        return self._seal(json.dumps(steps, sort_keys=True).encode())

    def why(self, step: recipes.Step, changed: set[str]) -> str | None:
        """Why the step is to be run; None where it is up to date."""
        known = self._steps.get(step.output)
        made = next((path for path in step.inputs if os.path.normpath(path) in changed), None)
        if made:
            return f"{made} is made anew"
        if known is None:
            return "not run yet"
        if "begun" in known:
            return "its last run did not end"
        verb, arguments, read, data, version = known["stamp"]
        now = stamps.stamp(step)
        if [verb, arguments] != now[:2]:
            return "its options have changed"
        for path in {**now[2], **read}:
            if read.get(path) != now[2].get(path):
                return f"{path} has changed"
        if data != now[3]:
            return "the data or the base model of its task has changed"
        if version != now[4]:
            return f"lora-lab {now[4]} is not {version}, which wrote it"
        content = stamps.content_of(Path(step.output))
        if content is None:
            return f"{step.output} is not there"
        return None if content == known["wrote"] else f"{step.output} has changed"

    def begin(self, step: recipes.Step) -> bool:
        """Write down that the step is run from now on; whether this recipe has put there what lies at its output.

        That is what it noted in the end, or what came there since a run began that did not come to its end, and holds
        the very step that was run.
        """
        known, there = self._steps.get(step.output, {}), stamps.content_of(Path(step.output))
        own, begun = there is not None and there == known.get("wrote"), known.get("begun")
        if begun and not own and there is not None and there != begun["there"]:
            own = stamps.holds(Path(step.output), begun["step"])
        begun = {"there": there if own or not begun else begun["there"], "step": stamps.as_called(step)}
        self._steps[step.output] = {**known, "begun": begun, "wrote": there if own else known.get("wrote")}
        self._save()
        return own

    def last(self, step: recipes.Step) -> dict[str, Any]:
        """How long the step took when it was last run, and how much memory there was in use at most."""
        known = self._steps.get(step.output, {})
        return {"seconds": known.get("seconds"), "peak_memory": known.get("peak_memory")}

    def note(self, step: recipes.Step, stamp: list[Any], seconds: float, peak: int | None) -> None:
        """Write down that the step was run, and with what, as it was before; a later run goes on from it."""
        wrote = stamps.content_of(Path(step.output))
        self._steps[step.output] = {
            "stamp": stamp,
            "wrote": wrote,
            "seconds": seconds,
            "peak_memory": peak,
        }
        self._save()

    def _save(self) -> None:
        from lora_lab import files

        files.write_json(self._path, {"format": _FORMAT, "steps": self._steps, "seal": self._sealed(self._steps)})


def show(steps: list[dict[str, Any]], *, dry: bool) -> None:
    """The steps as a table."""
    rows = [
        (
            step["step"],
            step["verb"],
            step["output"],
            step["run"] or "up to date",
            size(step["bytes"]),
            "not known" if step["seconds"] is None else f"{step['seconds']:.1f} s",
            "not known" if step["peak_memory"] is None else size(step["peak_memory"]),
        )
        for step in steps
    ]
    title = "What would be run" if dry else "What was run"
    took = "took last" if dry else "took"
    table(title, ("step", "verb", "output", "why", "reads", took, "memory at most"), rows, texts=4)
