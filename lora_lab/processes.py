"""Processes that work for another one: none outlives it, however it ends, and none writes once it is gone."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time

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


def _ask_kernel() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # the thread that watches is enough without
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
