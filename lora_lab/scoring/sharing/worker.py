"""One worker: what runs in its process, and what the driver has of it; not where it runs, nor who else works."""

from __future__ import annotations

import gc
import pickle
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from lora_lab.errors import LoraLabError, LoraLabNote, LoraLabWarning
from lora_lab.results.result import versions

Item = TypeVar("Item", contravariant=True)
Output = TypeVar("Output", covariant=True)

Reply = tuple[Literal["started", "report", "answer", "error"], Any]
"""What a worker sends: its packages' versions, (steps done, steps in all), its answer, or what it raised."""


class Setup(Protocol[Item, Output]):
    """What a worker is to be: called there once, it builds what answers items (a model, say). Must be picklable."""

    @property
    def fingerprint(self) -> str:
        """Equal for setups that build the same: a worker keeps what it has built until another one is asked for."""

    def __call__(self) -> Callable[[Item], Output]:
        """Build it."""


class DiedError(Exception):
    """A worker's process has ended; the text says by what."""


class Worker(ABC):
    """The driver's side of one worker, which does one thing at a time: it starts, and then it answers items."""

    pending = True
    """Whether a reply is to come: at first the one that tells that it has started."""
    started = False
    built: str | None = None
    """Fingerprint of the setup that it holds; None where it has to be sent one."""
    place: int | None = None
    """Which item it has; None where nobody waits for what it may still answer."""

    @abstractmethod
    def ask(self, fingerprint: str, setup: Any, item: object) -> None:
        """Send an item for a setup, as `Backend.packed` gives it."""

    @abstractmethod
    def reply(self) -> Reply:
        """What has come from it; DiedError."""

    @abstractmethod
    def kill(self) -> None:
        """End its process, which may have ended already."""


class Backend(ABC):
    """Where workers run: `size` of them at the most, each on `device`."""

    full: str
    """Why none could be started, should it last."""

    def __init__(self, size: int, device: str) -> None:
        self.size, self.device = size, device

    @abstractmethod
    def start(self) -> Worker:
        """A new worker, which is not there yet."""

    @abstractmethod
    def ready(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        """Those of which a reply, or their end, has come; none after so many seconds."""

    @abstractmethod
    def packed(self, setup: Setup[Any, Any]) -> Any:
        """The setup as it is sent, once for all workers."""


class Answering:
    """Lives in a worker's process, holds what its last setup has built, and answers items with it."""

    def __init__(self) -> None:
        self._fingerprint: str | None = None
        self._answer: Callable[[Any], Any] | None = None

    def about(self) -> Reply:
        """The first reply."""
        return "started", versions()

    def reply(self, fingerprint: str, setup: Callable[[], Setup[Any, Any]], item: object) -> Reply:
        """What the setup answers to the item, or the exception that it raises; `setup` gets it where it is needed."""
        try:
            if self._answer is None or self._fingerprint != fingerprint:
                self._answer = None
                gc.collect()  # there is room for one model
                self._answer, self._fingerprint = setup()(), fingerprint
            return "answer", self._answer(item)
        except Exception as error:
            return "error", _portable(error)


def _portable(error: Exception) -> Exception:
    """The exception as the driver can raise it: the project's own as it is, another with the traceback as a note."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (this process's own)
    except Exception:  # whatever a class of somebody else's makes of it
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, LoraLabError):
        error.add_note(f"in a worker:\n{text}")
    return error


_listener: Callable[[Reply], None] | None = None
"""In a worker's process: what sends a reply before the last one to an item; None where the backend carries none."""


def listen(listener: Callable[[Reply], None]) -> None:
    """What is reported in this process goes there."""
    global _listener
    _listener = listener


def telling(work: Callable[[], Output]) -> tuple[Output, list[Warning]]:
    """What work in a worker gives, and what the project had to tell meanwhile, for the driver to tell."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = work()
    messages = [each.message for each in caught if issubclass(each.category, LoraLabWarning | LoraLabNote)]
    return found, [message for message in messages if isinstance(message, Warning)]


def report(done: int, total: int) -> None:
    """Tell the driver how far this worker is with its item; heard where the backend carries it."""
    if _listener is not None:
        _listener(("report", (done, total)))
