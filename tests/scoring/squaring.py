"""What workers do for the tests of workers: light, since each of them imports it."""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from lora_lab.scoring.sharing.worker import report

LOCKS = []
"""Made by this process, which holds them to its end."""


class UnportableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class Squares:
    """Answers with the process and the square; dies, raises or reports, as it is told."""

    folder: Path
    name: str = "squares"

    @property
    def fingerprint(self):
        return f"{self.folder} {self.name}"

    def __call__(self):
        if self.name == "impossible":
            raise OSError("nothing can be built")
        (self.folder / f"{self.name}-{os.getpid()}").touch()
        return self.answer

    def answer(self, item):
        if isinstance(item, Exception):
            raise item
        if item == "unportable":
            raise UnportableError(1, 2)
        if item == "threads":
            import torch

            return torch.get_num_threads()
        if item == "lock":
            LOCKS.append(multiprocessing.RLock())
            return LOCKS[-1]._semlock.name
        if item < 0 and not (self.folder / "dead").exists():
            (self.folder / "dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 666:
            os._exit(1)
        for done in range(item if item < 4 else 0):
            report(done + 1, item)
        return os.getpid(), item**2
