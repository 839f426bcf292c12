"""Workers in processes of this machine, one item at a time through a pipe each."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from lora_lab.scoring.sharing.processes import end_with_parent
from lora_lab.scoring.sharing.worker import Answering, Backend, DiedError, Reply, Setup, Worker, listen

_CONTEXT = multiprocessing.get_context("spawn")  # no fork: torch's threads do not survive one


def local_backend(size: int, device: str | None, threads: int | None) -> Backend:
    """Processes of this machine, of so many threads each; by default as many as this process, for the same numbers."""
    return _Local(size, device, threads)


class _Local(Backend):
    full = "this machine has no room for another process"

    def __init__(self, size: int, device: str | None, threads: int | None) -> None:
        import torch

        from lora_lab.tasks.task import resolve_device

        super().__init__(size, str(resolve_device(device)))
        self._threads = threads or torch.get_num_threads()
        self._gpus = _gpus() if self.device == "cuda" else []
        self._count = 0

    def start(self) -> Worker:
        gpu = self._gpus[self._count % len(self._gpus)] if self._gpus else None
        self._count += 1
        return _Process(self._threads, gpu)

    def ready(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        pipes = {worker.pipe: worker for worker in workers if isinstance(worker, _Process)}
        heard = multiprocessing.connection.wait(list(pipes), seconds)
        return [worker for pipe, worker in pipes.items() if pipe in heard]

    def packed(self, setup: Setup[Any, Any]) -> bytes:
        return pickle.dumps(setup)


class _Process(Worker):
    """A process and this end of the pipe to it."""

    def __init__(self, threads: int, gpu: str | None) -> None:
        self.pipe, other = _CONTEXT.Pipe()
        # ends with this process even if nobody ends it
        self._process = _CONTEXT.Process(target=_work, args=(other, threads, gpu), daemon=True)
        with _ignoring_interrupts():
            self._process.start()
        other.close()  # so that the pipe ends with the process

    def ask(self, fingerprint: str, setup: bytes, item: object) -> None:
        with self._undivided(), contextlib.suppress(OSError):  # its reply will tell that it has ended
            self.pipe.send((fingerprint, None if self.built == fingerprint else setup, item))

    def reply(self) -> Reply:
        try:
            with self._undivided():
                reply: Reply = self.pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=5)
            raise DiedError(_end(self._process.exitcode)) from error
        return reply

    @contextlib.contextmanager
    def _undivided(self) -> Iterator[None]:
        """A message that an interrupt divides leaves a pipe that nothing can be read from: its process goes."""
        try:
            yield
        except KeyboardInterrupt:
            self._process.kill()
            raise

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Connection, threads: int, gpu: str | None) -> None:
    """What the process does until it is killed or its parent ends."""
    end_with_parent()  # before torch, whose import takes seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is where the driver's --json goes
    warnings.simplefilter("ignore")  # the driver, which has the same data, tells them
    # threads that wait leave the cores to those of other workers
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    if "fork" in multiprocessing.get_all_start_methods():
        # tqdm and others make locks here, which the system would keep, with a warning, as this process is killed: those
        # for forked processes have no name to be kept by
        multiprocessing.set_start_method("fork", force=True)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(threads)
    listen(pipe.send)
    answering = Answering()
    pipe.send(answering.about())
    while True:
        fingerprint, setup, item = pipe.recv()
        pipe.send(answering.reply(fingerprint, partial(pickle.loads, setup), item))


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them: workers take turns."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"ended by {signal.Signals(-code).name}" + (", for its memory perhaps" if -code == signal.SIGKILL else "")


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C: this one does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
