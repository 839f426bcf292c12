"""Pages of the site that are tables of what there is: merges, all other names, results, functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


def written(pages: Path) -> list[str]:
    """Writes them all; the names of the pages."""
    return [merges(pages), names(pages), results(pages), api(pages)]


MERGES_HEAD = """# Merges

**What this page answers:** what does each merge compute, who published it, and which of its variants is this?

ΔWᵢ = BᵢAᵢ is what adapter i of T adds to the weight of a module (its scale, α/r, is in Bᵢ), wᵢ its weight (1 unless
`--weights` says otherwise), and λ the option `scale`. The result is multiplied by `--coefficient`, too. ∘ multiplies
entry by entry, ‖·‖ is the Frobenius norm, U S Vᵀ a singular value decomposition. `inner` is another method that merges
within: `--set inner=NAME`. The gauge counts where other factors (BᵢR, R⁻¹Aᵢ) of the same ΔWᵢ give another merge.
`lora-lab merge --methods` lists the same, with `--json` for programs."""


def merges(pages: Path) -> str:
    """Every merge, from its registry: a table, then what is said of each."""
    from lora_lab.merging.methods import MERGES

    rows = ["| method | formula | works on | looks at |", "|---|---|---|---|"]
    parts = []
    for name, entry in MERGES.items():
        told = [entry.formula, entry.kind.about, entry.data]
        gauge = "does not count" if entry.gauge_free else "counts"
        rows.append("| " + " | ".join([f"[{name}](#{name})", *map(cell, told)]) + " |")
        options = ", ".join(
            f"`{key}`" if value is None else f"`{key}={value}`" for key, value in entry.defaults().items()
        )
        parts += [f"## {name}", prose(inspect.getdoc(entry.function) or "")]
        parts.append(
            f"*Source*: {prose(entry.source)}. *Variant*: {prose(entry.variant)} The gauge {gauge}. "
            f"*Options* (`--set`): {options or 'none'}."
        )
    (pages / "merges.md").write_text("\n\n".join([MERGES_HEAD, "\n".join(rows), *parts]) + "\n")
    return "merges.md"


def prose(text: str) -> str:
    """A docstring as Markdown: what would be read as emphasis, a link or a tag is text; names in backticks stay."""
    parts = text.split("`")
    return "`".join(part if i % 2 else re.sub(r"([*_\[\]<])", r"\\\1", part) for i, part in enumerate(parts))


NAMES_HEAD = """# What can be chosen by name

**What this page answers:** which patterns, metrics, estimators … are there, what is each, and where in the code?

