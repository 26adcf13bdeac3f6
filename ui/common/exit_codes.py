"""How a command ends: exit codes, one clear message on stderr, a traceback only if asked for.

0 done · 1 failed · 2 the command line asks for something that cannot be · 3 this machine lacks something (model, network,
device, ffmpeg) · 130 interrupted by Ctrl-C · 143 terminated.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer

from tilewise.ui.common.terminal import shown

OK, FAILED, USAGE, ENVIRONMENT, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
DEBUG = "TILEWISE_DEBUG"
LONGEST = 1000  # characters of a line of a message: values that it repeats may be longer than anybody reads

F = TypeVar("F", bound=Callable[..., None])


def exit_codes(command: F) -> F:
    """Decorates a command: whatever it raises becomes a message and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _complain("interrupted; nothing was left half-written")
            raise typer.Exit(INTERRUPTED) from None
        except SystemExit as ended:
            if ended.code == TERMINATED:
                _complain("terminated; nothing was left half-written")
            raise
        except typer.Exit:
            raise
        except Exception as error:
            if _was_interrupted(error):
                _complain("interrupted; nothing was left half-written")
                raise typer.Exit(INTERRUPTED) from None
            if _is_of_another_rank(error):  # which says why
                raise typer.Exit(FAILED) from None
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                traceback.print_exc()
            code = _code(error)
            _complain(_message(error, code))
            raise typer.Exit(code) from None

    return guarded  # type: ignore[return-value]


def run_app(app: typer.Typer) -> NoReturn:
    """Runs the app so that SIGTERM cleans up as Ctrl-C does, and exits."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KeyboardInterrupt:  # outside a command: while importing or parsing
        sys.exit(INTERRUPTED)
    sys.exit(OK)


def _terminate(*_: Any) -> NoReturn:
    sys.exit(TERMINATED)


def _is_of_another_rank(error: Exception) -> bool:
    """Whether another of the processes that torchrun started failed, and this one ends for that alone."""
    module = sys.modules.get("tilewise.pipelines.parallel.ranks")
    return module is not None and isinstance(error, module.OtherRankError)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error began as Ctrl-C: an extension module that is interrupted while it loads reports an ImportError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _code(error: Exception) -> int:
    from tilewise.pipelines.errors import SetupError
    from tilewise.plugins.errors import ConfigError

    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, SetupError | ImportError):
        return ENVIRONMENT
    return FAILED


def _message(error: Exception, code: int) -> str:
    from tilewise.plugins.errors import TilewiseError

    text = str(error).strip() or type(error).__name__
    if isinstance(error, TilewiseError):
        return text
    if "torch" in sys.modules and _is_out_of_memory(error):
        asked = re.search(r"(?i)tried to allocate ([\d.]+ \w+)", text)
        tried = f" ({asked[1]} more were asked for)" if asked else ""
        return (
            f"out of memory{tried}: give fewer frames or a smaller size; a batch tries again with less, by --retry-oom"
        )
    if isinstance(error, ImportError):
        return f"a library is missing: {text}"
    return f"{type(error).__name__}: {text}\nSet {DEBUG}=1 for the traceback."


def _is_out_of_memory(error: Exception) -> bool:
    from tilewise.pipelines.memory.limits import is_out_of_memory

    return is_out_of_memory(error)


def _complain(message: str) -> None:
    lines = [
        line if len(line) <= LONGEST else f"{line[:LONGEST]} … ({len(line):,} characters)"
        for line in message.split("\n")
    ]
    rank = os.environ.get("RANK", "0")
    who = "tilewise: " if rank == "0" else f"tilewise, process {rank}: "
    typer.echo(who + shown("\n".join(lines)), err=True)
