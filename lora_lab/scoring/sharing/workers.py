"""Work shared out among workers, here or on a Ray cluster: each holds one model, and one that dies is replaced.

The driver alone writes: results come back to it batch by batch. A batch whose worker dies is given to another, so that
every batch is kept once. On CPUs of one kind the numbers are bit for bit those of a run without workers: a worker uses
as many threads as the driver, and is refused where its packages are of other versions.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lora_lab.errors import LoraLabError, LoraLabWarning, MismatchError, OptionError
from lora_lab.results.result import versions
from lora_lab.scoring.sharing.local import local_backend
from lora_lab.scoring.sharing.ray import ray_backend
from lora_lab.scoring.sharing.worker import Backend, DiedError, Setup, Worker

Item = TypeVar("Item")
Output = TypeVar("Output")

_ATTEMPTS = 3  # a batch that ends so many workers is not given to another
_PATIENCE = 300.0  # seconds to wait for a first worker
_PER_WORKER = 4  # batches: some for balance, few for what a batch shares within


class Workers:
    """Workers of a backend, started when there is work for them; `size` at the most, each on `device`."""

    def __init__(self, backend: Backend) -> None:
        self.size, self.device = backend.size, backend.device
        self._backend = backend
        self._workers: list[Worker] = []
        self._packed: tuple[str, Any] = ("", None)
        """Fingerprint of the last setup, and how it is sent."""
        self._failed = 0

    def cut(self, items: Sequence[Item], most: int | None = None) -> list[Sequence[Item]]:
        """Consecutive batches: a few for each worker, of at most `most` items."""
        size = max(1, -(-len(items) // (_PER_WORKER * self.size)))
        size = size if most is None else max(1, min(size, most))
        return [items[start : start + size] for start in range(0, len(items), size)]

    def map(
        self,
        setup: Setup[Item, Output],
        items: Sequence[Item],
        keep: Callable[[Item, Output], None] | None = None,
        hear: Callable[[Item, int, int], None] | None = None,
    ) -> list[Output]:
        """What workers with this setup answer to every item, in the items' order.

        `keep` is called here for each as it comes in, once; `hear` with what a worker reports of its item before (see
        worker.report). A LoraLabError of a worker is raised here as it is; another exception with the worker's
        traceback as a note. A LoraLabWarning tells of workers that died.
        """
        if self._packed[0] != setup.fingerprint:
            self._packed = setup.fingerprint, self._backend.packed(setup)
        waiting = deque(range(len(items)))
        answers: dict[int, Output] = {}
        lost: Counter[int] = Counter()
        try:
            while len(answers) < len(items):
                self._start(min(self.size, len(items)))
                while waiting and (idle := self._idle()):
                    idle.place, idle.pending = waiting.popleft(), True
                    idle.ask(*self._packed, items[idle.place])
                    idle.built = setup.fingerprint
                for worker in self._ready():
                    number = worker.place
                    kind, value = self._reply(worker)
                    if number is None:  # it has started, or answers to what is not waited for any more
                        continue
                    if kind == "report" and hear:
                        hear(items[number], *value)
                    elif kind == "error":
                        raise value
                    elif kind == "died":
                        lost[number] += 1
                        _tell_of_death(value, lost[number])
                        waiting.appendleft(number)
                    elif kind == "answer":
                        answers[number] = value
                        if keep:
                            keep(items[number], value)
        finally:
            for worker in self._workers:
                worker.place = None
        return [answers[i] for i in range(len(items))]

    def close(self) -> None:
        """End all of them at once, whatever they are at."""
        while self._workers:
            self._workers.pop().kill()

    def _start(self, count: int) -> None:
        """Have so many workers."""
        self._workers += [self._backend.start() for _ in range(count - len(self._workers))]

    def _idle(self) -> Worker | None:
        """A worker without work, one that has been set up already if there is one."""
        idle = [worker for worker in self._workers if not worker.pending]
        return next((worker for worker in idle if worker.built == self._packed[0]), idle[-1] if idle else None)

    def _ready(self) -> list[Worker]:
        """Workers of which something has come."""
        pending = [worker for worker in self._workers if worker.pending]
        deadline = time.monotonic() + _PATIENCE
        while True:
            # in short steps, between which an interrupt is heard
            if ready := self._backend.ready(pending, 1.0):
                return ready
            if not any(worker.started for worker in pending) and time.monotonic() > deadline:
                raise LoraLabError(f"no worker could be placed in {_PATIENCE:.0f} s: {self._backend.full}")

    def _reply(self, worker: Worker) -> tuple[str, Any]:
        """What has come from the worker, ("died", why) if it has; the worker is as it leaves it."""
        try:
            kind, value = worker.reply()
        except DiedError as error:
            self._workers.remove(worker)
            worker.kill()
            self._failed += not worker.started
            if self._failed == _ATTEMPTS:
                raise LoraLabError(f"workers cannot be started: {error}") from error
            return "died", error
        if kind == "report":
            return kind, value
        if kind == "started":
            _check_versions(value)
            worker.started, self._failed = True, 0
        if kind == "error":
            worker.built = None  # perhaps it could not be built
        worker.pending, worker.place = False, None
        return kind, value


@contextlib.contextmanager
def open_workers(
    jobs: int | None = None, ray: str | None = None, device: str | None = None, *, threads: int | None = None
) -> Iterator[Workers | None]:
    """Workers that end with the context: `jobs` processes of this machine, or those of the Ray cluster `ray`.

    None for one job and no cluster: the work is done in this process. "local:N": N workers on a cluster of their own
    on this machine; "auto": those of the cluster that runs here (or that this process is connected to), "HOST:PORT": of
    that one; see ray.ray_backend. Each uses as many `threads` as this process does, unless told otherwise, so that
    numbers are the same. A script that opens processes of this machine must be importable (`if __name__ ==
    "__main__"`), as always with multiprocessing.
    """
    if jobs is not None and jobs < 1:
        raise OptionError(f"{jobs} jobs side by side; at least 1 is needed")
    if jobs is not None and ray is not None:
        raise OptionError(
            "jobs counts processes of this machine, and the workers of a Ray cluster are its own; give one of the two"
        )
    if ray is None and (jobs is None or jobs == 1):
        yield None
        return
    with contextlib.ExitStack() as guarded:
        if ray is None:
            assert jobs is not None
            workers = Workers(local_backend(jobs, device, threads))
        else:
            workers = Workers(guarded.enter_context(ray_backend(ray, device, threads)))
        guarded.callback(workers.close)
        yield workers


def _check_versions(there: dict[str, str | None]) -> None:
    for name, here in versions().items():
        if there[name] != here:
            raise MismatchError(f"a worker has {name} {there[name]}, and here it is {here}")


def _tell_of_death(error: DiedError, times: int) -> None:
    if times == _ATTEMPTS:
        raise LoraLabError(f"a batch of work ended {_ATTEMPTS} workers, the last one so: {error}") from error
    warnings.warn(f"a worker died ({error}); its batch is given to another", LoraLabWarning, stacklevel=3)
