"""`lora-lab shapley`: what each part of an adapter contributes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.analysis.questions import Shapley
from lora_lab.cli import parsing
from lora_lab.cli.options import Coalitions, OneTask, Output, Several
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, messages, progress, table


def command(
    *,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Adapters; without one, the newest of your own below this folder, or else one is trained."),
    ] = None,
    question: Shapley,
    task: OneTask,
    loading: Several,
    computing: Coalitions,
    output: Output,
) -> None:
    """Shapley values: how much of the worth each layer's adapter (or module, type, rank …) contributes.

    A player is what is switched on or off, a layer's adapter unless --players says otherwise; a coalition is a set of
    players that are on, and its worth is how good the model is then. A player's value is what it adds on joining,
    averaged over all orders of joining; together they add up to what the whole adapter is worth above the base.
    **exact** asks for all 2^n coalitions of n players. **antithetic** walks random orders forth and back: unbiased,
    with honest standard errors. **regression** fits pairs of coalitions: usually a much smaller error for the same
    work, with a slight bias that vanishes. **joint** fits what gradients leave over of such pairs: the smallest error
    from any number of them, and from none at all (--budget 2).

    **gates** asks for no coalitions but the two ends: a gate from 0 to 1 multiplies each player's update, and gradients
    at a few nodes along equal gates (nodes=3; each costs about three passes, whatever the number of players) give
    Aumann–Shapley values, which differ a little from Shapley's; the efficiency gap tells part of that. **link** makes
    Shapley values of them, usually closer; **antithetic+link** and **permutation+link** draw orders for what these
    leave over: unbiased, with much smaller errors than orders alone. For accuracy, which has no gradient, the gates see
    σ(margin / temperature), σ the logistic function; that may take more nodes (joint sees every example's margin).
    batch=8 saves memory.

    Cheaper rankings, which add up to nothing: **taylor** (the slope with everything on), **sensitivity** (its mean size
    over coalitions, passes=16) and **drop** (how large a share of the outputs is, LoRA-drop).

    Every coalition is kept in the output folder, so another question about the same adapter starts from there, and so
    does a run that was killed.

    Example:  lora-lab shapley a.safetensors --players type-layer --samples 50 --worth loss

    Example:  lora-lab shapley a.safetensors --players rank --worth loss --estimator gates
    """
    from lora_lab.games.estimators import ESTIMATORS

    if question.options:
        entry = ESTIMATORS.get(question.estimator)
        options = parsing.typed(
            question.options, entry.options if entry else {}, question.estimator or "the default estimator"
        )
        question = replace(question, options=options)
    paths = adapters or [_found_or_trained()]
    output.print(answer(question, paths, loading, task, computing, output, doing="asking for coalitions"), show)


def show(result: Any) -> None:
    """The result as tables."""
    from lora_lab.games.estimators import ESTIMATORS

    n, worth = result.provenance["examples"], result.parameters["worth"]
    for summary in result.summary["adapters"]:
        rows = result.rows(adapter=summary["adapter"])
        second = summary.get("disagreement", {}).get("estimator")
        headings = ["player", "value [95 %]", "s.e. of sampling", "s.e. of examples", *([second] if second else [])]
        cells = [
            (
                row["player"],
                estimate(row["value"], row["low"], row["high"]),
                row["se"],
                row["se_examples"],
                *([row["second"]] if second else []),
            )
            for row in rows
        ]
        entry = ESTIMATORS.get(summary["estimator"])
        what = "Ranking" if entry and entry.ranking else "Shapley values"
        title = f"{what} of {summary['adapter']}: {worth}, {result.parameters['split']} split, {n} examples"
        table(title, headings, cells)
        _show_summary(summary)
        console.print()
    _show_interactions(result)


def _show_summary(summary: dict[str, Any]) -> None:
    say = console.print
    engine = summary["engine"]
    say(
        f"{summary['estimator']}, {summary['evaluations']} coalitions: worth {summary['empty']:.3f} with nothing on, "
        f"{summary['full']:.3f} with everything; efficiency gap {summary['efficiency_gap']:.1e}"
    )
    if summary["bias"]:
        say(f"biased by {summary['bias']}")
    gates = summary.get("gates")
    if gates:
        say(f"{gates['passes']} passes with gradients besides, over all examples")
    if gates and gates["largest"]:
        differs = f"differ by up to {gates['largest']:.3f} ({gates['player']})"
        say(f"Aumann–Shapley values from gates alone {differs}; their efficiency gap is {gates['efficiency_gap']:.1e}")
    if "disagreement" in summary:
        other = summary["disagreement"]
        differs = f"differs by up to {other['largest']:.3f} ({other['player']})"
        say(f"{other['estimator']} from the same coalitions {differs}")
    if summary["variation"] is not None:
        share = f", largest third holds {summary['top_third']:.0%}" if summary["top_third"] is not None else ""
        say(f"coefficient of variation {summary['variation']:.2f}{share}")
    if engine["naive_block_evaluations"]:
        saved = 1 - engine["block_evaluations"] / engine["naive_block_evaluations"]
        why = f" ({engine['why_not_shared']})" if engine["why_not_shared"] else ""
        say(f"{engine['block_evaluations']} block evaluations, {saved:.0%} saved by shared prefixes{why}")
    if summary["always_on"]:
        say(f"always on: {', '.join(summary['always_on'][:6])}{' …' if len(summary['always_on']) > 6 else ''}")


def _show_interactions(result: Any) -> None:
    for summary in result.summary["adapters"]:
        found = summary.get("interactions")
        if not found:
            continue
        names = found["players"]
        pairs = [
            (f"{names[i]} with {names[j]}", found["values"][i][j], found["half"][i][j], found["se"][i][j])
            for i in range(len(names))
            for j in range(i)
            if found["values"][i][j] is not None and found["se"][i][j] is not None
        ]
        rows = [
            (pair, estimate(value, value - half, value + half), se)
            for pair, value, half, se in sorted(pairs, key=lambda row: -abs(row[1]))[:10]
        ]
        title = f"Strongest interactions in {summary['adapter']} (above 0: more together than apart)"
        table(title, ("pair", "interaction [95 % of sampling]", "s.e. of sampling"), rows)
        console.print()


def _found_or_trained() -> str:
    """The newest of the user's own adapters below this folder, or one trained on the embedded digits."""
    from lora_lab import tasks
    from lora_lab.analysis.coalitions import shapley
    from lora_lab.training.recipe import Recipe
    from lora_lab.training.runs import Job, train_all

    found = shapley.newest_adapter(Path())
    if found is not None:
        messages.print(f"no adapter given: the newest of your own below this folder is {found}")
        return str(found)
    recipe = Recipe(method="coto", seed=0)
    path = Path("coto-s0.safetensors")
    messages.print(f"no adapter given and none of your own below this folder: training {path} on digits/relabel first")
    with progress("training") as report:
        train_all([Job(tasks.from_name("digits/relabel").record, recipe, path)], progress=report)
    return str(path)
