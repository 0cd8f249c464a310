"""Readers: one file, table or list each, as a stream of records that can be started anywhere.

Contract: `records(start)` yields `(line, fields)` from record `start` on, as often as it is asked; `take(positions)`
yields the records at those ascending positions in one pass. `line` is 1-based, 0 where the source has no lines. A
record is held only while it is yielded; text files remember where every 1024th begins, so that a late start seeks.
Mistakes in the input (broken line, wrong encoding) are a `SparsortError` that names the file, the line and the byte.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from sparsort.errors import SparsortError
from sparsort.scoring.data.encodings import READ_ERRORS, nul_bytes, open_utf8, shell_command, skip, wrong_encoding

Record = tuple[int, Mapping[str, Any]]
STRIDE = 1024  # records between two remembered positions, and rows turned into Python objects at a time
_EXCERPT = 60


class Reader(Protocol):
    """What `rows.RowSource` reads from."""

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
    """Records in the lines of a text file, plain or gzipped; see `encodings` for what it may be encoded in."""

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
        with self.opened() as handle:
            lines = Lines(handle, self.name, offset, line)
            lines.skip()
            for position, unit in enumerate(self.split(lines), mark * STRIDE):
                if position + 1 == len(self._marks) * STRIDE:
                    self._marks.append((lines.offset, lines.number))
                if position >= start:
                    yield unit

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The file as UTF-8 bytes, from its beginning.

        Raises:
            SparsortError: it cannot be opened.
        """
        try:
            handle = open_utf8(self._path)
        except READ_ERRORS as error:
            raise SparsortError(f"{self.name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        with handle:
            yield handle

    def read(self) -> bytes:
        """The whole file as UTF-8.

        Raises:
            SparsortError: it cannot be read.
        """
        with self.opened() as handle:
            return b"".join(Lines(handle, self.name, 0, 0))

    def _fingerprint(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise SparsortError(f"{self.name} cannot be read: {error.strerror or error}.") from error
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
        except READ_ERRORS as error:
            raise _unreadable(self.name, self.number + 1, error) from error

    def skip(self) -> None:
        """Move the file, which is at its beginning, to `offset`."""
        try:
            skip(self._handle, self.offset)
        except READ_ERRORS as error:
            raise SparsortError(f"{self.name} cannot be read up to line {self.number}: {error}.") from error


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
        try:
            fields = parse_json(text, f"{self.name}, line {line}")
        except SparsortError as error:
            if is_unfinished(text):
                raise SparsortError(f"{error} {self._over_several_lines(text)}") from error
            raise
        if not isinstance(fields, dict):
            way_out = " A file that holds one array has the suffix .json." if isinstance(fields, list) else ""
            raise SparsortError(
                f"{self.name}, line {line} holds {_kind(fields)}, not a JSON object "
                f'such as {{"question": "…"}}: {_excerpt(text, 0)}{way_out}'
            )
        return fields

    def _over_several_lines(self, text: str) -> str:
        if text.lstrip().startswith("["):
            return "A file that holds one array has the suffix .json."
        return (
            "The line ends before its object does: the file is cut off here, or its objects are spread over several lines. "
            f"In the second case write each on one line: {shell_command(self._path, 'jq -c .', '-lines.jsonl')}"
        )


def decode_line(raw: bytes, name: str, line: int, offset: int) -> str:
    """The text of line `line`, which begins `offset` bytes into the file.

    Raises:
        SparsortError: it is not UTF-8, or holds NUL bytes.
    """
    if b"\0" in raw:
        raise nul_bytes(name, line, raw, offset)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise wrong_encoding(name, line, offset + error.start, raw[error.start]) from error


def _unreadable(name: str, line: int, error: Exception) -> SparsortError:
    """The error for a file that breaks off or fails in line `line`."""
    if isinstance(error, UnicodeDecodeError):
        encoding = error.encoding.upper()
        return SparsortError(
            f"{name}, line {line} is not valid {encoding} ({error.reason}), the encoding that the file's byte order mark names. "
            "The file is damaged or cut off: restore it, or save it again as UTF-8."
        )
    return SparsortError(f"{name}, line {line} cannot be read ({error}). Restore the file if it is damaged or cut off.")


def parse_json(text: str, where: str) -> Any:
    """`json.loads` with the place and an excerpt in its error. NaN and infinities are read, as Python writes them."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise SparsortError(
            f"{where}: not valid JSON ({error.msg} at {line}column {error.colno}): {_excerpt(text, error.pos)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SparsortError(f"{where}: JSON that cannot be read ({error}): {_excerpt(text, 0)}") from error


def is_unfinished(text: str) -> bool:
    """Whether JSON breaks off at the end of `text`, as the first line of an object that is spread over several lines does."""
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
