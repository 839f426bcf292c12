"""How a question is computed: where, with whom, and who is told. Nothing in here changes a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.errors import OptionError
from lora_lab.options import check_type

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from lora_lab.scoring.sharing.workers import Workers

Progress = Callable[[int, int], None]
"""Called with (pieces done, pieces in all)."""


@dataclass(frozen=True)
class Cost:
    """What is still to be computed."""

    variants: int
    """Not known yet."""
    block_evaluations: int
    """On whole batches."""
    naive_block_evaluations: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(times * part for part in astuple(self)))


@dataclass(frozen=True)
class Batching:
    """How many coalitions go through a forward pass together; see scoring/together/batched.py."""

    at_once: int | None = 0
    """0: one after another; None: as many as pay and as there is memory for."""
    compile: bool | str = False
    """Whether such passes are compiled, or by which backend of torch.compile."""

    @property
    def wanted(self) -> bool:
        """Whether several go together."""
        return self.at_once is None or self.at_once > 1

    @property
    def foreseen(self) -> int | None:
        """How many a forecast reckons with; None where they go one after another."""
        return (self.at_once or 16) if self.wanted else None

    @property
    def backend(self) -> str:
        """What compiles."""
        return self.compile if isinstance(self.compile, str) else "inductor"


ONE_BY_ONE = Batching()
"""Every coalition has passes of its own."""


@dataclass(frozen=True)
class Execution:
    """Where and how a question is computed; no part of its record, and but for rounding none of its numbers.

    Numbers are the same bit for bit in this process and in workers on CPUs of one kind; where coalitions go through a
    pass together, as they do on a GPU, they are so up to rounding, and are kept in journals of their own.
    """

    device: torch.device | str | None = None
    """Or its name (cpu, cuda …); None: that of the workers, else a GPU where there is one."""
    cache: Path | None = None
    """Folder for the journals of scores, by which a killed run goes on and another question finds what is known."""
    workers: Workers | None = None
    """Workers that compute; None for this process."""
    progress: Progress | None = None
    confirm: Callable[[Cost], None] | None = None
    """Told the cost before anything is computed; raises what stops the run."""
    by_example: Callable[[str, Sequence[npt.NDArray[np.float64]]], None] | None = None
    """Told what lies behind a table's rows: its name, and for each row numbers of the examples by the task's main
    metric, whose mean has the variance of the row's value (see `Metric.influence`)."""

    coalitions_at_once: int | None = None
    """So many coalitions go through each forward pass; 0: one; None: as many as pay on a GPU, on a CPU one."""
    compile: bool | str = False
    """Compile passes of several coalitions with torch.compile, or with this backend of it."""

    def __post_init__(self) -> None:
        check_type("`coalitions_at_once`", self.coalitions_at_once, int | None)
        check_type("`compile`", self.compile, bool | str)
        at_once = self.coalitions_at_once
        if at_once is not None and at_once < 0:
            raise OptionError(f"{at_once} coalitions at once; at least 1 is needed, or 0 for one after another")
        if self.compile and at_once in (0, 1):
            raise OptionError("only passes of several coalitions are compiled; let 2 or more go at once")
        if self.device is not None:
            import torch

            check_type("`device`", self.device, torch.device | str)
        if self.workers is not None and not hasattr(self.workers, "map"):
            raise OptionError(f"`workers` is {self.workers!r}; what `open_workers` gives is needed")
        check_type("`cache`", self.cache, Path | None)
        for name in ("progress", "confirm", "by_example"):
            check_type(f"`{name}`", getattr(self, name), Callable | None)

    def place(self) -> torch.device:
        """The device; OptionError where it is not to be had here."""
        import torch

        from lora_lab.tasks.task import resolve_device

        if isinstance(self.device, torch.device):
            return self.device
        return torch.device(self.workers.device) if self.workers and not self.device else resolve_device(self.device)

    def batching(self) -> Batching:
        """How coalitions go through forward passes there."""
        at_once = self.coalitions_at_once
        if at_once is None and not self.compile and self.place().type == "cpu":
            return ONE_BY_ONE
        return Batching(at_once, self.compile)

    def report(self, done: int, total: int) -> None:
        """Tell whoever wants to know."""
        if self.progress:
            self.progress(done, total)

    def part(self, place: int, parts: int) -> Execution:
        """The same for part `place` (from 0) of so many alike: whoever wants to know is told of all of them."""
        tell = self.progress
        if tell is None:
            return self
        return replace(self, progress=lambda done, total: tell(place * total + done, parts * total))
