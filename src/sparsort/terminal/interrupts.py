"""SIGINT, SIGTERM and SIGHUP in a command: the write under way is finished, and the command ends with 128 + the signal's number.

Contract: `handle_signals` is for the command line, once, in the main thread. From then on a signal raises `Interrupted`, a
KeyboardInterrupt, in the main thread: at once, or at the end of `held()`, in which files are written that belong together. A
command that can stop in better order is asked first (`asking`). A second signal ends the process at once; a scheduler or
`timeout` may send one request twice, so SIGTERM and SIGHUP count as a second one only after a second. A signal that the parent
ignores, as nohup does SIGHUP, stays ignored. Without `handle_signals`, as in a library, all of this does nothing.

Forked children (data workers, pools) get the former handlers back, and a process group of their own: what is sent to the group,
such as Ctrl-C in a terminal, is for the main process, which ends its children when it has finished with them.
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
# Seconds within which a SIGTERM or SIGHUP is the same request as the signal before it.
_SAME_REQUEST = 1.0


class Interrupted(KeyboardInterrupt):
    """The process was sent a signal that asks it to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """What this process was sent. One object, as signals are the whole process's."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}  # the handlers that were replaced
        self.number: int | None = None  # the latest signal
        self.at = 0.0
        self.asked: Callable[[str], None] | None = None
        self.depth = 0  # of `held`
        self.waiting = False  # to raise, at the end of `held`
        self.raised = False


_state = _State()


def handle_signals() -> None:
    """Take over the signals that are neither ignored nor handled by anything but Python's default."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            _state.before[number] = signal.signal(number, _on_signal)
    os.register_at_fork(after_in_child=_leave_to_parent)
    sys.unraisablehook = _without_interrupts(sys.unraisablehook)


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell reports of a process that the signal ended: 128 + its number, 130 for SIGINT."""
    return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)


def received() -> KeyboardInterrupt | None:
    """The interrupt that this process was sent, whether it was raised or not; None if it was sent none."""
    return None if _state.number is None else Interrupted(_state.number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Raise a signal that arrives inside the block at its end. The block should take no longer than writing some files."""
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
    """Have the first signal inside the block call `ask` with its name; another one then raises an interrupt.

    Without `handle_signals` it is the first SIGINT, and only in the main thread.
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
        signal.signal(number, before)
        ask(signal.Signals(number).name)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise an interrupt again that was raised and lost, as in a destructor or a callback, where Python only reports it."""
    if _state.raised and threading.current_thread() is threading.main_thread() and not _is_unwinding():
        _raise()


def _on_signal(number: int, _frame: object) -> None:
    now = time.monotonic()
    if number != signal.SIGINT and _state.number is not None and now - _state.at < _SAME_REQUEST:
        return
    if _state.raised or _state.waiting:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
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
    """Whether an interrupt is on its way up, and this is called to clean up."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _leave_to_parent() -> None:
    global _state
    for number, handler in _state.before.items():
        signal.signal(number, handler)
    _state = _State()
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)


def _without_interrupts(report: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A `sys.unraisablehook` that is silent about interrupts, which `check` raises again."""

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            report(unraisable)

    return hook
