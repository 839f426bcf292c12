"""The program: from words to the verb that they call, and from what went wrong to one line and an exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lora_lab.cli import folder_file, streams
from lora_lab.cli.folder_file import told
from lora_lab.cli.terminal import escaping, with_flags
from lora_lab.cli.verbs import VERBS, checking, command_of, function_of
from lora_lab.errors import LoraLabError, LoraLabNote, LoraLabWarning, OptionError
from lora_lab.escape import shortened, visible

_EPILOG = "Start with `lora-lab quickstart`: a minute or two from nothing to a first figure."


def application(arguments: Sequence[str]) -> typer.Typer:
    """The verb that is called with its options; without one, all of them without, which would take time to build."""
    app = typer.Typer(
        name="lora-lab",
        help="Analyse LoRA adapters: train them with CoTo, walk the line between them, see what is shared and what "
        "breaks.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_program)  # or typer would take a single verb for the whole program
    called = [verb for verb in VERBS if verb in (arguments or _completed())[:1]]
    for verb in called or VERBS:
        function = function_of(verb)
        app.command(verb, help=function.__doc__)(told(command_of(function)) if called else lambda: None)
    return app


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print("lora-lab", version("lora-lab"))
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """What is asked of the program itself."""


def _completed() -> list[str]:
    """The words of a command line that a shell asks to complete, behind the program's name."""
    if "_LORA_LAB_COMPLETE" not in os.environ:
        return []
    return (os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")).split()[1:]


# typer may carry its own copy of click, so the class is taken from what typer itself raises
_UsageError: Any = typer.BadParameter.__mro__[1]
_ENDED_BY = 128  # a command that signal n ended has exit code 128 + n, as shells have it


_COLLECTED = 10_000, 20, 50
"""New objects after which Python looks for garbage (by default 700, 10, 10): what a command loads, it keeps."""


def script(arguments: list[str] | None = None) -> None:
    """The command as it is installed, alone in its process: what there is at the end is not looked through once more.

    Loading torch makes a million objects that stay. Both settings together save .5 CPU s of every command that needs
    it; a process that goes on after `main` is left as it is.
    """
    gc.set_threshold(*_COLLECTED)
    try:
        main(arguments)
    finally:
        gc.freeze()


def main(arguments: list[str] | None = None) -> None:
    """Run the command; what the user can mend becomes one line and exit code 1, a bug shows its traceback."""
    streams.prepare()
    warnings.simplefilter("ignore")
    for category in (LoraLabWarning, LoraLabNote):
        warnings.filterwarnings("always", category=category)
    warnings.showwarning = _show_warning
    with streams.signals() as heard:
        code = _run(sys.argv[1:] if arguments is None else arguments, heard)
        refused = streams.finish()
        if refused and code == 0:
            _fail(f"standard output: cannot be written ({refused})")
    sys.exit(code)


def _run(arguments: list[str], heard: list[int]) -> int:
    """The exit code; what went wrong has been said."""
    try:
        with escaping():
            kept = folder_file.defaults(arguments)
            code = application(arguments)(arguments, standalone_mode=False, default_map=kept)
    except LoraLabError as error:
        return _say(with_flags(str(error)))
    except BrokenPipeError:
        streams.drop()
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "lora_lab"):
            raise
        return _say(f"{package} is needed for this and not installed; `lora-lab doctor` tells all that is missing")
    except (OSError, UnicodeError, ValueError, MemoryError, RuntimeError) as error:
        text = _users(error)
        if text is None:
            raise
        return _say(text)
    except _UsageError as error:
        text, unknown = _usage(error)
        return _say(text, code=1 if unknown else 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _ENDED_BY + signal.SIGINT
    if code == _ENDED_BY + signal.SIGINT:  # typer returns it, or raises, by its version
        return _say("interrupted; nothing half-written was left", _ENDED_BY + (heard or [signal.SIGINT])[0])
    return code if isinstance(code, int) else 0


def check(arguments: list[str]) -> None:
    """Take a command line apart and hold its options against their bounds; nothing is run.

    OptionError says what is wrong.
    """
    try:
        with checking():
            application(arguments)(arguments, standalone_mode=False)
    except _UsageError as error:
        raise OptionError(_usage(error)[0]) from error


def _say(text: str, code: int = 1) -> int:
    print("error:", visible(shortened(text.strip())), file=sys.stderr)
    return code


def _fail(text: str) -> None:
    sys.exit(_say(text))


def _users(error: Exception) -> str | None:
    """What to tell of an error that is no bug but the machine's or the user's: files, names, memory; None for a bug."""
    if _out_of_memory(error):
        return (
            "out of memory; fewer --examples, a smaller --batch-size or a base in bfloat16 (`dtype` in the task file) "
            f"take less ({str(error).strip().partition(chr(10))[0][:120]})"
        )
    if isinstance(error, UnicodeError):
        return f"a name or a text that is not UTF-8 ({error.reason if hasattr(error, 'reason') else error})"
    if isinstance(error, OSError):
        if not _folder_is_there():
            return "the current folder is not there any more; go to another one"
        if error.filename is None and streams.refuses():
            return f"standard output: cannot be written ({error.strerror})"
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    known = ("embedded null byte", "Could not determine home directory")  # of names in task files, and of ~nobody
    return str(error) if str(error).startswith(known) else None


def _folder_is_there() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in text.lower() for word in words)


def _usage(error: Any) -> tuple[str, bool]:
    """What was wrong with the command line, and whether it was an unknown name; typer knows what may be meant."""
    text = " ".join(str(error.format_message()).split()).rstrip(".")
    unknown = type(error).__name__ == "NoSuchOption" or text.startswith("No such command")
    where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
    return text[:1].lower() + text[1:] + where, unknown


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    kind = "note:" if isinstance(message, LoraLabNote) else "warning:"
    print(kind, visible(shortened(with_flags(str(message).strip()))), file=sys.stderr)
