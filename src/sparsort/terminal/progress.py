"""Progress of long work: a bar on a terminal, one line that is updated in a notebook, and nothing elsewhere.

Contract: `progress(title, total)` yields `advance(n)`. Nothing is drawn where stderr is neither a terminal nor the output of a
notebook's cell, so logs and pipes stay clean, and nothing is ever written to stdout. A notebook gets one output per bar, of HTML
without widgets, so a saved notebook shows how far the work came. `SPARSORT_PROGRESS=0` and `hidden()` turn all bars off.
`advance` raises an interrupt again that was lost (`interrupts`).
"""

from __future__ import annotations

import contextlib
import html
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sparsort.terminal.interrupts import check
from sparsort.terminal.printing import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

_MOST_OF_TITLE = 60
# Seconds between two updates of a notebook's output. Every update is a message to the browser.
_INTERVAL = 0.5
_is_hidden = False


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar titled `title` over `total` units (None: unknown) and yield the function that advances it."""
    is_off = _is_hidden or os.environ.get("SPARSORT_PROGRESS", "").strip().lower() in ("0", "off", "false", "no")
    title = one_line(title, _MOST_OF_TITLE)
    if not is_off and (display := _notebook_display()) is not None:
        with _in_notebook(display, title, total) as draw:
            yield _checked(draw)
    elif not is_off and sys.stderr.isatty():
        with _on_terminal(title, total) as draw:
            yield _checked(draw)
    else:
        yield _checked(lambda _count: None)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Show no progress inside the block."""
    global _is_hidden
    before, _is_hidden = _is_hidden, True
    try:
        yield
    finally:
        _is_hidden = before


def _checked(draw: Callable[[int], None]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        check()
        draw(count)

    return advance


@contextlib.contextmanager
def _on_terminal(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    # rich draws link ids from the global generator, which belongs to the caller, so its state is restored afterwards.
    state = random.getstate()
    try:
        with _bars() as bars:
            task = bars.add_task(title, total=total)
            yield lambda count: bars.advance(task, count)
    finally:
        random.setstate(state)


def _notebook_display() -> Callable[..., Any] | None:
    """IPython's `display`, if this process is the kernel of a notebook."""
    # A process that has not imported ipykernel is no kernel, and IPython need not be installed.
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    # A terminal session of IPython has no kernel.
    return display if hasattr(get_ipython(), "kernel") else None


@contextlib.contextmanager
def _in_notebook(display: Callable[..., Any], title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    begin = drawn = time.monotonic()
    done = 0
    handle = display(_output(title, 0, total, 0.0), raw=True, display_id=True)

    def draw(count: int) -> None:
        nonlocal done, drawn
        done += count
        if (now := time.monotonic()) - drawn >= _INTERVAL:
            drawn = now
            handle.update(_output(title, done, total, now - begin), raw=True)

    try:
        yield draw
    finally:
        handle.update(_output(title, done, total, time.monotonic() - begin), raw=True)


def _output(title: str, done: int, total: int | None, seconds: float) -> dict[str, str]:
    """A bar as the data of a notebook's output, by MIME type."""
    # As an int, the time has no digits that change with every update.
    minutes, rest = divmod(int(seconds), 60)
    line = f"{title}: {done:,}{'' if total is None else f' of {total:,}'}, {minutes}:{rest:02}"
    bar = "" if total is None else f'<progress value="{done}" max="{max(total, 1)}"></progress> '
    return {"text/plain": line, "text/html": f"{bar}{html.escape(line)}"}


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
