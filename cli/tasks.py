"""`lora-lab tasks`: what can be trained and scored on."""

from __future__ import annotations

from typing import Annotated

import typer

from . import common


def command(
    example: Annotated[
        str | None, typer.Option(help="Print a commented task file of this kind, e.g. text-classification.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the built-in tasks, or print a file that describes a task of your own.

    Example:  lora-lab tasks --example text-classification > my-task.toml
    """
    from .. import tasks
    from ..tasks.task import SPLITS

    if example is not None:
        print(tasks.example(example), end="")
        return
    rows = [
        {"name": t.name, "labels": t.labels, "about": t.about, **{s: len(t.split(s)) for s in SPLITS}}
        for t in tasks.iterate()
    ]
    if json:
        common.print_json(rows)
        return
    headings = ("task", "labels", *SPLITS, "what is asked")
    common.table(
        "Built-in tasks", headings, [[r["name"], r["labels"], *(r[s] for s in SPLITS), r["about"]] for r in rows]
    )
    common.console.print(f"Kinds of task files: {', '.join(tasks.KINDS)} (--example KIND prints one)")
