"""Commands in processes of their own, forked from one that has loaded torch and PEFT already, which takes seconds."""

import functools
import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path


@functools.cache
def server() -> ForkServerContext:
    """What forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "lora_lab.cli",
            "lora_lab.analysis.compare",
            "lora_lab.analysis.sweep",
            "lora_lab.plots.registry",
            "lora_lab.training.fit",
            "accelerate",
            "peft",
            "sklearn.datasets",
            "transformers.models.vit.modeling_vit",
            "transformers.trainer",
        ]
    )
    return context


def _run(
    arguments: list[str], folder: Path, environment: Mapping[str, str], session: bool, fatal: tuple[str, str] | None
) -> None:
    from lora_lab.cli import main
    from lora_lab.scoring import local

    gc.freeze()  # a training looks for garbage, and would touch every page that is shared with the server
    local._CONTEXT = multiprocessing.get_context("fork")  # this process has no threads yet
    os.chdir(folder)
    os.environ.update(environment)
    if session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has ignored
    for stream, name in ((sys.stdout, "out.txt"), (sys.stderr, "err.txt")):
        stream.flush()
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1 if name == "out.txt" else 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    if fatal:
        module, name = fatal
        setattr(
            importlib.import_module(f"lora_lab.{module}"), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        )
    main(arguments)


def started(
    folder: Path,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    session: bool = False,
    fatal: tuple[str, str] | None = None,
) -> BaseProcess:
    """A process that runs the command in a folder; what it says comes to out.txt and err.txt there.

    `session`: whether it leads a group of processes of its own. `fatal`: module and name of a function to die in.
    """
    settings = ([str(each) for each in arguments], folder, environment or {}, session, fatal)
    process = server().Process(target=_run, args=settings)
    process.start()
    return process


def finished(process: BaseProcess, folder: Path, code: int = 0) -> str:
    """What it said on standard error, once it has ended with this code."""
    process.join(120)
    text = (folder / "err.txt").read_text()
    assert process.exitcode == code, text
    return text
