"""Standard streams that may be closed or full, and signals: what surrounds every verb."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TextIO


def prepare() -> None:
    """Three streams that are there, in UTF-8: what is written to one that was closed fails when it is flushed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: its number must not go to a file that is opened later
            taken = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            if taken != number:
                os.dup2(taken, number)
                os.close(taken)
        if getattr(sys, name) is None:
            setattr(sys, name, _opened(number))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe in the C locale would refuse Δ and ‖
            stream.reconfigure(errors="replace", encoding="utf-8")


def _opened(number: int) -> TextIO:
    return open(number, "w" if number else "r", encoding="utf-8", closefd=False)


def finish() -> str | None:
    """Flush standard output; why it did not take all of it. The rest is dropped, so that Python does not complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: closed by whoever called
        drop()
        return str(getattr(error, "strerror", None) or error)
    return None


def refuses() -> bool:
    """Whether standard output takes no more, which is asked after an error that names no file."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        drop()
        return True
    return False


def drop() -> None:
    """What standard output still holds is lost: Python would complain of it at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A request to end, by `kill` or by a terminal that closes, is Ctrl-C; the list names the first such signal."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return

    def interrupt(number: int, _: object) -> None:
        if not heard:  # a second request does not cut short what the first one has cleared away
            heard.append(number)
            raise KeyboardInterrupt

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            before[number] = signal.signal(number, interrupt)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
