"""Reader of CSV and TSV files; see `readers.Reader` for what it promises.

Contract: the first record names the columns, unless the caller does. A `.csv` file is separated by commas; one whose first
record has no comma is read with semicolons or tabs if every one of its first records then has the same number of cells, at
least two. Where that does not decide, the file is refused. Every value is text, exactly as in the file.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsort.errors import SparsortError
from sparsort.scoring.data.readers import Lines, TextReader, decode_line

_SAMPLE = 20  # records that the choice of the delimiter looks at
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Delimited(TextReader):
    """CSV or TSV.

    Args:
        path: the file.
        delimiter: what separates the cells; None to tell it from the first records.
        columns: the names of the columns of a file without a header; None if its first record names them.

    Raises:
        SparsortError: the delimiter cannot be told.
    """

    def __init__(self, path: Path, delimiter: str | None, columns: Sequence[str] | None = None) -> None:
        super().__init__(path)
        self._given = list(columns) if columns is not None else None
        self._header = self._given or []
        self._delimiter = delimiter or self._sniff()

    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        at_head = lines.offset == 0
        for line, row in self._rows(lines, self._delimiter):
            if at_head and self._given is None:
                self._header = self._checked_header(row)
            elif at_head and row == self._given:
                raise SparsortError(
                    f"{self.name}: its first line is the header {', '.join(row)}. Leave out columns (--columns)."
                )
            else:
                yield line, row
            at_head = False

    def parse(self, line: int, unit: list[str]) -> dict[str, Any]:
        if len(unit) != len(self._header):
            names = f"({', '.join(self._header)})"
            whose = "the header names" if self._given is None else "columns (--columns) names"
            raise SparsortError(
                f"{self.name}, line {line} has {len(unit)} values where {whose} {len(self._header)} columns {names}. "
                f"Quote values that hold the delimiter {self._delimiter!r}."
            )
        return dict(zip(self._header, unit, strict=True))

    def _rows(self, lines: Lines, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Records that are not blank, each with the line where it begins."""
        # The module's own limit, 128 KiB a field, is less than one long document; it is lifted for the process or not.
        csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
        rows = csv.reader(self._texts(lines), delimiter=delimiter, strict=True)
        while True:
            line = lines.number + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise SparsortError(f"{self.name}, line {line}: not valid delimited text ({error}).") from error
            if row is None:
                return
            if row:
                yield line, row

    def _texts(self, lines: Lines) -> Iterator[str]:
        for raw in lines:
            yield decode_line(raw, self.name, lines.number, lines.offset - len(raw))

    def _sniff(self) -> str:
        widths = {mark: len(next(iter(self._sample(mark, 1)), [])) for mark in _NAMES}
        if self._given is not None and list(widths.values()).count(len(self._given)) == 1:
            return next(mark for mark, width in widths.items() if width == len(self._given))
        rivals = [mark for mark in (";", "\t") if widths[mark] > 1]
        if widths[","] > 1 or not rivals:
            return ","
        fitting = [mark for mark in rivals if self._is_even(mark)]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting and widths[","] and self._is_even(","):
            return ","  # one column, with such a mark in its name
        raise SparsortError(
            f"{self.name}: its first line has no commas, and whether {' or '.join(_NAMES[mark] for mark in rivals)} separate "
            "its cells cannot be told from its first lines. Save it with commas, or with tabs under the suffix .tsv."
        )

    def _is_even(self, delimiter: str) -> bool:
        """Whether the first records all have the same number of cells."""
        return len({len(row) for row in self._sample(delimiter, _SAMPLE)}) == 1

    def _sample(self, delimiter: str, count: int) -> list[list[str]]:
        """The first records, read with a delimiter; those before the first that is not valid with it."""
        rows: list[list[str]] = []
        with self.opened() as handle:
            lines = Lines(handle, self.name, 0, 0)
            try:
                rows.extend(row for _, row in itertools.islice(self._rows(lines, delimiter), count))
            except SparsortError:
                return rows  # the same error is raised, with its line, when the rows are read
        return rows

    def _checked_header(self, row: list[str]) -> list[str]:
        if twice := next((name for name in row if row.count(name) > 1), None):
            raise SparsortError(
                f"{self.name}: the header names the column {twice!r} twice. Rename one of them; if the first line is no header, "
                "name the columns with columns (--columns a,b,c)."
            )
        return row
