"""Rows to score, from a file, a dataset or a list: streamed, identified, and checked before any model runs.

Contract: a `RowSource` can be read any number of times and from any position, always yields the same `Row`s, and holds
one batch of them in memory. The first use makes one cheap pass that counts the rows and finds broken lines and duplicate
ids. A mistake in row 900,001 is therefore reported at the start, and not after hours of scoring. The pass takes about 3 s
for a million short rows of JSONL and, with ids, 24 bytes of memory per row. In columnar files it reads only the id column.
"""

from __future__ import annotations

import difflib
import itertools
import os
import sys
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from sparsort.errors import SparsortError, did_you_mean
from sparsort.paths import spell
from sparsort.scoring.data.columnar import arrow_reader, dataset_reader, folder_reader, parquet_reader, table_reader
from sparsort.scoring.data.digests import digest_of, sample_by_digest
from sparsort.scoring.data.inputs import is_table, readable
from sparsort.scoring.data.json_files import json_reader
from sparsort.scoring.data.readers import Delimited, JsonLines, Reader, SequenceReader, TextReader, not_a_row
from sparsort.values import as_text, has_text, is_missing, kind_of, missing_field, missing_name

# Suffix → delimiter of the cells; None if it is detected from the first records of the file.
_DELIMITERS: Mapping[str, str | None] = {".csv": None, ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Row:
    """One example: `position` counts from 0, `id` is unique within the source, and `digest` is the hash of the content."""

    position: int
    id: str
    fields: Mapping[str, Any]
    digest: str

    @property
    def name(self) -> str:
        """The row in error messages, such as "row 7 (id 'q7')"."""
        return f"row {self.position} (id {self.id!r})"


class RowCheck(Hashable, Protocol):
    """A consumer of rows that can check beforehand whether it can read them, such as `prompts.Prompt`."""

    @property
    def paths(self) -> set[str]:
        """The fields that are paths into a column. It is a mistake if one of them has no value in any row."""
        ...

    @property
    def is_uniform(self) -> bool:
        """Whether checking one row is enough in a table, where each column has one type."""
        ...

    def check(self, fields: Mapping[str, Any], *, where: str) -> set[str]:
        """Return the fields that are missing in a row, or raise an error if a value cannot be read."""
        ...


class RowSource:
    """Rows that can be read repeatedly, from any position.

    Args:
        reader: the reader of the records.
        id_column: the field that contains the id of a row. None: the field "id" if the first row has it, otherwise the
            position of the row is its id.
        content: the fields that the digest of a row covers, such as those that a prompt reads; None for all.
    """

    def __init__(self, reader: Reader, id_column: str | None = None, content: Sequence[str] | None = None) -> None:
        self.content = tuple(sorted(content)) if content is not None else None
        self._reader = reader
        self._count: int | None = None
        self._required: set[Hashable] = set()
        self._id_column = id_column
        self._explicit = id_column is not None

    @property
    def name(self) -> str:
        """The source in messages and in provenance."""
        return self._reader.name

    @property
    def id_column(self) -> str | None:
        """The field that contains the ids; None if the id of a row is its position."""
        self.count()
        return self._id_column

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Stream the rows from position `start`."""
        self.count()
        for position, (line, fields) in enumerate(self._reader.records(start), start):
            yield self._row(position, line, fields)

    def take(self, positions: Sequence[int]) -> list[Row]:
        """The rows at `positions`, which must be ascending."""
        self.count()
        records = zip(positions, self._reader.take(positions), strict=True)
        return [self._row(position, line, fields) for position, (line, fields) in records]

    def count(self) -> int:
        """The number of rows. The first call checks the whole source, and raises a `SparsortError` for a broken row or id."""
        if self._count is None:
            self._count = self._check()
        return self._count

    def snapshot(self) -> dict[str, Any]:
        """What a pass over the source has found, as JSON values for `restore` in another process."""
        reader = self._reader.snapshot() if isinstance(self._reader, TextReader) else None
        id_column = {"name": self.id_column, "is_given": self._explicit}
        return {"rows": self.count(), "id_column": id_column, "reader": reader}

    @property
    def can_restore(self) -> bool:
        """Whether another process can take over what this one has found, because the source is a text file."""
        return isinstance(self._reader, TextReader)

    def restore(self, snapshot: Mapping[str, Any] | None, reader: RowCheck | None = None) -> bool:
        """Take over what another process has found, so that this one need not read the whole source.

        Args:
            snapshot: the result of `snapshot`; None for none.
            reader: a consumer of the rows that the other process has passed to `require`.

        Returns:
            Whether the source is a file that is the same as then. If not, nothing was taken over.
        """
        if snapshot is None or not isinstance(self._reader, TextReader) or snapshot.get("reader") is None:
            return False
        # Another version may have written other values.
        id_column = snapshot.get("id_column", {"is_given": None})
        # Without an id column in the call, the first record decides which one it is, as it did in the other process.
        is_same = id_column["is_given"] == self._explicit and (
            not self._explicit or id_column["name"] == self._id_column
        )
        if not is_same or not self._reader.restore(snapshot["reader"]):
            return False
        # Reading the first record makes a delimited file know its header.
        next(self._reader.records(), None)
        self._id_column, self._count = id_column["name"], snapshot["rows"]
        self._required |= {reader, *getattr(reader, "fields", ())} - {None}
        return True

    def columns(self) -> list[str]:
        """The fields of the first row."""
        return [str(name) for name in next(self._reader.records())[1]] if self.count() else []

    def require(self, fields: Sequence[str], reader: RowCheck | None = None) -> None:
        """Check that every row can be read, so that the last row cannot stop a run after hours.

        Args:
            fields: the columns that every row must have.
            reader: the consumer of the values, such as a prompt.

        Raises:
            SparsortError: a column is missing (the message names the row, the nearest column, and all columns); `reader`
                cannot read a value; or a path of `reader` has no value in any row.
        """
        if {*fields, reader} - {None} <= self._required:
            return
        # In a table all rows have the same columns, each of one type, so one row shows all. In a list or a text file each
        # row may lack a column of its own, so all are read.
        one_is_enough = not isinstance(self._reader, (SequenceReader, TextReader)) and (
            reader is None or reader.is_uniform
        )
        missing: set[str] | None = None
        for position, (line, record) in enumerate(self._reader.records(columns=fields)):
            where = f"{self.name}: {_place(position, line)}"
            for name in fields:
                if name not in record:
                    raise self._without_column(name, record, where, in_template=reader is not None)
            missing_here = set() if reader is None else reader.check(record, where=where)
            missing = missing_here if missing is None else missing & missing_here
            if one_is_enough and not missing:
                break
        if reader is not None and (without_value := sorted((missing or set()) & reader.paths)):
            raise SparsortError(
                f"{self.name}: the field {without_value[0]!r} has no value in any row. Check the path: it must be a column "
                "followed by keys and indices, such as meta.lang or messages[0].content."
            )
        self._required |= {*fields, reader} - {None}

    def check(self, read: Callable[[Mapping[str, Any], str], object], positions: Iterable[int] | None = None) -> None:
        """Call `read` for rows, with the file, the row and the line for its error messages.

        Args:
            read: takes the fields of a row, and the name of the row in error messages.
            positions: the rows to read; None for all.

        Raises:
            SparsortError: raised by `read`.
        """
        places = range(self.count()) if positions is None else sorted(set(positions))
        for position, (line, record) in zip(places, self._reader.take(places), strict=True):
            read(record, f"{self.name}: {_place(position, line)}")

    def sample(self, n: int) -> list[Row]:
        """Sample `n` rows of different content by `sample_by_digest`, in one pass over the whole source."""
        return sample_by_digest(((row.digest, row) for row in self.rows()), n)

    def _without_column(self, name: str, record: Mapping[str, Any], where: str, *, in_template: bool) -> SparsortError:
        error = missing_field(spell([name]), record, where, in_template=in_template)
        if not isinstance(self._reader, Delimited):
            return error
        return SparsortError(f"{error} If the first line is not a header, pass columns (--columns a,b,c).")

    def _check(self) -> int:
        first = next(self._reader.records(), None)
        if first is None:
            raise SparsortError(f"{self.name} has no rows. Pass a file with at least one example.")
        if self._id_column is None and "id" in first[1]:
            self._id_column = "id"
        total = self._reader.total()
        if total is None or self._id_column is not None:
            total = self._check_ids()
        return total

    def _check_ids(self) -> int:
        """Count the rows, and refuse duplicate ids."""
        # Keeping 8 bytes per id is enough to find candidates, because equal ids have equal hashes. The few rows that
        # share a hash are read again and compared by their ids.
        hashes = array("q")
        total = 0
        column = self._id_column
        for position, (line, fields) in enumerate(self._reader.records(columns=[column] if column else None)):
            if column:
                hashes.append(hash(self._identity(position, line, fields)))
            total = position + 1
        hash_of_row = np.asarray(hashes)
        order = np.argsort(hash_of_row, kind="stable")
        ordered = hash_of_row[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        # The duplicate that comes first in the file is reported.
        for index in repeated[np.argsort(order[repeated + 1])]:
            pair = [int(order[index]), int(order[index + 1])]
            (line, fields), (other_line, other) = self._reader.take(pair)
            name = self._identity(pair[0], line, fields)
            if name == self._identity(pair[1], other_line, other):
                raise SparsortError(
                    f"{self.name}: the id {name!r} occurs twice, "
                    f"at {_place(pair[0], line)} and {_place(pair[1], other_line)}. "
                    f"Make the field {column!r} unique, or name another one with id_column (--id-column)."
                )
        return total

    def _row(self, position: int, line: int, fields: Mapping[str, Any]) -> Row:
        return Row(position, self._identity(position, line, fields), fields, digest_of(fields, self.content))

    def _identity(self, position: int, line: int, fields: Mapping[str, Any]) -> str:
        if self._id_column is None:
            return str(position)
        value = fields.get(self._id_column)
        if is_missing(value) or not has_text(value):
            raise self._bad_identity(position, line, fields)
        name = as_text(value, field=spell([self._id_column]), where=self.name)
        # JSON can contain half of a surrogate pair, which cannot be encoded as UTF-8.
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise SparsortError(f"{self.name}, {_place(position, line)}: the id {name!r} is not valid text.")
        return name

    def _bad_identity(self, position: int, line: int, fields: Mapping[str, Any]) -> SparsortError:
        column, where = self._id_column or "", f"{self.name}, {_place(position, line)}"
        if column in fields:
            value = fields[column]
            problem = (
                f"is {missing_name(value)}"
                if is_missing(value)
                else f"contains {kind_of(value)}, not a text or a number"
            )
            return SparsortError(
                f"{where}: the id field {column!r} {problem}. Name another with id_column (--id-column)."
            )
        reason = "" if self._explicit else " (the first row has one, so it is taken for the id)"
        hint = did_you_mean(column, fields)
        return SparsortError(
            f"{where}: there is no field {column!r}{reason}.{hint} The fields are: {', '.join(fields)}."
        )


def open_rows(
    source: Any,
    *,
    id_column: str | None = None,
    content: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> RowSource:
    """Open `source` as rows.

    Args:
        source: a path to `.jsonl`, `.ndjson`, `.json` (an array or columns, which are read into memory, or lines), `.csv`,
            `.tsv` (these also gzipped), `.parquet`, `.arrow`, a folder of Parquet files or one that `Dataset.save_to_disk`
            wrote; "hub:owner/name:split" for a dataset of the hub; a list of dictionaries or of texts, which become the field
            "text"; a dictionary of columns; a frame of pandas or polars; a table, batch or stream of Arrow; a
            `datasets.Dataset`; a streamed dataset, generator or iterator, which is read into memory; or a `RowSource`,
            which is returned unchanged.
        id_column, content: see `RowSource`.
        columns: names of the columns of a CSV or TSV file without a header.

    Raises:
        SparsortError: the path does not exist, the format or the type is unknown, or `columns` was given
            for a source whose columns have names.
    """
    if isinstance(source, RowSource):
        return source
    if columns is not None:
        return RowSource(_headless_reader(source, columns), id_column, content)
    return RowSource(_reader(source), id_column, content)


def rows_of(source: Any) -> Sequence[Mapping[str, Any]]:
    """`source`, in any form that `open_rows` reads, as rows that can be indexed.

    A list of rows, a `datasets.Dataset` and any other object with a length and `[position]` is returned as it is, and may have no
    rows; anything else is read into memory. Ids are not checked.

    Raises:
        SparsortError: as `open_rows`, or an item of a list is not a mapping.
    """
    if isinstance(source, RowSource):
        return [row.fields for row in source.rows()]
    rows = readable(source)
    if isinstance(rows, (list, tuple)):
        for position, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise not_a_row(f"list of {len(rows)} rows", position, row)
        return rows
    is_readable = isinstance(rows, (str, os.PathLike, Mapping)) or is_table(rows)
    if not is_readable and hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return cast("Sequence[Mapping[str, Any]]", rows)
    return [fields for _, fields in _reader(rows).records()]


def indexed(source: Any) -> Any:
    """`source` as examples that can be read by position, which need not be rows.

    A list or another object with a length and `[position]` is returned as it is, whatever its items are. A path, a dictionary of
    columns, a frame, a table and a stream are read by `rows_of`.

    Raises:
        SparsortError: as `rows_of`.
    """
    # A dictionary from position to example has random access already.
    are_columns = isinstance(source, Mapping) and all(isinstance(name, str) for name in source)
    can_index = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not can_index or are_columns or is_table(source) or isinstance(source, (str, os.PathLike)):
        return rows_of(source)
    return source


def _headless_reader(source: Any, columns: Sequence[str]) -> Reader:
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or "" in names or len(set(names)) < len(names):
        raise SparsortError(f"columns (--columns) is {names}; expected different non-empty names, such as a,b,c.")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if _suffix(path) in _DELIMITERS and _exists(path) and not path.is_dir():
            return Delimited(path, _DELIMITERS[_suffix(path)], names)
    reader = _reader(source)
    raise SparsortError(
        f"columns (--columns) names the columns of a .csv or .tsv file without a header, but {reader.name} already has column "
        "names. Do not pass columns."
    )


def _reader(source: Any) -> Reader:
    source = readable(source)
    if isinstance(source, (str, os.PathLike)):
        return _path_reader(Path(source).expanduser())
    if isinstance(source, Sequence):
        return SequenceReader(f"list of {len(source)} rows", source)
    # A caller who passes a dataset or a table has imported its library, so this test never has to import one.
    datasets, arrow = sys.modules.get("datasets"), sys.modules.get("pyarrow")
    if datasets is not None and isinstance(source, datasets.Dataset):
        return dataset_reader(source)
    if arrow is not None and isinstance(source, arrow.Table):
        return table_reader(source, f"table of {source.num_rows} rows")
    kind = type(source).__name__
    step = (
        "Pass a path, a list of dictionaries or texts, a dictionary of columns, a frame, an Arrow table or a dataset."
    )
    if kind in ("DatasetDict", "IterableDatasetDict"):
        step = f"Pass one of its splits: {', '.join(f'dataset[{name!r}]' for name in source)}."
    raise SparsortError(f"cannot read rows from a {kind}. {step}")


def _path_reader(path: Path) -> Reader:
    if not _exists(path):
        raise SparsortError(f"there is no file {path}.{_nearest(path)}")
    if path.is_dir():
        return folder_reader(path)
    match suffix := _suffix(path):
        case ".jsonl" | ".ndjson":
            return JsonLines(path)
        case ".json":
            return json_reader(path)
        case ".csv" | ".tsv":
            return Delimited(path, _DELIMITERS[suffix])
    match path.suffix.lower():
        case ".parquet":
            return parquet_reader(path)
        case ".arrow":
            return arrow_reader(path)
    raise SparsortError(
        f"{path}: unsupported file extension {path.suffix!r}; expected one of "
        ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz), .parquet, .arrow."
    )


def _suffix(path: Path) -> str:
    """The suffix of a text file, in lower case and without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # the name is too long, or contains a NUL
        return False


def _nearest(path: Path) -> str:
    folder = path.parent
    names = [child.name for child in itertools.islice(folder.iterdir(), 1000)] if folder.is_dir() else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f" Did you mean {folder / near[0]}?"
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    return " To read a dataset of the hub, write hub:owner/name:split."


def _place(position: int, line: int) -> str:
    return f"row {position} (line {line})" if line else f"row {position}"
