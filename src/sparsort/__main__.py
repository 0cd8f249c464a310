"""`python -m sparsort`: the command line."""

from __future__ import annotations

import sys
from typing import NoReturn

from sparsort.terminal.interrupts import exit_code, handle_signals, received
from sparsort.terminal.printing import OutputError, closed, discard, note, unwritable


def main() -> None:
    """Run the command line; an interrupt during its import, or a failing stdout, does not print a traceback either."""
    # This check must come first: the first file that is opened would get the descriptor of a closed stdout, and with it
    # everything that is printed.
    if sys.stdout is None:
        _fail(closed())
    handle_signals()
    code: object = 0
    try:
        from sparsort.recipes.cli.app import app

        app()
    except KeyboardInterrupt as stop:
        note("sparsort: interrupted before any work. Run the same command again.")
        code = exit_code(stop)
    except SystemExit as stop:
        # click exits with 1 if the reader of its help has closed the pipe, which is not a failure.
        code = 0 if isinstance(stop.__context__, BrokenPipeError) else stop.code
        if (interrupt := _not_reported(stop)) is not None:
            note("sparsort: interrupted. Run the same command again.")
            code = exit_code(interrupt)
    except OutputError as error:
        # Help and the version are printed before a command runs, so no command reports this error.
        _fail(str(error))
    if (failure := _flushed()) is not None:
        discard(sys.stdout)
        if not isinstance(failure, BrokenPipeError) and code in (0, None):
            _fail(unwritable(failure))
    sys.exit(code)  # type: ignore[arg-type]


def _not_reported(stop: SystemExit) -> KeyboardInterrupt | None:
    """The interrupt that typer turned into this exit: outside a command it prints nothing, and its code is 130 for any signal."""
    from typer import Exit

    cause = getattr(stop.__context__, "__cause__", None)
    if isinstance(stop.__context__, Exit) and isinstance(cause, KeyboardInterrupt):
        return received() or cause
    return None


def _flushed() -> OSError | None:
    """Flush stdout, and return the error if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    except ValueError:
        # The stream is already closed, so nothing is left to flush.
        return None
    return None


def _fail(message: str) -> NoReturn:
    discard(sys.stdout)
    note(f"sparsort: {message}")
    sys.exit(OutputError.exit_code)


if __name__ == "__main__":
    main()
