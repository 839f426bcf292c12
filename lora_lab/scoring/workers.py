"""Work shared out among the workers of a Ray cluster: each holds one model, and one that dies is replaced.

The driver alone writes: results come back to it batch by batch. A batch whose worker dies is given to another, so that
every batch is kept once. On CPUs of one kind the numbers are bit for bit those of a run without workers: a worker uses
as many threads as the driver, and is refused where its packages are of other versions.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from lora_lab.errors import LoraLabError, LoraLabWarning, MismatchError, OptionError, some
from lora_lab.results.result import versions
from lora_lab.scoring.processes import Identity, children_end_too, end_with, identity

Item = TypeVar("Item")
Output = TypeVar("Output")
Answering = TypeVar("Answering", contravariant=True)
Answer = TypeVar("Answer", covariant=True)

_MOST = 64  # workers on CPUs: each of them holds a model
_ATTEMPTS = 3  # a batch that ends so many workers is not given to another
_PATIENCE = 300.0  # seconds to wait for a first worker
_PER_WORKER = 4  # batches: some for balance, few for what a batch shares within
_AUTHENTICATES = (2, 52)
"""The first version of Ray whose clusters can ask for a token (RAY_AUTH_MODE)."""
_SPEC = re.compile(
    r"(?P<where>auto|local:(?P<count>\d+)|(?P<host>(?!local:)[^/\s]+):(?P<port>\d+))(/(?P<gpus>[1-9]\d*))?"
)


class Setup(Protocol[Answering, Answer]):
    """What a worker is to be: called there once, it builds what answers items (a model, say). Must be picklable."""

    @property
    def fingerprint(self) -> str:
        """Equal for setups that build the same: a worker keeps what it has built until another one is asked for."""

    def __call__(self) -> Callable[[Answering], Answer]:
        """Build it."""


class Workers:
    """The workers of a cluster, made when there is work for them; `size` at the most, each on `device`."""

    def __init__(self, ray: Any, size: int, device: str, options: dict[str, Any], threads: int) -> None:
        self.size, self.device = size, device
        self._ray = ray
        self._actor = ray.remote(**options, max_restarts=0)(_Worker)
        self._threads = threads
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        """What tells that a worker is there → the worker."""
        self._wears: dict[Any, str] = {}
        """Worker → fingerprint of what it has built."""
        self._shared: tuple[str, Any] = ("", None)
        """Fingerprint of the last setup, and where workers find it."""
        self._failed = 0

    def cut(self, items: Sequence[Item], most: int | None = None) -> list[Sequence[Item]]:
        """Consecutive batches: a few for each worker, of at most `most` items."""
        size = max(1, -(-len(items) // (_PER_WORKER * self.size)))
        size = size if most is None else max(1, min(size, most))
        return [items[start : start + size] for start in range(0, len(items), size)]

    def map(
        self, setup: Setup[Item, Output], items: Sequence[Item], keep: Callable[[Item, Output], None] | None = None
    ) -> list[Output]:
        """What workers with this setup answer to every item, in the items' order.

        `keep` is called here for each as it comes in, once. A LoraLabError of a worker is raised here as it is; another
        exception with the worker's traceback in its text. A LoraLabWarning tells of workers that died.
        """
        if self._shared[0] != setup.fingerprint:
            self._shared = setup.fingerprint, self._ray.put(setup)
        waiting = deque(range(len(items)))
        flying: dict[Any, tuple[Any, int]] = {}
        found: dict[int, Output] = {}
        lost: Counter[int] = Counter()
        self._hire(len(items))
        try:
            while len(found) < len(items):
                while waiting and self._idle:
                    worker, place = self._choose(setup.fingerprint), waiting.popleft()
                    # in a list, the setup is fetched only by a worker that has not built it yet
                    reference = worker.answer.remote(setup.fingerprint, [self._shared[1]], items[place])
                    flying[reference] = worker, place
                for reference in self._done(flying):
                    worker, place = flying[reference]
                    try:
                        answer = self._ray.get(reference)
                    except self._ray.exceptions.RayTaskError:
                        raise
                    except self._ray.exceptions.RayError as error:
                        del flying[reference]
                        lost[place] += 1
                        self._bury(worker, error, last=lost[place] == _ATTEMPTS)
                        waiting.appendleft(place)
                        self._hire(len(items))
                        continue
                    if isinstance(answer, LoraLabError):
                        raise answer
                    del flying[reference]
                    self._idle.append(worker)
                    found[place] = answer
                    if keep:
                        keep(items[place], answer)
        finally:
            self._idle += [worker for worker, _ in flying.values()]
        return [found[i] for i in range(len(items))]

    def _choose(self, fingerprint: str) -> Any:
        """An idle worker, one that has been set up so already if there is one."""
        ready = [i for i, worker in enumerate(self._idle) if self._wears.get(worker) == fingerprint]
        worker = self._idle.pop(ready[0] if ready else -1)
        self._wears[worker] = fingerprint
        return worker

    def _hire(self, items: int) -> None:
        """Have as many workers as there are items, up to the most there may be."""
        for _ in range(min(self.size, items) - len(self._wears) - len(self._starting)):
            worker = self._actor.remote(self._threads, os.getcwd(), identity())
            self._starting[worker.about.remote()] = worker

    def _done(self, flying: dict[Any, Any]) -> list[Any]:
        """References of answers that have come; workers that have come are put among the idle ones."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            # in short steps, between which an interrupt is heard
            come, _ = self._ray.wait([*flying, *self._starting], num_returns=1, timeout=1.0)
            new = [reference for reference in come if reference in self._starting]
            for reference in new:
                self._welcome(reference)
            if come:
                return [reference for reference in come if reference not in new]
            if not flying and time.monotonic() > deadline:
                raise LoraLabError(f"no worker could be placed in {_PATIENCE:.0f} s: the Ray cluster has no free room")

    def _welcome(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            there = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._failed += 1
            if self._failed == _ATTEMPTS:
                raise LoraLabError(f"workers cannot be started on the Ray cluster: {_last_line(error)}") from error
            self._hire(len(self._wears) + len(self._starting) + 1)
            return
        for name, here in versions().items():
            if there[name] != here:
                raise MismatchError(f"a worker of the Ray cluster has {name} {there[name]}, and here it is {here}")
        self._failed = 0
        self._wears[worker] = ""
        self._idle.append(worker)

    def _bury(self, worker: Any, error: Exception, *, last: bool) -> None:
        self._wears.pop(worker, None)
        self._ray.kill(worker)  # one that is merely out of reach may still be at work
        if last:
            raise LoraLabError(f"a batch of work ended {_ATTEMPTS} workers, the last one so: {_last_line(error)}")
        text = f"a worker died ({type(error).__name__}); its batch is given to another"
        warnings.warn(text, LoraLabWarning, stacklevel=3)

    def _dismiss(self) -> None:
        for worker in [*self._wears, *self._starting.values()]:
            with contextlib.suppress(Exception):  # the cluster itself may be gone
                self._ray.kill(worker)


@contextlib.contextmanager
def open_workers(*, ray: str | None = None, device: str | None = None) -> Iterator[Workers | None]:
    """The workers that `ray` asks for, None without; a cluster that was started for them ends with the context.

    "local:N": N workers on a cluster of their own on this machine. "auto": those of the cluster that runs here (or
    that this process is connected to), "HOST:PORT": of that one. One for each GPU where there are any and `device`
    allows it ("/G" at the end: for every G GPUs), else one for as many cores as the driver has threads.
    """
    if ray is None:
        yield None
        return
    import torch

    where = _SPEC.fullmatch(ray)
    if where is None or where["count"] == "0":
        raise OptionError(f"--ray {ray!r}: auto, HOST:PORT of a running cluster, or local:N workers")
    package = _import_ray()
    began = not package.is_initialized()
    if where["where"] != "auto" and not began:
        raise OptionError(f"--ray {ray}: this process uses a Ray cluster already; auto takes that one")
    threads = torch.get_num_threads()
    workers = None
    with contextlib.ExitStack() as guarded:
        try:
            if began:
                _connect(package, ray, where)
            if where["count"]:  # some of Ray's own processes would outlive this one by minutes
                guarded.enter_context(children_end_too())
            size, place, options = _shares(package, where, device, threads)
            workers = Workers(package, size, place, options, threads)
            yield workers
        finally:
            if workers is not None:
                workers._dismiss()
            if began:
                package.shutdown()


class _Worker:
    """Lives in a process of its own and holds what its last setup built."""

    def __init__(self, threads: int, folder: str, driver: Identity) -> None:
        import torch

        end_with(driver)
        torch.set_num_threads(threads)
        if os.path.isdir(folder):  # so that relative paths mean what they mean to the driver
            os.chdir(folder)
        self._fingerprint: str | None = None
        self._work: Callable[[Any], Any] | None = None

    def about(self) -> dict[str, str | None]:
        """The versions of what it computes with."""
        return versions()

    def answer(self, fingerprint: str, setup: list[Any], item: Any) -> Any:
        """What this setup answers to the item, or the project's own error that it raises."""
        try:
            if self._fingerprint != fingerprint:
                import ray

                self._fingerprint = self._work = None
                gc.collect()  # there is room for one model
                self._work = ray.get(setup[0])()
                self._fingerprint = fingerprint
            assert self._work is not None
            return self._work(item)
        except LoraLabError as error:
            return error


def _import_ray() -> Any:
    # Ray reads these as it is imported. Nothing is sent home, and nothing said on standard output, where --json goes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError as error:
        raise OptionError("--ray needs Ray: pip install 'lora-lab[ray]'") from error
    return ray


def _connect(ray: Any, spec: str, where: re.Match[str]) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if where["count"]:
        with _on_loopback(ray), _own_signals():
            ray.init(address="local", num_cpus=int(where["count"]), include_dashboard=False, **quiet)
        heard = {str(node["NodeManagerAddress"]) for node in ray.nodes()}
        if not heard <= {"127.0.0.1", "::1"}:
            raise OptionError(f"--ray {spec}: Ray {ray.__version__} would listen to the network, on {some(heard)}")
        return
    if tuple(int(part) for part in re.findall(r"\d+", ray.__version__)[:2]) < _AUTHENTICATES:
        raise OptionError(
            f"--ray {spec}: Ray {ray.__version__} lets anybody in the network run code on a cluster; "
            f"{'.'.join(map(str, _AUTHENTICATES))} or newer is needed (pip install -U 'lora-lab[ray]'), or local:N"
        )
    try:
        if where["port"]:  # Ray itself would try for ten minutes
            socket.create_connection((where["host"], int(where["port"])), timeout=10).close()
        with _own_signals():
            ray.init(address=where["where"], **quiet)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise OptionError(
            f"--ray {spec}: no cluster to be joined ({_last_line(error)}); `ray start --head` starts one, one with a "
            "token needs RAY_AUTH_MODE=token here too, and local:N needs none"
        ) from error


@contextlib.contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """A cluster begun within the context listens to this machine alone, as Ray does where it has no clusters at all.

    On Linux, Ray's processes listen to every network by default, and replace a loopback address that they are given.
    """
    constants, name = ray._private.ray_constants, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, known = os.environ.get(name), constants.ENABLE_RAY_CLUSTER
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = known
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """What SIGTERM does here stays as it was: Ray has it end the process with a code of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shares(ray: Any, where: re.Match[str], device: str | None, threads: int) -> tuple[int, str, dict[str, Any]]:
    """How many workers there are, on which device, and what each takes of the cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = None if device is None else device.partition(":")[0]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if (wanted is None and gpus) or wanted == "cuda":
        each: float = int(where["gpus"] or 1)
        if where["count"] and where["gpus"] is None and gpus:
            each = 1 / -(-int(where["count"]) // gpus)  # more workers than GPUs share them
        size = int(where["count"] or sum(node.get("GPU", 0) // each for node in nodes))
        if not gpus or size < 1 or size * each > gpus:
            raise OptionError(f"{gpus} GPUs on the Ray cluster; {size or 1} workers with {each:g} each cannot be had")
        return size, "cuda", {"num_cpus": 0, "num_gpus": each}
    if where["gpus"] or wanted not in (None, "cpu"):
        raise OptionError(f"workers on {wanted or 'GPUs'} are not to be had on this Ray cluster; on cpu they are")
    if where["count"]:
        return int(where["count"]), "cpu", {"num_cpus": 1}
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if not any(cores):
        raise OptionError("the Ray cluster has no CPU for a worker")
    share = min(threads, max(cores))
    return min(_MOST, sum(each // share for each in cores)), "cpu", {"num_cpus": share}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
