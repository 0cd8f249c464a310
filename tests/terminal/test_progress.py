"""Progress is drawn on a terminal only, and leaves the caller's random state alone."""

from __future__ import annotations

import io
import random
import sys

import pytest

from sparsort.terminal.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_drawn_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with progress("scoring", 3) as advance:
        advance(3)
    assert written.getvalue() == ""


def test_a_terminal_sees_a_bar_and_the_random_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    written = _Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    before = random.getstate()
    with progress("scoring", 3) as advance:
        advance(3)
    assert "scoring" in written.getvalue()
    assert random.getstate() == before
