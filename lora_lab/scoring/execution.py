"""How a question is computed: where, with whom, and who is told. Nothing in here changes a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.errors import OptionError
from lora_lab.options import check_type

if TYPE_CHECKING:
    import torch

    from lora_lab.scoring.workers import Workers

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
class Execution:
    """Where and how a question is computed; no part of its record, its run id or its numbers.

    Numbers are the same bit for bit in this process and in workers on CPUs of one kind.
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

    def __post_init__(self) -> None:
        if self.device is not None:
            import torch

            check_type("`device`", self.device, torch.device | str)
        if self.workers is not None and not hasattr(self.workers, "map"):
            raise OptionError(f"`workers` is {self.workers!r}; what `open_workers` gives is needed")
        check_type("`cache`", self.cache, Path | None)
        for name in ("progress", "confirm"):
            check_type(f"`{name}`", getattr(self, name), Callable | None)

    def place(self) -> torch.device:
        """The device; OptionError where it is not to be had here."""
        import torch

        from lora_lab.tasks.task import resolve_device

        if isinstance(self.device, torch.device):
            return self.device
        return torch.device(self.workers.device) if self.workers and not self.device else resolve_device(self.device)

    def report(self, done: int, total: int) -> None:
        """Tell whoever wants to know."""
        if self.progress:
            self.progress(done, total)
