"""Output is printable and bounded, tables keep their numbers, and nothing bypasses these functions."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from sparsort.terminal.printing import note, one_line, printable, printable_messages, show, show_json
from sparsort.terminal.progress import progress
from sparsort.terminal.tables import Table, natural_key, number, prose, text

Safe = Callable[[str], bool]
ROOT = Path(__file__).parents[2]
HOSTILE = (
    "[bold]\x1b[31mRED\x1b]0;pwned\x07\x9b31m\u202ertl\u2066\u200f\x00\x7f\u2028\ud800\U000e0041 é日 👩\u200d👧[/bold]"
)


# Python calls these printable, but they are blank, and so can hide text: fillers of Hangul, and tags and variation selectors.
HIDING = re.compile("[\u115f\u1160\u3164\uffa0\U000e0000-\U000e0fff]")


@example("\U000e0100")
@example("\u3164")
@given(st.text(max_size=60))
def test_every_text_is_made_safe_and_ordinary_text_stays(is_printed_safely: Safe, value: str) -> None:
    assert is_printed_safely(printable(value))
    assert is_printed_safely(one_line(value, 40))
    assert "\n" not in one_line(value, 40)
    assert len(one_line(value, 40)) <= 40
    if value.isprintable() and not HIDING.search(value):
        assert printable(value) == value


def test_escapes_show_what_was_there_and_markup_is_text() -> None:
    assert printable("a\x1b[31m\u202e\n[bold]\t") == "a\\x1b[31m\\u202e\n[bold]\\t"
    assert printable("سلام می‌خواهم 👩\u200d👧 日本") == "سلام می‌خواهم 👩\u200d👧 日本"


def test_a_long_text_is_cut_in_the_middle_and_keeps_its_end() -> None:
    found = printable("x" * 10_000_000 + " Pass --answer.")
    assert len(found) < 4100
    assert found.endswith(" Pass --answer.")
    assert "9,996,015 characters not shown" in found
    assert one_line("word " * 9_000_000, 20) == "word word word word…"
    assert len(printable("y" * 9000, most=None)) == 9000


def test_json_is_the_same_value_in_safe_characters(capsys: pytest.CaptureFixture[str], is_printed_safely: Safe) -> None:
    value = {HOSTILE: [HOSTILE, "é", 1.5]}
    show_json(value)
    written = capsys.readouterr().out
    assert is_printed_safely(written)
    assert json.loads(written) == value
    assert "é" in written


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_logs_warnings_and_titles_are_printable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_printed_safely: Safe
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    log = logging.getLogger("some library")
    log.addHandler(handler)
    before = warnings.showwarning
    try:
        with printable_messages():
            log.warning("of %s", HOSTILE)
            warnings.showwarning(UserWarning(HOSTILE), UserWarning, "file.py", 3)
    finally:
        log.removeHandler(handler)
    assert warnings.showwarning is before
    shown = capsys.readouterr().err
    assert is_printed_safely(shown)
    assert shown.splitlines() == [f"of {printable(HOSTILE)}", f"warning: {printable(HOSTILE)}"]
    written = _Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", "dumb")
    with progress(HOSTILE, 3) as advance:
        advance(3)
    assert "\x1b]0" not in written.getvalue()
    assert "\u202e" not in written.getvalue()


class _Full(io.StringIO):
    encoding = "ascii"

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_stream_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Full())
    note("lost")
    monkeypatch.setattr(sys, "stderr", None)
    note("lost")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(Exception, match="stdout is closed"):
        show("x")


def test_an_encoding_without_the_character_gets_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    show("Δ = 3")
    assert written.getvalue() == b"\\u0394 = 3\n"


# Tables

NUMBERS = [["1", "-0.123456789", "[−1.25, +0.75]"], ["240", "1,234,567.8901", "[+10.25, +99.75]"]]


def _table() -> Table:
    names = ("rank", "difficulty of it", "95 % interval")
    table = Table(number(names[0]), text("id"), number(names[1]), number(names[2]), prose("groups"), text("text"))
    for place, row in enumerate(NUMBERS):
        groups = "web\xa050\xa0%, code\xa025\xa0%, books\xa025\xa0%"
        table.add_row(row[0], f"id-{place} {HOSTILE}" * 9, row[1], row[2], groups, "日本語 words " * 30)
    return table


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_numbers_and_headings_are_whole_at_every_width(width: int, is_printed_safely: Safe) -> None:
    lines = _table().lines(width)
    assert max(map(cell_len, lines)) <= width
    assert is_printed_safely("".join(lines))
    written = "\n".join(lines)
    for cell in (*NUMBERS[0], *NUMBERS[1], "rank", "difficulty of it", "95 % interval", "groups", "text"):
        assert cell in written, cell
    assert [written.count(share) for share in ("web 50 %", "code 25 %", "books 25 %")] == [2, 2, 2]


@pytest.mark.parametrize("columns", ["60", "80", "120", None])
def test_a_table_is_as_wide_as_the_terminal_and_80_in_a_pipe(
    columns: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
        # Not the one that the tests are run from.
        monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    else:
        monkeypatch.setenv("COLUMNS", columns)
    _table().show()
    widths = [cell_len(line) for line in capsys.readouterr().out.splitlines()]
    assert int(columns or 80) - 2 <= max(widths) <= int(columns or 80)


def test_a_column_is_right_aligned_by_its_kind_alone() -> None:
    table = Table(text("rank"), number("name"))
    table.add_row("a", "1")
    table.add_row("bbbbbb", "22")
    assert table.lines(80) == ["rank    name", "────────────", "a          1", "bbbbbb    22"]


def test_where_too_many_numbers_are_for_one_line_the_first_column_names_the_rest_again() -> None:
    table = Table(*(number(f"column {at}") for at in range(5)))
    table.add_row(*(str(at) * 8 for at in range(5)))
    assert [line.split() for line in table.lines(30)[2::4]] == [
        ["00000000", "11111111", "22222222"],
        ["00000000", "33333333", "44444444"],
    ]


def test_ids_in_the_order_in_which_people_count() -> None:
    ids = ["q10", "q2", "q1", "q02", "10", "9", "b", f"q{'9' * 5000}"]
    assert sorted(ids, key=natural_key) == ["9", "10", "b", "q1", "q2", "q02", "q10", f"q{'9' * 5000}"]


# The whole tree

FOLDERS = ("attention", "curriculum", "kernels", "recipes", "scoring", "src/sparsort")
# The last is the protocol of a child process with its parent.
MAY_PRINT = {"src/sparsort/terminal/printing.py", "src/sparsort/terminal/progress.py", "scoring/answers/judges.py"}
PRINTS = ("print", "echo", "secho", "Console", "stdout.write", "stderr.write", "stdout.writelines", "stderr.writelines")


def _calls(path: Path) -> list[str]:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [ast.unparse(called) for called in calls]


def test_no_source_prints_by_another_way() -> None:
    ends = tuple(f".{way}" for way in PRINTS)
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    names = {str(path.relative_to(ROOT)): path for path in paths}
    assert len(names) > 200
    found = [
        f"{name}: {call}"
        for name, path in names.items()
        for call in _calls(path)
        if name not in MAY_PRINT and (call in PRINTS or call.endswith(ends))
    ]
    assert found == []
    # The scan sees what it looks for.
    assert "sys.stdout.write" in _calls(ROOT / "scoring/answers/judges.py")
