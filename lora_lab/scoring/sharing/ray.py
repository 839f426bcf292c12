"""Workers on a Ray cluster: one that runs already, or one of our own on this machine, which ends with its driver."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from lora_lab.errors import OptionError, shorten
from lora_lab.extras import needs
from lora_lab.scoring.sharing.processes import Identity, children_end_too, end_with, identity
from lora_lab.scoring.sharing.worker import Answering, Backend, DiedError, Reply, Setup, Worker

_MOST = 64  # workers on CPUs: each of them holds a model
_AUTHENTICATES = (2, 52)
"""The first version of Ray whose clusters can ask for a token (RAY_AUTH_MODE)."""
_SPEC = re.compile(
    r"(?P<where>auto|local:(?P<count>\d+)|(?P<host>(?!local:)[^/\s]+):(?P<port>\d+))(/(?P<gpus>[1-9]\d*))?"
)


@contextlib.contextmanager
def ray_backend(spec: str, device: str | None, threads: int | None) -> Iterator[Backend]:
    """The cluster that `spec` names; one that was started for it ends with the context.

    "local:N": N workers on a cluster of their own on this machine. "auto": those of the cluster that runs here (or
    that this process is connected to), "HOST:PORT": of that one. One for each GPU where there are any and `device`
    allows it ("/G" at the end: for every G GPUs), else one for as many cores as the driver has threads.
    """
    import torch

    where = _SPEC.fullmatch(spec)
    if where is None or where["count"] == "0":
        raise OptionError(f"ray {spec!r}: auto, HOST:PORT of a running cluster, or local:N workers")
    ray = _import_ray()
    began = not ray.is_initialized()
    if where["where"] != "auto" and not began:
        raise OptionError(f"ray {spec}: this process uses a Ray cluster already; auto takes that one")
    threads = threads or torch.get_num_threads()
    with contextlib.ExitStack() as guarded:
        try:
            if began:
                _connect(ray, spec, where)
            if where["count"]:  # some of Ray's own processes would outlive this one by minutes
                guarded.enter_context(children_end_too())
            yield _Cluster(ray, *_shares(ray, where, device, threads), threads)
        finally:
            if began:
                ray.shutdown()


class _Cluster(Backend):
    """Actors of the cluster that this process is connected to."""

    full = "the Ray cluster has no free room"

    def __init__(self, ray: Any, size: int, device: str, options: dict[str, Any], threads: int) -> None:
        super().__init__(size, device)
        self._ray = ray
        self._actor = ray.remote(**options, max_restarts=0)(_InActor)
        self._threads = threads

    def start(self) -> Worker:
        return _Actor(self._ray, self._actor.remote(self._threads, os.getcwd(), identity()))

    def ready(self, workers: Sequence[Worker], seconds: float) -> list[Worker]:
        references = {worker.reference: worker for worker in workers if isinstance(worker, _Actor)}
        come, _ = self._ray.wait(list(references), num_returns=1, timeout=seconds)
        return [references[reference] for reference in come]

    def packed(self, setup: Setup[Any, Any]) -> Any:
        return [self._ray.put(setup)]  # in a list, it is fetched only by a worker that has not built it yet


class _Actor(Worker):
    """An actor and the reference to what it does at present."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self.actor = ray, actor
        self.reference = actor.about.remote()

    def ask(self, fingerprint: str, setup: Any, item: object) -> None:
        self.reference = self.actor.reply.remote(fingerprint, setup, item)

    def reply(self) -> Reply:
        try:
            reply: Reply = self._ray.get(self.reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            raise DiedError(_last_line(error)) from error
        return reply

    def kill(self) -> None:
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            self._ray.kill(self.actor)  # one that is merely out of reach may still be at work


class _InActor:
    """Lives in a process of the cluster."""

    def __init__(self, threads: int, folder: str, driver: Identity) -> None:
        import torch

        end_with(driver)
        torch.set_num_threads(threads)
        if os.path.isdir(folder):  # so that relative paths mean what they mean to the driver
            os.chdir(folder)
        self._answering = Answering()

    def about(self) -> Reply:
        return self._answering.about()

    def reply(self, fingerprint: str, setup: list[Any], item: object) -> Reply:
        import ray

        return self._answering.reply(fingerprint, lambda: ray.get(setup[0]), item)


def _import_ray() -> Any:
    # Ray reads these as it is imported. Nothing is sent home, and nothing said on standard output, where --json goes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    with needs("ray", "computing on a Ray cluster"):
        import ray
    return ray


def _connect(ray: Any, spec: str, where: re.Match[str]) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if where["count"]:
        with _on_loopback(ray), _own_signals():
            ray.init(address="local", num_cpus=int(where["count"]), include_dashboard=False, **quiet)
        heard = {str(node["NodeManagerAddress"]) for node in ray.nodes()}
        if not heard <= {"127.0.0.1", "::1"}:
            raise OptionError(f"ray {spec}: Ray {ray.__version__} would listen to the network, on {shorten(heard)}")
        return
    if tuple(int(part) for part in re.findall(r"\d+", ray.__version__)[:2]) < _AUTHENTICATES:
        raise OptionError(
            f"ray {spec}: Ray {ray.__version__} lets anybody in the network run code on a cluster; "
            f"{'.'.join(map(str, _AUTHENTICATES))} or newer is needed (pip install -U 'lora-lab[ray]'), or local:N"
        )
    try:
        if where["port"]:  # Ray itself would try for ten minutes
            socket.create_connection((where["host"], int(where["port"])), timeout=10).close()
        with _own_signals():
            ray.init(address=where["where"], **quiet)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise OptionError(
            f"ray {spec}: no cluster to be joined ({_last_line(error)}); `ray start --head` starts one, one with a "
            "token needs RAY_AUTH_MODE=token here too, and local:N needs none"
        ) from error


@contextlib.contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """A cluster begun within the context listens to this machine alone, as Ray does where it has no clusters at all.

    On Linux, Ray's processes listen to every network by default, and replace a loopback address that they are given.
    """
    constants, name = ray._private.ray_constants, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, enabled = os.environ.get(name), constants.ENABLE_RAY_CLUSTER
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = enabled
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
        gpus_each: float = int(where["gpus"] or 1)
        if where["count"] and where["gpus"] is None and gpus:
            gpus_each = 1 / -(-int(where["count"]) // gpus)  # more workers than GPUs share them
        size = int(where["count"] or sum(node.get("GPU", 0) // gpus_each for node in nodes))
        if not gpus or size < 1 or size * gpus_each > gpus:
            raise OptionError(
                f"{gpus} GPUs on the Ray cluster; {size or 1} workers with {gpus_each:g} each cannot be had"
            )
        return size, "cuda", {"num_cpus": 0, "num_gpus": gpus_each}
    if where["gpus"] or wanted not in (None, "cpu"):
        raise OptionError(f"workers on {wanted or 'GPUs'} are not to be had on this Ray cluster; on cpu they are")
    if where["count"]:
        return int(where["count"]), "cpu", {"num_cpus": 1}
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if not any(cores):
        raise OptionError("the Ray cluster has no CPU for a worker")
    share = min(threads, max(cores))
    return min(_MOST, sum(count // share for count in cores)), "cpu", {"num_cpus": share}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
