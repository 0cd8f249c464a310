"""A command of the command line: checked before it does anything, with printable errors, and resumable after an interrupt."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from sparsort.errors import SparsortError
from sparsort.recipes.cli.options import replace_retired, retired_flags
from sparsort.storage.files import disk_error, is_full, write_failure
from sparsort.terminal.interrupts import exit_code, received
from sparsort.terminal.printing import OutputError, printable, unwritable

# typer brings a copy of click, and gives the base class of its usage errors no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]


class PrintableUsage:
    """A command, or the group of them, whose usage errors repeat the arguments printably, and whose help can fail to print."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)  # type: ignore[misc]
        except _UsageError as error:
            error.message = printable(error.message)
            raise
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(unwritable(error)) from error


class StoppedError(SparsortError):
    """A command was interrupted; the message says how to resume."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckedCommand(PrintableUsage, TyperCommand):
    """A command that refuses options without an effect before it does anything, and says how to resume when it is interrupted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = replace_retired(retired_flags(self.callback), self.params, args)
        hints = get_type_hints(self.callback).items()
        names = {name for name, hint in hints if Path in (hint, *get_args(hint))}
        _refuse_empty_paths({flag for one in self.params if one.name in names for flag in one.opts}, args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from sparsort.recipes.cli.option_conditions import check

        try:
            check(ctx)
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _stopped(ctx, stop) from stop
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except SparsortError:
            raise
        except Exception as error:
            # A signal to all processes of a job ends data workers and peers too, and their loss may be met first.
            if (sent := received()) is not None and isinstance(error, (RuntimeError, OSError, EOFError)):
                raise _stopped(ctx, sent) from error
            path = Path(getattr(error, "filename", None) or ctx.params.get("out") or ".")
            if (failure := write_failure(error, path)) is not None and is_full(failure):
                raise disk_error(path, failure) from error
            raise


def _refuse_empty_paths(flags: Collection[str], args: Sequence[str]) -> None:
    """Refuse an empty path, such as that of a shell variable that is not set: pathlib takes it for the current folder.

    Args:
        flags: the options that take a path.
        args: what follows the name of the command.

    Raises:
        SparsortError: an option that takes a path has an empty value, or an argument is empty.
    """
    before = ""
    for text in args:
        flag = text.removesuffix("=") if text.endswith("=") else before if not text else ""
        if flag in flags:
            raise SparsortError(f"{flag} is empty; expected a path. Is a variable of the shell not set?")
        if not text and not before.startswith("-"):
            raise SparsortError("an argument is empty; expected a path. Is a variable of the shell not set?")
        before = text


# Commands that keep finished work in the folder of --out or next to it, and resume from it.
_RESUMED = ("score", "ablate", "train", "calibrate")


def _stopped(ctx: Any, stop: KeyboardInterrupt) -> StoppedError:
    cause = f"interrupted by {stop}" if str(stop) else "interrupted"
    # The arguments of a launcher such as torchrun, or of another program that calls the app, are not known.
    is_alone = ctx.info_name in sys.argv[1:] and "RANK" not in os.environ
    command = f": {shlex.join(['sparsort', *sys.argv[1:]])}" if is_alone else "."
    out = ctx.params.get("out")
    # A calibration keeps the rows of its pass in a folder next to its file.
    folder = Path(out).with_suffix(".rows") if out is not None and ctx.info_name == "calibrate" else out
    if ctx.info_name in _RESUMED and folder is not None and not Path(folder).expanduser().exists():
        kept = "Nothing was finished yet. Run"
    elif ctx.info_name in _RESUMED and folder is not None:
        kept = f"What was finished is kept in {folder}. To resume from there, run"
    elif ctx.info_name == "score":
        kept = "Nothing is kept without --out FOLDER, which a score resumes from. Run"
    else:
        kept = "Files that it was writing are whole or absent. Run"
    return StoppedError(f"{cause}. {kept} the same command again{command}", exit_code(stop))
