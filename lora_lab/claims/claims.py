"""Claims as rows of a TOML file, and the testbeds that they are put to; all is checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_lab.claims.statistics import STATISTICS
from lora_lab.claims.verdicts import DIRECTIONS
from lora_lab.errors import FileError, LoraLabError, OptionError, unknown
from lora_lab.files.toml import read_toml
from lora_lab.options import check_options, option

OWN = Path(__file__).parents[1] / "data" / "claims.toml"
"""The claims and testbeds that come with the package."""

PUBLISHED = ("published_of", "published_unit", "published_control", "published_treated", "published_difference")
"""Cells of a row with the first of the numbers that were published for its claim."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Published:
    """Numbers that were published for a claim, as they stand there."""

    of: str = option("", "What they are of: data, model, and whether they are read off a figure.")
    unit: str = option("", "Their unit.")
    control: float | None = option(None, "The control's.")
    treated: float | None = option(None, "The treated's.")
    difference: float | None = option(None, "Their difference, where that alone is told.")

    def __post_init__(self) -> None:
        check_options(self)
        given = self.control is not None or self.treated is not None
        if given == (self.difference is not None):
            raise OptionError("`published` needs control, treated or both, or else the difference alone")

    def __str__(self) -> str:
        if self.difference is not None:
            numbers = f"{self.difference:+g}".replace("-", "−")
        else:
            numbers = " → ".join(f"{each:g}" for each in (self.control, self.treated) if each is not None)
        return " ".join(
            filter(None, (self.of + ":" if self.of else "", numbers, f"({self.unit})" if self.unit else ""))
        )

    @property
    def cells(self) -> dict[str, Any]:
        """As rows of results have them."""
        both = self.control is not None and self.treated is not None
        difference = self.treated - self.control if both else self.difference  # type: ignore[operator]
        return dict(zip(PUBLISHED, (self.of, self.unit, self.control, self.treated, difference), strict=True))


@dataclass(frozen=True)
class Claim:
    """What is said of a way of training, and what would show it."""

    name: str = option(..., "How it is asked for.")
    says: str = option(..., "The claim, in a sentence.")
    source: str = option(..., "Who makes it, and where.")
    statistic: str = option(..., "The number that it is about.", choices=lambda: STATISTICS)
    direction: str = option(..., "What is claimed of it.", choices=lambda: DIRECTIONS)
    treated: Mapping[str, Any] = option(..., "Fields of the recipe whose adapters it is about.")
    least: float = option(..., "The smallest difference that counts, in the unit of the statistic.", least=0)
    control: Mapping[str, Any] | None = option(None, "Fields of the recipe that it is compared with; else a number.")
    against: float = option(0.0, "That number.")
    where: Mapping[str, Any] = option({}, "Which of the statistic's numbers.")
    options: Mapping[str, Any] = option({}, "Of the question that gives the statistic.")
    published: tuple[Published, ...] = option((), "Numbers that were published for it, the first of them beside ours.")
    shared_a: bool = option(
        False, "Whether adapters that are merged share their initial A over tasks; by default each has one of its own."
    )
    testbeds: tuple[str, ...] = option((), "Those that it can be put to; all, where none is named.")

    def __post_init__(self) -> None:
        check_options(self)
        needed, given = STATISTICS[self.statistic].where, list(self.where)
        for name in given:
            if name not in needed:
                raise unknown(f"`where` of statistic {self.statistic}:", name, needed)
        missing = [name for name in needed if name not in given]
        if missing:
            raise OptionError(f"statistic {self.statistic} needs {', '.join(missing)} in `where`")
        if self.shared_a and not STATISTICS[self.statistic].several:
            raise OptionError(f"shared_a is of adapters of several tasks; statistic {self.statistic} is of one")
        if STATISTICS[self.statistic].of_control and self.control is None:
            raise OptionError(f"statistic {self.statistic} is of two ways of training; a control is needed")
        if self.direction == "equal" and not self.least:
            raise OptionError("equal needs a `least` above 0: nothing is equal to the last digit")

    @property
    def trainings(self) -> list[Mapping[str, Any]]:
        """The ways of training that it needs."""
        return [self.treated] if self.control is None else [self.treated, self.control]

    @property
    def asked(self) -> list[list[Mapping[str, Any]]]:
        """The ways whose adapters its question is about, a list for every time that it is asked."""
        return [self.trainings] if STATISTICS[self.statistic].of_control else [[way] for way in self.trainings]


