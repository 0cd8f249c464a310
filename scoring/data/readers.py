"""Readers of one file, table or list: a stream of records that can start at any position.

Contract: `records(start)` yields `(line, fields)` from record `start`, and can be called any number of times. `take(positions)`
yields the records at ascending positions in one pass. `line` counts from 1, and is 0 if the source has no lines. Only the
current record is in memory. Text files remember where every 1024th record begins, so that a late start can seek, and can pass
these positions on to another process (`snapshot`). A mistake in the input (broken line, wrong encoding) is a `SparsortError`
that names the file, the line and the byte.

CSV and TSV: the first record names the columns, unless the caller does. A `.csv` file is separated by commas. If its first
record has no comma, the file is read with semicolons or tabs, provided that all of its first records then have the same number
of cells, at least two. If that does not decide, the file is refused. Every value is text, exactly as in the file.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from sparsort.errors import SparsortError
from sparsort.scoring.data.encodings import READ_ERRORS, nul_bytes, open_utf8, shell_command, skip, wrong_encoding

Record = tuple[int, Mapping[str, Any]]
STRIDE = 1024  # records between two remembered positions, and rows converted to Python objects at a time
_EXCERPT = 60  # characters of a broken line that an error shows
_SNIFFED_RECORDS = 20  # records that the choice of the delimiter is based on
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Reader(Protocol):
    """The records of one source, for `rows.RowSource`."""

    name: str

    def total(self) -> int | None:
        """The number of records; None if it is not known without reading them."""
        ...

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """Yield the records from `start`. `columns` is a hint: a reader may yield only these fields if that is cheaper."""
        ...

    def take(self, positions: Sequence[int]) -> Iterator[Record]:
        """Yield the records at `positions`, which must be ascending."""
        ...


class SequenceReader:
    """Rows that can be indexed: a list of dicts, or a dataset with a custom transform."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name = name
        self._rows = rows

    def total(self) -> int:
        return len(self._rows)

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        return self.take(range(start, len(self._rows)))

    def take(self, positions: Sequence[int]) -> Iterator[Record]:
        for position in positions:
            fields = self._rows[position]
            if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
                raise not_a_row(self.name, position, fields)
            yield 0, fields


def not_a_row(name: str, position: int, item: Any) -> SparsortError:
    """The error for an item of the source `name` that is not a row."""
    return SparsortError(
        f"{name}: item {position} is {_kind(item)}, not a dict with text keys. "
        'Pass rows such as {"question": "…", "answer": "…"}.'
    )


