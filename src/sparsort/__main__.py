"""`python -m sparsort`: the command line."""

from __future__ import annotations

import sys
from typing import NoReturn

from sparsort.interrupts import exit_code, handle_signals
from sparsort.terminal import OutputError, closed, discard, note, unwritable


def main() -> None:
    """Run the command line; an interrupt while it is still being loaded, or a stdout that fails, is no traceback either."""
    # Checked first: the first file that is opened would get the number of a closed stdout, and what is printed to it.
    if sys.stdout is None:
        _fail(closed())
    handle_signals()
    code: object = 0
    try:
        from sparsort.recipes.cli import app

        app()
    except KeyboardInterrupt as stop:
        note("sparsort: interrupted before any work. Run the same command again.")
        code = exit_code(stop)
    except SystemExit as stop:
        code = stop.code
    except OutputError as error:
        # Printed before a command runs: help and the version.
        _fail(str(error))
    if (failure := _flushed()) is not None:
        discard(sys.stdout)
        if not isinstance(failure, BrokenPipeError) and code in (0, None):
            _fail(unwritable(failure))
    sys.exit(code)  # type: ignore[arg-type]


def _flushed() -> OSError | None:
    """Write out what stdout holds back, and return the error if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    except ValueError:
        # It is closed already.
        return None
    return None


def _fail(message: str) -> NoReturn:
    discard(sys.stdout)
    note(f"sparsort: {message}")
    sys.exit(OutputError.exit_code)


if __name__ == "__main__":
    main()