@dataclass(frozen=True)
class Testbed:
    """Tasks that claims are put to."""

    name: str = option(..., "How it is asked for.")
    about: str = option(..., "What it is.")
    tasks: tuple[str, ...] = option(..., "Names or files of tasks; each claim about one task is judged on each.")
    merged: tuple[str, ...] = option((), "Tasks whose adapters are merged with each other.")
    recipe: Mapping[str, Any] = option({}, "Fields of the recipe for all trainings, such as steps.")
    training_s: float | None = option(None, "CPU seconds of a training here, for an estimate.", above=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.tasks:
            raise OptionError("a testbed needs a task")


def read(path: Path = OWN) -> tuple[list[Claim], dict[str, Testbed]]:
    """Claims and testbeds of a file; FileError, which names the row and the field, where it is not as it should be.

    Of a file that lacks claims, or testbeds, they are those that come along. Task files are relative to the file that
    names them (those of the testbeds that come along, to the current folder).
    """
    content = read_toml(path, "a file of claims")
    rows, beds = content.pop("claim", []), content.pop("testbed", {})
    if content:
        raise FileError(f"{path}: [{next(iter(content))}]: [[claim]] and [testbed.NAME] are what a file of claims has")
    if not isinstance(rows, list) or not isinstance(beds, dict):
        raise FileError(f"{path}: claims are [[claim]] tables, testbeds [testbed.NAME] tables")
    claims = [_claim(row, f"{path}: claim {i + 1}{_called(row)}") for i, row in enumerate(rows)]
    seen: set[str] = set()
    for claim in claims:
        if claim.name in seen:
            raise FileError(f"{path}: two claims are called {claim.name!r}")
        seen.add(claim.name)
    testbeds = {
        name: _made(Testbed, {"name": name, **bed} if isinstance(bed, dict) else bed, f"{path}: testbed {name}")
        for name, bed in beds.items()
    }
    if path == OWN:
        return claims, testbeds
    own_claims, own_testbeds = ([], {}) if claims and testbeds else read()
    return claims or own_claims, {n: _beside(bed, path.parent) for n, bed in testbeds.items()} or own_testbeds


def _beside(bed: Testbed, folder: Path) -> Testbed:
    """The testbed with the paths of its task files from this folder."""
    tasks, merged = (
        tuple(str(folder / name) if name.endswith(".toml") else name for name in names)
        for names in (bed.tasks, bed.merged)
    )
    return dataclasses.replace(bed, tasks=tasks, merged=merged)


def chosen(claims: Sequence[Claim], names: Sequence[str], testbed: str) -> list[Claim]:
    """Those of these names (all, where none is given) that can be put to the testbed."""
    there = {claim.name: claim for claim in claims}
    for name in names:
        if name not in there:
            raise unknown("claim", name, there)
        if there[name].testbeds and testbed not in there[name].testbeds:
            raise OptionError(f"claim {name} can be put to {', '.join(there[name].testbeds)} alone, not to {testbed}")
    wanted = [there[name] for name in dict.fromkeys(names)] or list(claims)
    return [claim for claim in wanted if not claim.testbeds or testbed in claim.testbeds]


def _called(row: Any) -> str:
    """The name of a row in brackets, where it has one."""
    return f" ({row['name']})" if isinstance(row, dict) and isinstance(row.get("name"), str) else ""


def _claim(row: Any, where: str) -> Claim:
    """A claim with the numbers that were published for it."""
    if isinstance(row, dict) and isinstance(row.get("published"), list):
        told = row["published"]
        row = {
            **row,
            "published": [_made(Published, each, f"{where}: published {i + 1}") for i, each in enumerate(told)],
        }
    return _made(Claim, row, where)


def _made(cls: Callable[..., Made], row: Any, where: str) -> Made:
    """The dataclass of a table's fields; FileError, which says where, for others and for wrong values."""
    if not isinstance(row, dict):
        raise FileError(f"{where}: a table of fields is needed")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    missing = [n for n, f in fields.items() if f.default is MISSING and f.default_factory is MISSING and n not in row]
    if missing:
        raise FileError(f"{where}: has no {missing[0]}")
    try:
        for name in row:
            if name not in fields:
                raise unknown("field", name, list(fields))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
    except LoraLabError as error:
        raise FileError(f"{where}: {error}") from error
