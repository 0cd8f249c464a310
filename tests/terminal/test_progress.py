"""Progress is drawn on a terminal and in a notebook, nowhere else, and leaves the caller's random state alone."""

from __future__ import annotations

import io
import random
import sys
import types
from typing import Any

import pytest

from sparsort.terminal.progress import hidden, progress


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


@pytest.mark.parametrize("value", ["0", "off"])
def test_a_terminal_sees_no_bar_if_bars_are_turned_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = _Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    with hidden(), progress("scoring", 3) as advance:
        advance(3)
    monkeypatch.setenv("SPARSORT_PROGRESS", value)
    with progress("scoring", 3) as advance:
        advance(3)
    assert written.getvalue() == ""


class _Notebook:
    """IPython's interface as far as a bar uses it: `display` returns a handle, whose `update` replaces the output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
        self.outputs: list[dict[str, str]] = []
        self.updates = 0
        package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        package.get_ipython = lambda: shell  # type: ignore[attr-defined]
        display.display = self._display  # type: ignore[attr-defined]
        for name, module in {"ipykernel": package, "IPython": package, "IPython.display": display}.items():
            monkeypatch.setitem(sys.modules, name, module)

    def _display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> _Notebook:
        assert raw
        assert display_id
        self.outputs.append(data)
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.updates += 1
        self.outputs[-1] = data


def test_a_notebook_gets_one_output_that_is_updated_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = _Notebook(monkeypatch, types.SimpleNamespace(kernel=None))
    written = _Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    now: list[float] = [0.0]
    monkeypatch.setattr("sparsort.terminal.progress.time.monotonic", lambda: now[0])
    with progress("<b>rows</b>", 1000) as advance:
        for _ in range(1000):
            now[0] += 0.075
            advance(1)
    # 75 seconds, at most two updates in each of them, and one at the end.
    assert 100 < notebook.updates <= 151
    [output] = notebook.outputs
    assert output["text/plain"] == "<b>rows</b>: 1,000 of 1,000, 1:15"
    assert output["text/html"] == (
        '<progress value="1000" max="1000"></progress> &lt;b&gt;rows&lt;/b&gt;: 1,000 of 1,000, 1:15'
    )
    assert written.getvalue() == ""


def test_a_notebook_shows_the_count_where_the_total_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = _Notebook(monkeypatch, types.SimpleNamespace(kernel=None))
    with progress("rows", None) as advance:
        advance(7)
    [output] = notebook.outputs
    assert output["text/html"] == output["text/plain"] == "rows: 7, 0:00"


def test_a_terminal_session_of_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell: Any = types.SimpleNamespace()
    notebook = _Notebook(monkeypatch, shell)
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with progress("rows", 1) as advance:
        advance(1)
    assert notebook.outputs == []
    assert written.getvalue() == ""
