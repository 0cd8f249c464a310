"""Tables on a terminal: numbers and headings are whole, text gives way, and nothing is wider than the terminal if it can be.

Contract: a column is of numbers (never shortened, right-aligned), of text (one line, shortened with an ellipsis) or of prose
(whole, wrapped). Where not even the shortest form of all columns fits, the table is printed in several blocks below each other,
and each repeats the first column. Off a terminal the width is 80, or what COLUMNS says.
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
# Cells that text keeps at least, and prose at least, where the terminal is narrow.
_NARROWEST = {"text": 12, "prose": 18}
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Column:
    """A column: its heading, and what gives way where the terminal is narrow."""

    name: str
    kind: Kind


def number(name: str) -> Column:
    """A column of numbers, which are never shortened."""
    return Column(name, "number")


def text(name: str) -> Column:
    """A column of text, which is shortened."""
    return Column(name, "text")


def prose(name: str) -> Column:
    """A column of text that is needed whole, and wrapped."""
    return Column(name, "prose")


class Table:
    """Rows of cells under headings.

    Args:
        columns: first to last; the first names the rows.
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
        """The table as lines of at most `width` cells, if its numbers and headings allow."""
        natural = [
            max(cell_len(cell) for cell in (column.name, *(row[at] for row in self._rows)))
            for at, column in enumerate(self.columns)
        ]
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
        width = max(shutil.get_terminal_size((80, 24)).columns, 20)
        show("\n".join([*self.lines(width), ""]), most=None)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sorting key that puts "q2" before "q10"."""
    # Digits compare by their number without a limit on its size: the longer is the larger.
    parts = ((part, part.lstrip("0")) for part in _DIGITS.split(name))
    return tuple((0, len(short), short) if part.isdecimal() else (1, 0, part) for part, short in parts)


def _blocks(smallest: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each block; from the second on, the first column again and those that were left."""
    blocks, used = [[0]], smallest[0]
    for at in range(1, len(smallest)):
        used += _GAP + smallest[at]
        if used > width and blocks[-1] != [0]:
            blocks.append([0])
            used = smallest[0] + _GAP + smallest[at]
        blocks[-1].append(at)
    return blocks


def _sizes(smallest: Sequence[int], natural: Sequence[int], width: int) -> list[int]:
    """Widths between the smallest and the natural ones, which share what the terminal has left."""
    sizes, left = list(smallest), width - sum(smallest) - _GAP * (len(smallest) - 1)
    while left > 0 and (wanting := [at for at, size in enumerate(sizes) if size < natural[at]]):
        share = max(left // len(wanting), 1)
        for at in wanting:
            more = min(share, natural[at] - sizes[at], left)
            sizes[at] += more
            left -= more
    return sizes


def _row(cells: Sequence[str], columns: Sequence[Column], sizes: Sequence[int]) -> list[str]:
    parts = [_cell(cell, column.kind, size) for cell, column, size in zip(cells, columns, sizes, strict=True)]
    lines = []
    for at in range(max(map(len, parts))):
        shown = [part[at] if at < len(part) else "" for part in parts]
        aligned = [
            " " * (size - cell_len(cell)) + cell if column.kind == "number" else cell + " " * (size - cell_len(cell))
            for cell, column, size in zip(shown, columns, sizes, strict=True)
        ]
        lines.append((" " * _GAP).join(aligned).rstrip().replace("\xa0", " "))
    return lines


def _cell(cell: str, kind: Kind, size: int) -> list[str]:
    if cell_len(cell) <= size or kind == "number":
        return [cell]
    return _wrap(cell, size) if kind == "prose" else [set_cell_size(cell, size - 1).rstrip() + "…"]


def _wrap(cell: str, size: int) -> list[str]:
    """Lines of at most `size` cells, broken between words, and inside a word that is longer."""
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
