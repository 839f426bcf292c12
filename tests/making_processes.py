"""Commands in processes of their own, forked from one that has loaded torch and PEFT already, which takes seconds."""

import functools
import gc
import importlib
import multiprocessing
import os
import runpy
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
            "lora_lab.cli.program",
            "lora_lab.analysis.merge_tables.table",
            "lora_lab.analysis.coalitions.sweep",
            "lora_lab.plots.registry",
            "lora_lab.training.fit",
            "accelerate",
            "peft",
            "transformers.models.vit.modeling_vit",
            "transformers.trainer",
        ]
    )
    return context


def _enter(folder: Path) -> None:
    """What every process begins with: it works in the folder, where out.txt and err.txt hold what it says."""
    gc.freeze()  # a training looks for garbage, and would touch every page that is shared with the server
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has
    for stream, name in ((sys.stdout, "out.txt"), (sys.stderr, "err.txt")):
        stream.flush()
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1 if name == "out.txt" else 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def _run(
    arguments: list[str], folder: Path, environment: Mapping[str, str], session: bool, fatal: tuple[str, str] | None
) -> None:
    from lora_lab.cli import main
    from lora_lab.scoring.sharing import local

    local._CONTEXT = multiprocessing.get_context("fork")  # this process has no threads yet
    os.environ.update(environment)
    if session:
        os.setsid()
    _enter(folder)
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


def _main(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def _launch(folder: Path, count: int, module: str, arguments: list[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _enter(folder)
    config = LaunchConfig(
        1, 1, count, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", start_method="fork", monitor_interval=0.1
    )
    elastic_launch(config, _main)(module, arguments)


def launched(folder: Path, count: int, module: str, *arguments: object) -> BaseProcess:
    """torchrun: its agent in a process, and under it so many that run the module as `python -m` does."""
    process = server().Process(target=_launch, args=(folder, count, module, [str(each) for each in arguments]))
    process.start()
    return process
