"""Readers: one file, table or list each, as a stream of records that can be started anywhere.

Contract: `records(start)` yields `(line, fields)` from record `start` on, as often as it is asked; `take(positions)`
yields the records at those ascending positions in one pass. `line` is 1-based, 0 where the source has no lines. A
record is held only while it is yielded; text files remember where every 1024th begins, so that a late start seeks.
Mistakes in the input (broken line, wrong encoding) are a `SparsortError` that names the file, the line and the byte.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

from sparsort.errors import SparsortError

Record = tuple[int, Mapping[str, Any]]
STRIDE = 1024  # records between two remembered positions, and rows turned into Python objects at a time
_EXCERPT = 60


class Reader(Protocol):
    """What `sources.RowSource` reads from."""

    name: str

    def total(self) -> int | None:
        """The number of records where it is known without reading them."""
        ...

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """Records from `start` on. `columns` is a hint: a reader for which that is cheaper yields only these fields."""
        ...

    def take(self, positions: Sequence[int]) -> Iterator[Record]:
        """The records at `positions`, which ascend."""
        ...


class SequenceReader:
    """Rows that are in memory or can be indexed: a list of dicts, or a dataset with a transform of its own."""

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
                raise SparsortError(
                    f"{self.name}: item {position} is {_kind(fields)}, not a dict with text keys. "
                    'Pass rows such as {"question": "…", "answer": "…"}.'
                )
            yield 0, fields


class TextReader(ABC):
    """Records in the lines of a UTF-8 file, plain or gzipped."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._stamp = self._fingerprint()
        self._marks = [(0, 0)]  # (bytes, lines) that stand before record i * STRIDE

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

    @abstractmethod
    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        """The records that `lines` hold, not yet parsed, each with the line where it begins."""

    @abstractmethod
    def parse(self, line: int, unit: Any) -> dict[str, Any]:
        """The fields of one record."""

    def _units(self, start: int) -> Iterator[tuple[int, Any]]:
        if self._fingerprint() != self._stamp:
            raise SparsortError(f"{self.name} was changed while it was being read. Run the command again.")
        mark = min(start // STRIDE, len(self._marks) - 1)
        offset, line = self._marks[mark]
        with self._open() as handle:
            handle.seek(offset)
            lines = Lines(handle, self.name, offset, line)
            for position, unit in enumerate(self.split(lines), mark * STRIDE):
                if position + 1 == len(self._marks) * STRIDE:
                    self._marks.append((lines.offset, lines.number))
                if position >= start:
                    yield unit

    def _open(self) -> IO[bytes]:
        try:
            packed = self._path.suffix.lower() == ".gz"
            return cast(IO[bytes], gzip.open(self._path, "rb") if packed else self._path.open("rb"))
        except OSError as error:
            raise SparsortError(f"cannot read {self.name}: {error.strerror or error}.") from error

    def _fingerprint(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise SparsortError(f"cannot read {self.name}: {error.strerror or error}.") from error
        return status.st_size, status.st_mtime_ns


class Lines:
    """The lines of an open file as bytes, without a byte order mark at its head, and where the next one begins."""

    def __init__(self, handle: IO[bytes], name: str, offset: int, number: int) -> None:
        self.name, self.offset, self.number = name, offset, number
        self._handle = handle

    def __iter__(self) -> Iterator[bytes]:
        try:
            for raw in self._handle:
                self.offset += len(raw)
                self.number += 1
                yield raw.removeprefix(BOM_UTF8) if self.number == 1 else raw
        except (OSError, EOFError, zlib.error) as error:
            raise SparsortError(f"{self.name} cannot be read after line {self.number}: {error}.") from error


class JsonLines(TextReader):
    """One JSON object a line; blank lines are skipped."""

    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        for raw in lines:
            if not raw.isspace():
                # Decoding waits for `parse`, so that skipped lines cost no more than finding their ends.
                yield lines.number, (raw, lines.offset - len(raw))

    def parse(self, line: int, unit: tuple[bytes, int]) -> dict[str, Any]:
        raw, begin = unit
        text = decode_line(raw, self.name, line, begin)
        fields = parse_json(text, f"{self.name}, line {line}")
        if not isinstance(fields, dict):
            raise SparsortError(
                f"{self.name}, line {line} holds {_kind(fields)}, not a JSON object "
                f'such as {{"question": "…"}}: {_excerpt(text, 0)}'
            )
        return fields


class Delimited(TextReader):
    """CSV or TSV whose first line names the columns. Every value is text, as it stands in the file."""

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter
        self._header: list[str] = []

    def split(self, lines: Lines) -> Iterator[tuple[int, Any]]:
        # The module's own limit, 128 KiB a field, is less than one long document; it is lifted for the process or not.
        csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
        at_head = lines.offset == 0
        rows = csv.reader(
            (decode_line(raw, self.name, lines.number, lines.offset - len(raw)) for raw in lines),
            delimiter=self._delimiter,
            strict=True,
        )
        while True:
            line = lines.number + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise SparsortError(f"{self.name}, line {line}: not valid delimited text ({error}).") from error
            if row is None:
                return
            if not row:
                continue
            if at_head:
                at_head, self._header = False, self._checked_header(row)
            else:
                yield line, row

    def parse(self, line: int, unit: list[str]) -> dict[str, Any]:
        if len(unit) != len(self._header):
            raise SparsortError(
                f"{self.name}, line {line} has {len(unit)} values where the header names {len(self._header)} columns "
                f"({', '.join(self._header)}). Quote values that hold the delimiter {self._delimiter!r}."
            )
        return dict(zip(self._header, unit, strict=True))

    def _checked_header(self, row: list[str]) -> list[str]:
        if twice := next((name for name in row if row.count(name) > 1), None):
            raise SparsortError(f"{self.name}: the header names the column {twice!r} twice. Rename one of them.")
        return row


def decode_line(raw: bytes, name: str, line: int, offset: int) -> str:
    """The text of line `line`, which begins `offset` bytes into the file."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(name, line, offset + error.start, raw[error.start]) from error


def json_reader(path: Path) -> Reader:
    """A `.json` file: an array of objects, which is read into memory, or JSON lines."""
    lines = JsonLines(path)
    with lines._open() as handle:
        head = handle.read(64).removeprefix(BOM_UTF8).lstrip()
        if not head.startswith(b"["):
            return lines  # many tools write JSON lines under this suffix
        handle.seek(0)
        raw = handle.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), raw.count(b"\n", 0, error.start) + 1, error.start, raw[error.start]) from error
    return SequenceReader(str(path), parse_json(text, str(path)))


def parse_json(text: str, where: str) -> Any:
    """`json.loads` with the place and an excerpt in its error. NaN and infinities are read, as Python writes them."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SparsortError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}): {_excerpt(text, error.pos)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SparsortError(f"{where}: JSON that cannot be read ({error}): {_excerpt(text, 0)}") from error


def not_utf8(name: str, line: int, offset: int, byte: int) -> SparsortError:
    """The error for a byte that is no UTF-8, `offset` bytes into the (decompressed) file."""
    return SparsortError(
        f"{name}, line {line}: byte 0x{byte:02x} at offset {offset} is not valid UTF-8. "
        f"Save the file as UTF-8, for example: iconv -f latin1 -t utf-8 {Path(name).name}"
    )


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
