"""Tables on a terminal: numbers and headings are never shortened, and text is shortened to fit the width where possible.

Contract: a column contains numbers (never shortened, right-aligned), text (one line, shortened with an ellipsis) or prose (never
shortened, wrapped). If even the narrowest form of all columns is too wide, the table is printed as several blocks below each
other, and each block repeats the first column. Without a terminal the width is 80, or the value of COLUMNS.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len, set_cell_size

from sparsort.terminal.printing import MOST, one_line, show

Kind = Literal["number", "text", "prose"]
_GAP = 2
# The narrowest width of a text column and of a prose column, in terminal cells.
_NARROWEST = {"text": 12, "prose": 18}
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Column:
    """A column: its heading, and its kind, which decides how it fits a narrow terminal."""

    name: str
    kind: Kind


def number(name: str) -> Column:
    """A column of numbers, which are never shortened."""
    return Column(name, "number")


def text(name: str) -> Column:
    """A column of text, which may be shortened."""
    return Column(name, "text")


def prose(name: str) -> Column:
    """A column of text that is wrapped instead of shortened."""
    return Column(name, "prose")


class Table:
    """Rows of cells under headings.

    Args:
        columns: the columns from left to right; the first one names the rows.
        title: a line above the table.
    """

    def __init__(self, *columns: Column, title: str = "") -> None:
        self.columns, self.title = columns, title
        self._rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row with one cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self._rows.append([one_line(cell, MOST) for cell in cells])

    def lines(self, width: int) -> list[str]:
        """The table as lines of at most `width` terminal cells, unless its numbers and headings need more."""
        natural = [
            max(cell_len(cell) for cell in (column.name, *(row[at] for row in self._rows)))
            for at, column in enumerate(self.columns)
        ]
        # The heading of a column is never shortened.
        smallest = [
            max(cell_len(column.name), min(size, _NARROWEST.get(column.kind, size)))
            for column, size in zip(self.columns, natural, strict=True)
        ]
        lines = _wrap(one_line(self.title, MOST), width) if self.title else []
        for block in _blocks(smallest, width):
            if lines:
                lines.append("")
            sizes = _sizes([smallest[at] for at in block], [natural[at] for at in block], width)
            headings = [self.columns[at].name for at in block]
            columns = [self.columns[at] for at in block]
            lines += _row(headings, columns, sizes)
            lines.append("─" * (sum(sizes) + _GAP * (len(sizes) - 1)))
            for row in self._rows:
                lines += _row([row[at] for at in block], columns, sizes)
        return lines

    def show(self) -> None:
        """Print the table to stdout, with an empty line after it."""
        show("\n".join([*self.lines(terminal_width()), ""]), most=None)


def terminal_width() -> int:
    """The width of the terminal, in cells; without one it is 80, or the value of COLUMNS."""
    return max(shutil.get_terminal_size((80, 24)).columns, 20)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sorting key that puts "q2" before "q10"."""
    # Numbers without leading zeros compare by their length, then digit by digit. That needs no conversion to int, whose number
    # of digits Python limits.
    parts = ((part, part.lstrip("0")) for part in _DIGITS.split(name))
    return tuple((0, len(short), short) if part.isdecimal() else (1, 0, part) for part, short in parts)


def _blocks(smallest: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each block; every block after the first one repeats column 0."""
    blocks, used = [[0]], smallest[0]
    for at in range(1, len(smallest)):
        used += _GAP + smallest[at]
        # A block has at least one column besides the first, even if that is too wide.
        if used > width and blocks[-1] != [0]:
            blocks.append([0])
            used = smallest[0] + _GAP + smallest[at]
        blocks[-1].append(at)
    return blocks


def _sizes(smallest: Sequence[int], natural: Sequence[int], width: int) -> list[int]:
    """Column widths between the smallest and the natural ones; columns that need more share the remaining width evenly."""
    sizes, remaining = list(smallest), width - sum(smallest) - _GAP * (len(smallest) - 1)
    while remaining > 0 and (wanting := [at for at, size in enumerate(sizes) if size < natural[at]]):
        share = max(remaining // len(wanting), 1)
        for at in wanting:
            more = min(share, natural[at] - sizes[at], remaining)
            sizes[at] += more
            remaining -= more
    return sizes


def _row(cells: Sequence[str], columns: Sequence[Column], sizes: Sequence[int]) -> list[str]:
    parts = [_cell(cell, column.kind, size) for cell, column, size in zip(cells, columns, sizes, strict=True)]
    # Wrapped cells have several lines; cells with fewer lines are filled with empty ones.
    lines = []
    for at in range(max(map(len, parts))):
        line = [part[at] if at < len(part) else "" for part in parts]
        aligned = [
            " " * (size - cell_len(cell)) + cell if column.kind == "number" else cell + " " * (size - cell_len(cell))
            for cell, column, size in zip(line, columns, sizes, strict=True)
        ]
        # Non-breaking spaces kept words together while cells were wrapped; the terminal gets normal ones.
        lines.append((" " * _GAP).join(aligned).rstrip().replace("\xa0", " "))
    return lines


def _cell(cell: str, kind: Kind, size: int) -> list[str]:
    if cell_len(cell) <= size or kind == "number":
        return [cell]
    return _wrap(cell, size) if kind == "prose" else [set_cell_size(cell, size - 1).rstrip() + "…"]


def _wrap(cell: str, size: int) -> list[str]:
    """Break a text into lines of at most `size` cells, between words, or inside a word that is longer than a line."""
    lines = [""]
    for word in cell.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= size:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and cell_len(lines[-1]) + cell_len(character) > size:
                lines.append("")
            lines[-1] += character
    return lines
