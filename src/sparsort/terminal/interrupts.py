"""SIGINT, SIGTERM and SIGHUP in a command: the current write is finished, and the command exits with 128 + the signal's number.

Contract: the command line calls `handle_signals` once, in the main thread. From then on a signal raises `Interrupted`, a
KeyboardInterrupt, in the main thread: immediately, or at the end of a `held()` block, which writes files that belong together. A
command that can stop more gracefully is notified first (`asking`). A second signal ends the process immediately. A scheduler or
`timeout` may send one request twice, so a SIGTERM or SIGHUP counts as a second signal only after one second. A signal that the
parent process ignores, as nohup ignores SIGHUP, stays ignored. Without `handle_signals`, as in a library, nothing changes.

Forked children (data workers, pools) get the original handlers back and a process group of their own. A signal to the group,
such as Ctrl-C in a terminal, therefore reaches only the main process, which ends its children when it no longer needs them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A SIGTERM or SIGHUP within this many seconds of the previous signal is the same request.
_SAME_REQUEST = 1.0


class Interrupted(KeyboardInterrupt):
    """The process was sent a signal that asks it to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """The signals that this process received. There is one object, because signals belong to the whole process."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}  # the handlers that were replaced, by signal
        self.number: int | None = None  # the latest signal
        self.at = 0.0
        self.asked: Callable[[str], None] | None = None
        self.depth = 0  # number of `held` blocks that are open
        self.waiting = False  # whether to raise at the end of the outermost `held` block
        self.raised = False


_state = _State()


def handle_signals() -> None:
    """Handle the signals that have their default handler; those that are ignored or handled otherwise stay as they are."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            _state.before[number] = signal.signal(number, _on_signal)
    # A forked child would otherwise inherit these handlers together with the state.
    os.register_at_fork(after_in_child=_leave_to_parent)
    sys.unraisablehook = _without_interrupts(sys.unraisablehook)


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code that a shell reports for a process that the signal ended: 128 + its number, 130 for SIGINT."""
    return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)


def received() -> KeyboardInterrupt | None:
    """The interrupt that this process received, whether or not it was raised; None if it received none."""
    return None if _state.number is None else Interrupted(_state.number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay a signal that arrives inside the block until the end of the block, which should only write a few files."""
    # Python runs signal handlers in the main thread only, so other threads are never interrupted.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
        if _state.waiting and not _state.depth:
            _state.waiting = False
            _raise()


@contextlib.contextmanager
def asking(ask: Callable[[str], None]) -> Iterator[None]:
    """Call `ask` with the name of the first signal inside the block; the next signal raises an interrupt.

    Without `handle_signals` this applies to the first SIGINT only, and only in the main thread.
    """
    if _state.before:
        _state.asked = ask
        try:
            yield
        finally:
            _state.asked = None
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def once(number: int, _frame: object) -> None:
        # The handler is restored first, so that a second signal acts even while `ask` runs.
        signal.signal(number, before)
        ask(signal.Signals(number).name)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise a lost interrupt again: one that was raised in a destructor or a callback, where Python only reports it."""
    if _state.raised and threading.current_thread() is threading.main_thread() and not _is_unwinding():
        _raise()


def _on_signal(number: int, _frame: object) -> None:
    now = time.monotonic()
    # A scheduler may repeat its request immediately; only a later signal is a second one.
    if number != signal.SIGINT and _state.number is not None and now - _state.at < _SAME_REQUEST:
        return
    # This is the second signal: the default handler ends the process immediately.
    if _state.raised or _state.waiting:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    # The callback is called once; the next signal raises an interrupt.
    ask, _state.asked = _state.asked, None
    _state.number, _state.at = number, now
    if ask is not None:
        ask(signal.Signals(number).name)
    elif _state.depth:
        _state.waiting = True
    else:
        _raise()


def _raise() -> NoReturn:
    _state.raised = True
    raise Interrupted(_state.number or signal.SIGINT)


def _is_unwinding() -> bool:
    """Whether an interrupt is already propagating, and the caller runs as part of the cleanup."""
    error = sys.exc_info()[1]
    # The interrupt may be the context of another error that was raised during the cleanup.
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _leave_to_parent() -> None:
    global _state
    for number, handler in _state.before.items():
        signal.signal(number, handler)
    _state = _State()
    with contextlib.suppress(OSError):
        # A process group of its own keeps Ctrl-C in the terminal away from the child.
        os.setpgid(0, 0)


def _without_interrupts(report: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `sys.unraisablehook` that does not report interrupts, because `check` raises them again."""

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            report(unraisable)

    return hook
