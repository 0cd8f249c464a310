"""The command line: the application, and the class of its commands.

Contract: results go to stdout, progress and warnings to stderr, all printable (see `terminal.printing`). `--json` prints one
object and nothing else. An option without an effect is refused before a command does anything. Exit codes:

- 0: the command is done.
- 1: stdout cannot be written.
- 2: there is a mistake in the call or the input, or the disk is full; one message says which.
- 3: the command is done, but rows have no score and `--strict` was given.
- 4: the part of `sparsort score --part` is done, but other parts of the folder are not.
- 130, 143 and 129: SIGINT, SIGTERM or SIGHUP stopped the command; finished work is kept if the command has a folder for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from sparsort.errors import SparsortError
from sparsort.recipes.cli.options import complete_help, replace_retired, retired_flags
from sparsort.registry import load
from sparsort.storage.files import disk_error, is_full, write_failure
from sparsort.terminal.interrupts import exit_code, received
from sparsort.terminal.printing import OutputError, discard, note, printable, printable_messages, show, unwritable
from sparsort.terminal.progress import hidden

# typer includes a copy of click, and gives the base class of its usage errors no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]
_HELP = "Rank examples by how sparsely a language model represents them, and order prompts and data by that rank."
# Commands that keep finished work in the folder of --out or next to it, and resume from it.
_RESUMED = ("score", "ablate", "train", "calibrate")


class _PrintableUsage:
    """A command, or the group of commands: usage errors are printable, and a failure to print the help is reported."""

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


class _Commands(_PrintableUsage, TyperGroup):
    """The group of all commands; it turns an interrupt and every error that a user can fix into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            quiet = ctx.params.get("quiet")
            with printable_messages(_level(ctx.params)), hidden() if quiet else contextlib.nullcontext():
                return super().invoke(ctx)
        except SparsortError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            _fail("interrupted. Run the same command again.", exit_code(stop))
        except BrokenPipeError:
            # The reader of the output has closed the pipe (`| head`), which is not an error.
            discard(sys.stdout)
            sys.exit(0)


class _StoppedError(SparsortError):
    """A command was interrupted; the message says how to resume."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckedCommand(_PrintableUsage, TyperCommand):
    """A command that first refuses options without an effect, and that says how to resume when it is interrupted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = replace_retired(retired_flags(self.callback), self.params, args)
        hints = get_type_hints(self.callback).items()
        names = {name for name, hint in hints if Path in (hint, *get_args(hint))}
        _refuse_empty_paths({flag for param in self.params if param.name in names for flag in param.opts}, args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        complete_help(self.callback, self.params)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        # The conditions import the recipes, which would slow down `--help`.
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
            # A signal to all processes of a job also ends data workers and peers. This process may meet their loss before it
            # handles the signal itself.
            if (sent := received()) is not None and isinstance(error, (RuntimeError, OSError, EOFError)):
                raise _stopped(ctx, sent) from error
            path = Path(getattr(error, "filename", None) or ctx.params.get("out") or ".")
            if (failure := write_failure(error, path)) is not None and is_full(failure):
                raise disk_error(path, failure) from error
            raise


app = typer.Typer(
    name="sparsort",
    cls=_Commands,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import sparsort

        show(f"sparsort {sparsort.__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Print more about the work; twice (-vv) for every piece.")
    ] = 0,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print no warnings and no progress bars, only results, notes and errors."),
    ] = False,
) -> None:
    """Accept the options that come before the name of a command; `_Commands.invoke` reads them."""


def _level(options: Mapping[str, Any]) -> int:
    """The lowest level of the log records that a command prints.

    Raises:
        SparsortError: both options were given.
    """
    if options.get("quiet") and options.get("verbose"):
        raise SparsortError("--quiet and --verbose exclude each other. Give one of them.")
    if options.get("quiet"):
        return logging.ERROR
    return {0: logging.WARNING, 1: logging.INFO}.get(options.get("verbose") or 0, logging.DEBUG)


def _add(name: str) -> None:
    """Add a command: the function of this name in the module of this name in `commands/`, which has an `EXAMPLE` too."""
    package = "sparsort.recipes.cli.commands"
    app.command(cls=CheckedCommand, epilog=load(f"{name}:EXAMPLE", package))(load(f"{name}:{name}", package))


# The help lists the commands in this order.
_add("score")
_add("status")
_add("order")
_add("choose")
_add("classify")
_add("calibrate")
_add("ablate")
_add("report")
_add("plan")
_add("train")
_add("env")
_add("cache")


def _refuse_empty_paths(flags: Collection[str], args: Sequence[str]) -> None:
    """Refuse an empty path, such as that of an unset shell variable, because pathlib reads it as the current folder.

    Args:
        flags: the options that take a path.
        args: the arguments after the name of the command.

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


def _stopped(ctx: Any, stop: KeyboardInterrupt) -> _StoppedError:
    cause = f"interrupted by {stop}" if str(stop) else "interrupted"
    # The arguments of a launcher such as torchrun, or of another program that calls the app, are not known.
    is_alone = ctx.info_name in sys.argv[1:] and "RANK" not in os.environ
    command = f": {shlex.join(['sparsort', *sys.argv[1:]])}" if is_alone else "."
    out = ctx.params.get("out")
    # A calibration keeps the scored rows in a folder next to its file.
    folder = Path(out).with_suffix(".rows") if out is not None and ctx.info_name == "calibrate" else out
    if ctx.info_name in _RESUMED and folder is not None and not Path(folder).expanduser().exists():
        next_step = "Nothing was finished yet. Run"
    elif ctx.info_name in _RESUMED and folder is not None:
        next_step = f"Finished work is kept in {folder}. To resume from there, run"
    elif ctx.info_name == "score":
        next_step = "Nothing is kept without --out FOLDER, which a score resumes from. Run"
    else:
        next_step = "Files that it was writing are whole or absent. Run"
    return _StoppedError(f"{cause}. {next_step} the same command again{command}", exit_code(stop))


def _fail(message: str, code: int) -> NoReturn:
    note(f"sparsort: {message}")
    sys.exit(code)
