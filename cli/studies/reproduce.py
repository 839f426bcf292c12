"""`lora-lab reproduce`: claims of papers put to the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.claims.claims import PUBLISHED
from lora_lab.claims.reproduce import Reproduce
from lora_lab.cli.options import Device, Output
from lora_lab.cli.outputs import Outputs, save_tables
from lora_lab.cli.terminal import console, estimate, messages, number, progress, say_written, table
from lora_lab.options import option

TABLE = ("claim", "task", "of_treated", "of_control", "difference", "verdict")
"""Columns of the table for LaTeX, between the second and third of which stand those of what was published."""


@dataclass(frozen=True)
class Side(Device):
    """How much runs side by side, and whether it begins."""

    jobs: int | None = option(
        None, "Trainings, and then questions, side by side, a process each; by default one a core.", least=1
    )
    published: bool = option(
        False,
        "Show the numbers that were published beside ours, here and in the table for LaTeX (CSV has them always).",
    )
    dry_run: bool = option(False, "Say what would be trained and judged, and by which rule; nothing else.")


def command(
    question: Reproduce,
    side: Side,
    output: Output,
    claims: Annotated[list[str] | None, typer.Argument(help="Names of claims; by default all.")] = None,
) -> None:
    """Put claims of papers to the test: train, measure, and say holds, does not hold, or cannot be told.

    Each claim is about a number of adapters trained in one way, and usually of its difference from another way, seed by
    seed. The rule is stated before the run: a claim **holds** where no difference is rejected; it **does not hold**
    where a difference as large as would count is rejected; else it **cannot be told**. Both p-values are corrected over
    all claims (Holm), at 0.05. Numbers that were published are no part of the rule; --published shows them beside ours.

    -o names a folder for everything: adapters, results, tables. A run that was cut off goes on; more seeds or claims
    compute what is new alone. Claims are rows of a TOML file: --claims FILE brings your own.

    Example:  lora-lab reproduce midpoint midpoint-matched --testbed digits --seeds 5 -o claims
    """
    from dataclasses import replace

    from lora_lab.scoring.execution import Execution

    question = replace(question, claims=tuple(claims or ()))
    plan = question.plan()
    trainings = len(list(plan.trainings())) * len(plan.seeds)
    judged = sum(bool(plan.tasks_of(claim)) for claim in plan.claims)
    messages.print(
        f"{judged} {'claim' if judged == 1 else 'claims'} on {plan.bed.name} ({plan.bed.about}): "
        f"{trainings} trainings, seeds 0 to {question.seeds - 1}{_time_of(trainings, plan.bed.training_s)}"
    )
    if side.dry_run:
        show_plan(plan)
        return
    outputs = Outputs(output.output, question.kind)
    beside = outputs.beside(output)
    _refuse(outputs.json, force=output.force)
    device = None if side.device is None else side.resolved()
    result = question.run(output.output, Execution(device=device), processes=side.jobs, stage=progress)
    say_written(outputs.save(result))
    save_tables(result, beside, TABLE[:2] + PUBLISHED + TABLE[2:] if side.published else None)
    output.print(result, lambda found: show(found, published=side.published))


def _refuse(path: Path, *, force: bool) -> None:
    """Another kind of file in the result's place is in the way; an earlier result of a run in this folder is not."""
    from lora_lab.errors import FileError
    from lora_lab.files.disk import refuse_existing
    from lora_lab.results.result import Result

    if force or not path.exists():
        return
    try:
        earlier = Result.load(path)
    except FileError:
        earlier = None
    if earlier is None or earlier.kind != Reproduce.kind:
        refuse_existing(path, force=False)


def _time_of(trainings: int, each: float | None) -> str:
    """How long they take, where the testbed says what one does."""
    from lora_lab.progress import duration

    return "" if each is None else f", about {duration(trainings * each)} of a core, before what is asked of them"


def show_plan(plan: Any) -> None:
    """What every claim says, and what would show it."""
    rows = [
        (
            claim.name,
            claim.says,
            f"{claim.statistic}: {claim.direction}",
            claim.least,
            "; ".join(map(str, claim.published)) or claim.source,
        )
        for claim in plan.claims
        if plan.tasks_of(claim)
    ]
    table(f"Claims on {plan.bed.name}", ("claim", "says", "number", "counts from", "published"), rows, texts=3)


def _published(row: Mapping[str, Any]) -> str:
    """The first of the numbers that were published for a claim, and their difference."""
    numbers = " → ".join(
        f"{row[name]:g}" for name in ("published_control", "published_treated") if row[name] is not None
    )
    difference = "" if row["published_difference"] is None else f"{row['published_difference']:+.4g}"
    said = "; ".join(filter(None, (numbers, difference)))
    unit = f" ({row['published_unit']})" if row["published_unit"] else ""
    return (f"{row['published_of']}: " if row["published_of"] else "") + said + unit if said else ""


def show(result: Any, *, published: bool = False) -> None:
    """A row for every claim, then how many there are of each verdict."""
    from lora_lab.shortening import last_parts

    said, found = result.parameters, result.rows()
    tasks = last_parts(task for row in found for task in row["task"].split(", "))
    shown = [[tasks[task] for task in row["task"].split(", ")] for row in found]
    rows = [
        (
            row["claim"],
            names[0] if len(names) == 1 else f"{len(names)} tasks",
            *([_published(row)] if published else []),
            number(row["of_treated"]),
            number(row["of_control"]),
            estimate(row["difference"], row["difference_low"], row["difference_high"]),
            row["verdict"],
        )
        for row, names in zip(found, shown, strict=True)
    ]
    headings = ("claim", "task", *(["published"] if published else []), "treated", "control", "difference", "verdict")
    table(f"Claims on {said['testbed']}, {said['seeds']} seeds", headings, rows, texts=3 if published else 2)
    console.print()
    for names in dict.fromkeys(map(tuple, shown)):
        if len(names) > 1:
            console.print(f"{len(names)} tasks: {', '.join(names)}")
    for row in found:
        if row["why"]:
            messages.print(f"{row['claim']} on {row['task']}: {row['why']}")
    console.print(", ".join(f"{count} {verdict}" for verdict, count in result.summary["verdicts"].items()))