Every table below is made from a registry of lora-lab, so that it has all of them; [merges](merges.md) have a page of
their own. A package of yours can add to each ([add a method](add-a-method.md)). ΔW = BA is what an adapter adds to a
weight matrix, and ‖·‖ the Frobenius norm."""


@dataclass(frozen=True)
class Listed:
    """A registry as a section of the page."""

    title: str
    module: str
    name: str
    told: str
    """What it is for, and the options that take its names."""
    more: tuple[str, Callable[[Any], str]] = ("", lambda entry: "")
    """Heading of another column, and what stands there of an entry."""


def _better(entry: Any) -> str:
    return f"{entry.unit or 'a number'}, {'more' if entry.higher else 'less'} is better"


LISTED = (
    Listed(
        "Training methods",
        "lora_lab.training.recipe",
        "METHODS",
        "`lora-lab train --method NAME`: what is switched off in training. CoTo is arXiv:2506.05713, stochastic depth "
        "Huang et al. 2016 (arXiv:1603.09382).",
    ),
    Listed(
        "Laws of masks", "lora_lab.training.schedule", "MASK_LAWS", "What a method's masks are drawn by, given p(t)."
    ),
    Listed(
        "Ramps",
        "lora_lab.training.schedule",
        "RAMPS",
        "`lora-lab train --ramp NAME`: p(t) over the share s of the way.",
    ),
    Listed(
        "Spaces of a line",
        "lora_lab.merging.paths",
        "SPACES",
        "`lora-lab interpolate --space NAME`: what is averaged, with weights 1−t and t on a line.",
    ),
    Listed(
        "Barriers",
        "lora_lab.analysis.lines.connectivity",
        "BARRIERS",
        "All of them are in every result of `interpolate`. L(t) is the metric where less is better; of a share it is "
        "what is left to 1.",
    ),
    Listed(
        "Trained curves",
        "lora_lab.analysis.lines.curves.control_points",
        "CURVES",
        "`lora-lab curve --shapes NAME`: from adapter a to adapter b by a control point c that is trained.",
    ),
    Listed(
        "Sets of players",
        "lora_lab.adapters.groups",
        "PLAYERS",
        "`--players NAME` of `shapley`, `stability`, `prune` and `interpolate`: what is switched on or off as one.",
    ),
    Listed(
        "Worths",
        "lora_lab.analysis.coalitions.game",
        "WORTHS",
        "`lora-lab shapley --worth NAME`: how good the model is with some players on. Every metric of the task is a "
        "worth, too.",
    ),
    Listed(
        "Estimators of Shapley values",
        "lora_lab.games.estimators",
        "ESTIMATORS",
        "`lora-lab shapley --estimator NAME`. v(S) is the worth with the players S on; gᵢ is a gate from 0 to 1 that "
        "multiplies the update of player i, and f the worth as a function of all gates. What makes an estimator biased "
        "stands in its results.",
        ("options (`--set`)", lambda entry: ", ".join(f"`{key}={value}`" for key, value in entry.options.items())),
    ),
    Listed(
        "Patterns of modules",
        "lora_lab.pruning.patterns",
        "KEEPS",
        "`lora-lab prune --keep NAME`: what is kept. Layers count from 0 within each encoder; modules outside of "
        "layers are kept; players are layers unless `--players` says otherwise.",
        ("after a colon", lambda entry: entry.argument),
    ),
    Listed(
        "Criteria for entries",
        "lora_lab.pruning.entries",
        "CRITERIA",
        "`lora-lab prune --method NAME --sparsity S`: which entries become 0.",
    ),
    Listed(
        "Orders of ranks",
        "lora_lab.pruning.ranks",
        "RANK_ORDERS",
        "`lora-lab prune --rank-by NAME`: the first ones stay.",
    ),
    Listed(
        "Nulls of an adapter",
        "lora_lab.geometry.nulls",
        "NULLS",
        "`lora-lab compare-merges --nulls NAME`: adapters that keep of the real one what is named here, and the norm "
        "of ΔW in every module; the rest is random ([merge tables](merge-tables.md)).",
    ),
    Listed(
        "Metrics",
        "lora_lab.tasks.scores.metrics",
        "METRICS",
        "`--metric NAME` of every verb that scores. A task offers those whose columns it has.",
        ("unit", _better),
    ),
    Listed(
        "Behaviour of models that write",
        "lora_lab.analysis.behaviour",
        "OF_TOKENS",
        "Columns of `evaluate` and `interpolate` with `--behaviour TEXTS` ([behaviour](behaviour.md)).",
        ("unit", _better),
    ),
    Listed(
        "Behaviour of classifiers",
        "lora_lab.analysis.behaviour",
        "OF_LABELS",
        "The same of models that give labels.",
        ("unit", _better),
    ),
    Listed(
        "Kinds of tasks",
        "lora_lab.tasks",
        "KINDS",
        '`kind = "NAME"` in a task file; `lora-lab tasks --example NAME` prints one with comments.',
    ),
    Listed(
        "Formats of files",
        "lora_lab.adapters.formats.registry",
        "FORMATS",
        "`lora-lab convert --to NAME`; what is in a file is recognised ([formats](formats.md)).",
        ("", lambda entry: "read and written" if entry.write else "read"),
    ),
    Listed(
        "Statistics of claims",
        "lora_lab.claims.statistics",
        "STATISTICS",
        '`statistic = "NAME"` in a file of claims for `lora-lab reproduce --claims FILE`.',
        ("from", lambda entry: f"`{entry.verb}`" if entry.verb else "logs of `train`"),
    ),
    Listed(
        "Views of results",
        "lora_lab.plots",
        "PLOTS",
        "`lora-lab figure RESULT --kind NAME -o FILE`.",
        ("of results of", lambda entry: f"`{entry.kind}`"),
    ),
)


def names(pages: Path) -> str:
    """Every other name that can be chosen, from its registry: what it is, and where it is made."""
    parts = [NAMES_HEAD]
    for each in LISTED:
        registry: Mapping[str, Any] = getattr(import_module(each.module), each.name)
        heading, more = each.more
        wide = any(more(entry) for entry in registry.values())
        rows = [f"| name | what it is |{f' {heading} |' if wide else ''} in |", f"|---|---|{'---|' * wide}---|"]
        for name, entry in registry.items():
            told = [f"`{name}`", cell(about(entry)), *([cell(more(entry))] if wide else []), f"`{made_in(entry)}`"]
            rows.append("| " + " | ".join(told) + " |")
        parts += [f"## {each.title}", f"{each.told} In the code: `{each.module}.{each.name}`.", "\n".join(rows)]
    (pages / "names.md").write_text("\n\n".join(parts) + "\n")
    return "names.md"


def about(entry: Any) -> str:
    """What an entry says of itself, or else the first line of the docstring of what makes it."""
    said = getattr(entry, "about", "") or getattr(entry, "title", "")
    return str(said or (inspect.getdoc(_maker(entry)) or "").split("\n\n")[0]).removesuffix(".")


def made_in(entry: Any) -> str:
    """The function or class behind an entry; of a private one the module alone."""
    maker = _maker(entry)
    maker = maker if maker.__module__.startswith("lora_lab") else type(entry)
    name = re.split(r"\.<", maker.__qualname__)[0]
    place = [maker.__module__.removeprefix("lora_lab.")]
    return ".".join(place if name.startswith(("_", "<lambda>")) else [*place, name])


def _maker(entry: Any) -> Any:
    """A function itself, or the class whose method or the function that an entry is most of all made of."""
    fields = {} if inspect.isroutine(entry) else vars(entry)
    functions = [entry, *(fields.get(name) for name in ("ranking", "control", "read")), *fields.values()]
    function = next((value for value in functions if inspect.isroutine(value)), None)
    owner = getattr(function, "__self__", None)
    return owner if inspect.isclass(owner) else function or type(entry)


RESULTS_HEAD = """# Results