class TextReader(ABC):
    """The records of a text file, plain or gzipped; see `encodings` for its encodings."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._stamp = self._fingerprint()
        self._marks = [(0, 0)]  # (bytes, lines) before record i * STRIDE

    def total(self) -> None:
        return None

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        for line, unit in self._units(start):
            yield line, self.parse(line, unit)

    def take(self, positions: Sequence[int]) -> Iterator[Record]:
        wanted = iter(positions)
        target = next(wanted, None)
        if target is None:
            return
        for position, (line, unit) in enumerate(self._units(target), target):
            if position == target:
                yield line, self.parse(line, unit)
                target = next(wanted, None)
                if target is None:
                    return

    def snapshot(self) -> dict[str, Any]:
        """What identifies the file and its layout, and the remembered positions, as JSON values."""
        return {"file": self._identity(), "marks": [list(mark) for mark in self._marks]}

    def restore(self, snapshot: Mapping[str, Any]) -> bool:
        """Take over the positions that another process remembered; False if the file has changed since."""
        if snapshot["file"] != self._identity():
            return False
        self._marks = [(offset, line) for offset, line in snapshot["marks"]]
        return True

    def layout(self) -> list[Any]:
        """The settings that decide how the file is split into records, as JSON values."""
        return []

    def _identity(self) -> list[Any]:
        # Files that were unpacked from one archive may have the same size and time, so the path counts too.
        return [os.path.realpath(self._path), *self._stamp, *self.layout()]

    @abstractmethod
    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        """Yield the unparsed records in `lines`, each with the line where it begins."""

    @abstractmethod
    def parse(self, line: int, unit: Any) -> dict[str, Any]:
        """The fields of one record."""

    def _units(self, start: int) -> Iterator[tuple[int, Any]]:
        # The remembered offsets hold only for the file that they were found in.
        if self._fingerprint() != self._stamp:
            raise SparsortError(f"{self.name} was changed while it was being read. Run the command again.")
        mark = min(start // STRIDE, len(self._marks) - 1)
        offset, line = self._marks[mark]
        with self.opened() as handle:
            lines = Lines(handle, self.name, offset, line)
            lines.skip()
            for position, unit in enumerate(self.split(lines), mark * STRIDE):
                # The generator has just read the record before the next mark, so the next record begins at this offset.
                if position + 1 == len(self._marks) * STRIDE:
                    self._marks.append((lines.offset, lines.number))
                if position >= start:
                    yield unit

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the file as UTF-8 bytes, or raise a `SparsortError`."""
        try:
            handle = open_utf8(self._path)
        except READ_ERRORS as error:
            raise SparsortError(f"{self.name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        with handle:
            yield handle

    def read(self) -> bytes:
        """Read the whole file as UTF-8, or raise a `SparsortError`."""
        with self.opened() as handle:
            return b"".join(Lines(handle, self.name, 0, 0))

    def _fingerprint(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise SparsortError(f"{self.name} cannot be read: {error.strerror or error}.") from error
        return status.st_size, status.st_mtime_ns


class Lines:
    """The lines of an open file as bytes, without a byte order mark at the start of the file.

    Attributes:
        offset: bytes before the next line.
        number: lines before the next line.
    """

    def __init__(self, handle: IO[bytes], name: str, offset: int, number: int) -> None:
        self.offset, self.number = offset, number
        self._handle, self._name = handle, name

    def __iter__(self) -> Iterator[bytes]:
        try:
            for raw in self._handle:
                self.offset += len(raw)
                self.number += 1
                yield raw.removeprefix(BOM_UTF8) if self.number == 1 else raw
        except READ_ERRORS as error:
            raise _unreadable(self._name, self.number + 1, error) from error

    def skip(self) -> None:
        """Move a newly opened file to `offset`."""
        try:
            skip(self._handle, self.offset)
        except READ_ERRORS as error:
            raise SparsortError(f"{self._name} cannot be read up to line {self.number}: {error}.") from error


class JsonLines(TextReader):
    """One JSON object per line; blank lines are skipped."""

    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        for raw in lines:
            if not raw.isspace():
                # `parse` decodes, so that skipping a line costs no more than finding its end.
                yield lines.number, (raw, lines.offset - len(raw))

    def parse(self, line: int, unit: tuple[bytes, int]) -> dict[str, Any]:
        raw, begin = unit
        text = decode_line(raw, self.name, line, begin)
        try:
            fields = parse_json(text, f"{self.name}, line {line}")
        except SparsortError as error:
            if is_unfinished(text):
                raise SparsortError(f"{error} {self._over_several_lines(text)}") from error
            raise
        if not isinstance(fields, dict):
            hint = f" {_ARRAY_FILE}" if isinstance(fields, list) else ""
            raise SparsortError(
                f"{self.name}, line {line} contains {_kind(fields)}, not a JSON object "
                f'such as {{"question": "…"}}: {_excerpt(text, 0)}{hint}'
            )
        return fields

    def _over_several_lines(self, text: str) -> str:
        if text.lstrip().startswith("["):
            return _ARRAY_FILE
        return (
            "The line ends in the middle of an object: the file is cut off here, or its objects are spread over several lines. "
            f"In the second case write each on one line: {shell_command(self._path, 'jq -c .', '-lines.jsonl')}"
        )


_ARRAY_FILE = "For a file that contains one array, use the suffix .json."


class Delimited(TextReader):
    """CSV or TSV.

    Args:
        path: the file.
        delimiter: the separator of the cells; None to detect it from the first records.
        columns: the names of the columns of a file without a header; None if its first record names them.

    Raises:
        SparsortError: the delimiter cannot be detected.
    """

    def __init__(self, path: Path, delimiter: str | None, columns: Sequence[str] | None = None) -> None:
        super().__init__(path)
        self._columns = list(columns) if columns is not None else None
        self._header = self._columns or []
        self._delimiter = delimiter or self._detect_delimiter()

    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        is_first = lines.offset == 0
        for line, row in self._rows(lines, self._delimiter):
            if is_first and self._columns is None:
                self._header = self._checked_header(row)
            elif is_first and row == self._columns:
                raise SparsortError(
                    f"{self.name}: its first line is the header {', '.join(row)}. Do not pass columns (--columns)."
                )
            else:
                yield line, row
            is_first = False

    def parse(self, line: int, unit: list[str]) -> dict[str, Any]:
        if len(unit) != len(self._header):
            names = f"({', '.join(self._header)})"
            source = "the header names" if self._columns is None else "columns (--columns) names"
            raise SparsortError(
                f"{self.name}, line {line} has {len(unit)} values where {source} {len(self._header)} columns {names}. "
                f"Quote values that contain the delimiter {self._delimiter!r}."
            )
        return dict(zip(self._header, unit, strict=True))

    def layout(self) -> list[Any]:
        return [self._delimiter, self._columns]

    def _rows(self, lines: Lines, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the records that are not blank, each with the line where it begins."""
        # The default limit of 128 KiB per field is less than one long document, and it can be set only for the process.
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

    def _detect_delimiter(self) -> str:
        widths = {mark: len(next(iter(self._sniff(mark, 1)), [])) for mark in _DELIMITER_NAMES}
        # The number of names that the caller gave decides if only one delimiter gives as many cells.
        if self._columns is not None and list(widths.values()).count(len(self._columns)) == 1:
            return next(mark for mark, width in widths.items() if width == len(self._columns))
        rivals = [mark for mark in (";", "\t") if widths[mark] > 1]
        if widths[","] > 1 or not rivals:
            return ","
        fitting = [mark for mark in rivals if self._is_even(mark)]
        if len(fitting) == 1:
            return fitting[0]
        if not fitting and widths[","] and self._is_even(","):
            return ","  # a single column whose name contains a semicolon or a tab
        raise SparsortError(
            f"{self.name}: its first line has no commas, and its first lines do not show whether "
            f"{' or '.join(_DELIMITER_NAMES[mark] for mark in rivals)} separate its cells. Save it with commas, or with tabs "
            "under the suffix .tsv."
        )

    def _is_even(self, delimiter: str) -> bool:
        """Whether the first records all have the same number of cells."""
        return len({len(row) for row in self._sniff(delimiter, _SNIFFED_RECORDS)}) == 1

    def _sniff(self, delimiter: str, count: int) -> list[list[str]]:
        """The first `count` records if split by `delimiter`, up to the first that is not valid."""
        rows: list[list[str]] = []
        with self.opened() as handle:
            lines = Lines(handle, self.name, 0, 0)
            # An invalid record is reported with its line when the rows are read.
            with contextlib.suppress(SparsortError):
                rows.extend(row for _, row in itertools.islice(self._rows(lines, delimiter), count))
        return rows

    def _checked_header(self, row: list[str]) -> list[str]:
        if duplicate := next((name for name in row if row.count(name) > 1), None):
            raise SparsortError(
                f"{self.name}: the header names the column {duplicate!r} twice. Rename one of them; if the first line is not a "
                "header, name the columns with columns (--columns a,b,c)."
            )
        return row


def decode_line(raw: bytes, name: str, line: int, offset: int) -> str:
    """Decode line `line`, which begins `offset` bytes into the file; a `SparsortError` if it is not UTF-8 or contains NULs."""
    if b"\0" in raw:
        raise nul_bytes(name, line, raw, offset)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise wrong_encoding(name, line, offset + error.start, raw[error.start]) from error


def _unreadable(name: str, line: int, error: Exception) -> SparsortError:
    """The error for a file that ends too early or cannot be read in line `line`."""
    if isinstance(error, UnicodeDecodeError):
        encoding = error.encoding.upper()
        return SparsortError(
            f"{name}, line {line} is not valid {encoding} ({error.reason}), the encoding that the file's byte order mark names. "
            "The file is damaged or cut off: restore it, or save it again as UTF-8."
        )
    return SparsortError(f"{name}, line {line} cannot be read ({error}). Restore the file if it is damaged or cut off.")


def parse_json(text: str, where: str) -> Any:
    """Call `json.loads`, and report errors with the place and an excerpt. NaN and Infinity are accepted."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise SparsortError(
            f"{where}: not valid JSON ({error.msg} at {line}column {error.colno}): {_excerpt(text, error.pos)}"
        ) from error
    except (ValueError, RecursionError) as error:
        # Numbers with too many digits, and arrays that are nested too deeply.
        raise SparsortError(f"{where}: JSON that cannot be read ({error}): {_excerpt(text, 0)}") from error


def is_unfinished(text: str) -> bool:
    """Whether `text` is the beginning of a longer JSON value, such as the first line of an object on several lines."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _excerpt(text: str, position: int) -> str:
    begin = max(0, position - _EXCERPT // 2)
    piece = text[begin : begin + _EXCERPT].strip()
    return f"{'…' if begin else ''}{piece}{'…' if begin + _EXCERPT < len(text.rstrip()) else ''}"


def _kind(value: object) -> str:
    names = {
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
