"""Attacks: whatever a file says, its reader answers, or refuses in one line, quickly and in little memory."""

import contextlib
import importlib
import io
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_lab.errors import LoraLabError, LoraLabNote, LoraLabWarning

SECONDS = 5.0
SLACK = 64 << 20
"""Bytes below which the memory of a reading cannot be told from what Python and torch keep for themselves."""
_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def survived(size: int = 0) -> Iterator[None]:
    """Nothing but LoraLabError of one line, within 5 seconds and 10 times the file's size of memory."""
    watched = _REFS.exists()
    if watched:
        try:
            _REFS.write_text("5")  # the peak counts from here
        except OSError:
            watched = False
    before, began = _peak() if watched else 0, time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LoraLabWarning)
        warnings.simplefilter("ignore", LoraLabNote)  # of what a record names
        try:
            yield
        except LoraLabError as error:
            text = str(error)
            assert text.strip(), "an error without a text"
            assert len(text.splitlines()) == 1, text
    assert time.perf_counter() - began < SECONDS
    if watched:
        assert _peak() - before < 10 * size + SLACK


@pytest.fixture(scope="session", name="survived")
def _survived():
    """`survived`, after the libraries behind every reading were imported, whose cost is no file's."""
    for name in (
        "datasets",
        "peft.tuners.tuners_utils",
        "transformers",
        "lora_lab.tasks.kinds.registry",
        "lora_lab.cli.files.inspect",
    ):
        importlib.import_module(name)
    return survived


@pytest.fixture(scope="session")
def capsys_of():
    """What a command prints, on both streams."""
    from lora_lab.cli import main

    def run(arguments: list[str]) -> str:
        said = io.StringIO()
        streams = contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)
        with streams[0], streams[1], warnings.catch_warnings(), contextlib.suppress(SystemExit):
            main(arguments)
        return said.getvalue()

    return run