**What this page answers:** what is in the JSON file that a command leaves, and what does each column mean?

A verb leaves its numbers in one JSON file, which figures, tables and reports are made of. `lora-lab schema KIND` prints
what stands here, and `lora-lab schema KIND --json` a JSON Schema (2020-12) to check files by. Each file holds

| key | what it holds |
|---|---|
| `format`, `kind`, `schema` | `lora-lab result 1`, the kind (a heading below), the version of its schema |
| `columns` | the main table, `rows` below: name → a list of values, all lists of one length |
| `summary` | the other tables of the kind, each a list of objects: name of the table → its rows |
| `parameters` | what was asked: every option, the task, its metrics |
| `provenance` | what it hangs on: command, versions, hashes of the inputs, seeds, time |
| `sha256` | of all the rest; a file that was changed is refused |

Shares are fractions from 0 to 1 and losses are in nats (natural logarithms). For a number x with an interval, x_low and
x_high are the ends of its 95 % interval. What is not finite is null. In Python, `Result.load(path)` of
`lora_lab.results.result` reads a file; `.rows()`, `.frame("table")`, `.to_csv("table")` give a table."""


def results(pages: Path) -> str:
    """Every kind of result with its tables and columns, from its schema."""
    from lora_lab.results.schema import documented, kinds

    parts = [RESULTS_HEAD]
    for name, kind in kinds().items():
        rows = [f"## {name}", kind.meaning + ".", "| table | column | type | unit | meaning |\n|---|---|---|---|---|"]
        lines = ["| " + " | ".join(cell(str(value)) for value in each.values()) + " |" for each in documented(name)]
        parts += [*rows[:2], "\n".join([rows[2], *lines])]
    (pages / "results.md").write_text("\n\n".join(parts) + "\n")
    return "results.md"


def api(pages: Path) -> str:
    """The functions of `import lora_lab as ll`, from their docstrings."""
    import lora_lab

    parts = ["# Python", "**What this page answers:** which functions are there after `import lora_lab as ll`?"]
    for name in lora_lab.__all__:
        module = getattr(lora_lab, name).__module__
        parts.append(f"::: {module}.{name}")
    (pages / "python.md").write_text("\n\n".join(parts) + "\n")
    return "python.md"


def cell(text: str) -> str:
    """A text in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
