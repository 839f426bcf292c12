"""Processes that work for another one: none outlives it, however it ends, and none writes once it is gone."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1  # of Linux' prctl(2): the signal that a process gets when its parent dies
_EVERY = 0.5  # seconds between two looks at a process that is not this one's parent

Identity = tuple[str, int, float]
"""A process among all machines: host, number, and when it began (numbers are given again)."""


def identity() -> Identity:
    """This process."""
    import psutil

    return socket.gethostname(), os.getpid(), psutil.Process().create_time()


def end_with_parent() -> None:
    """From now on this process ends with the one that started it by multiprocessing; call it first thing in a worker.

    On Linux the kernel sees to it at once; everywhere a thread waits for the parent's end. Without, a worker would not
    notice: it waits for work on a queue that it could itself write to, so that the queue never ends.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    _ask_kernel()
    if not parent.is_alive():  # it died before the kernel was asked
        os._exit(1)

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="ends with its parent", daemon=True).start()


def end_with(other: Identity) -> None:
    """From now on this process ends with its parent, and within a second of the other one if that runs here."""
    import psutil

    _ask_kernel()
    host, number, began = other
    try:
        watched = psutil.Process(number)
        if host != socket.gethostname() or watched.create_time() != began:
            return
    except psutil.Error:  # of another machine, or of a container beside this one
        return

    def look() -> None:
        with contextlib.suppress(psutil.Error):
            while watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
                time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=look, name=f"ends with {number}", daemon=True).start()


_GUARD = """
import sys, psutil
sys.stdin.read()
for text in sys.argv[1:]:
    number, began = text.split(":")
    try:
        left = psutil.Process(int(number))
        if left.create_time() == float(began):
            left.kill()
    except psutil.Error:
        pass
"""


@contextlib.contextmanager
def children_end_too() -> Iterator[None]:
    """Should this process be killed outright, all that it has started so far ends at once, whatever program it is.

    A small process of its own waits for this one's end: it reads from a pipe that nobody else can write to.
    """
    import psutil

    started = [f"{child.pid}:{child.create_time()!r}" for child in psutil.Process().children(recursive=True)]
    command = [sys.executable, "-c", _GUARD, *started]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:  # noqa: S603
        try:
            yield
        finally:
            guard.terminate()


def _ask_kernel() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # the thread that watches is enough without
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
