"""Progress bars for long work, on stderr, and only if it is a terminal.

Contract: `progress(title, total)` yields `advance(n)`. Nothing is drawn when stderr is not a terminal, so logs and pipes
stay clean, and nothing is ever written to stdout. `advance` raises an interrupt again that was lost (`interrupts`).
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sparsort.terminal.interrupts import check
from sparsort.terminal.printing import one_line

if TYPE_CHECKING:
    from rich.progress import Progress


_MOST_OF_TITLE = 60


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar titled `title` over `total` units (None: unknown) and yield the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda _count: check()
        return
    # rich draws link ids from the global generator, which belongs to the caller, so its state is restored afterwards.
    state = random.getstate()
    try:
        with _bars() as bars:
            task = bars.add_task(one_line(title, _MOST_OF_TITLE), total=total)

            def advance(count: int) -> None:
                check()
                bars.advance(task, count)

            yield advance
    finally:
        random.setstate(state)


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        # Titles contain file names, which must not be read as markup.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
