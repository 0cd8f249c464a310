"""Rows to score, from a file, a dataset or a list: streamed, identified, and checked before any model runs.

Contract: a `RowSource` yields the same `Row`s however often and from wherever it is read, and holds a batch of them at
a time. The first use makes one cheap pass that counts the rows and finds broken lines and duplicate ids, so that row
900,001 cannot stop a run that has been scoring for hours. For a million short rows of JSONL it takes about 3 s and,
with ids, 24 bytes of memory a row; of columnar files it reads the id column only.
"""

from __future__ import annotations

import difflib
import hashlib
import heapq
import itertools
import json
import os
import re
import sys
from array import array
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from sparsort.errors import SparsortError, did_you_mean
from sparsort.paths import spell
from sparsort.scoring.data.columnar import (
    arrow_reader,
    dataset_reader,
    merge,
    parquet_reader,
    saved_dataset_reader,
    table_reader,
)
from sparsort.scoring.data.delimited import Delimited
from sparsort.scoring.data.inputs import readable
from sparsort.scoring.data.json_files import json_reader
from sparsort.scoring.data.readers import JsonLines, Reader, SequenceReader, TextReader
from sparsort.values import as_text, has_text, is_missing, kind_of, missing_field, missing_name

# How a sample of rows is drawn, as the records of what is fitted on one state it. A record without it is of an earlier
# version, which took evenly spaced rows, so that the order of the rows changed what was fitted.
SAMPLING = "distinct rows by digest"
SAMPLE_ROWS = 256
# Keyed, so that a sample is independent of whatever else is decided by a digest.
_SAMPLE_KEY = b"sparsort sample"

Item = TypeVar("Item")

# What separates the cells of a text file; None where the file itself shows it.
_DELIMITERS: Mapping[str, str | None] = {".csv": None, ".tsv": "\t"}

_NEXT_STEP = {
    "IterableDataset": "Save it first, as JSONL or with datasets.Dataset.from_generator(lambda: iter(stream)).",
    "generator": "Make it a list, or a file of JSON lines.",
    "DataFrame": "Pass frame.to_dict('records'), or datasets.Dataset.from_pandas(frame).",
    "polars.DataFrame": "Pass frame.to_dicts(), or frame.to_arrow().",
    "polars.LazyFrame": "Pass frame.collect().to_arrow().",
    "RecordBatch": "Pass pyarrow.Table.from_batches([batch]).",
    "RecordBatchReader": "Pass reader.read_all().",
    "dict": "Pass a list of rows; for a dict of columns use datasets.Dataset.from_dict(columns).",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `position` counts from 0; `id` is unique in its source; `digest` that of its content."""

    position: int
    id: str
    fields: Mapping[str, Any]
    digest: str

    @property
    def name(self) -> str:
        """What an error calls the row: "row 7 (id 'q7')"."""
        return f"row {self.position} (id {self.id!r})"


class RowCheck(Hashable, Protocol):
    """What reads the values of rows, and can say beforehand whether it is able to; `prompts.Prompt` is one."""

    @property
    def paths(self) -> set[str]:
        """The fields that are paths into a column; a mistake if they lead to nothing in every row."""
        ...

    @property
    def is_uniform(self) -> bool:
        """Whether one row of a table, whose columns have types, shows that all rows can be read."""
        ...

    def check(self, fields: Mapping[str, Any], *, where: str) -> set[str]:
        """The fields that are missing in a row; raises an error for a value that cannot be read."""
        ...


class RowSource:
    """Rows that can be read again and again, from any position.

    Args:
        reader: where the records come from.
        id_column: the field that holds the id of a row. None: the field "id" where the first row has it, else a row's
            position is its id.
        content: the fields that a row's digest is taken over, such as those that a prompt reads; None for all.
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
        """What messages and provenance call this source."""
        return self._reader.name

    @property
    def id_column(self) -> str | None:
        """The field that holds the ids; None where a row's id is its position."""
        self.count()
        return self._id_column

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Stream the rows from position `start` on."""
        self.count()
        for position, (line, fields) in enumerate(self._reader.records(start), start):
            yield self._row(position, line, fields)

    def take(self, positions: Sequence[int]) -> list[Row]:
        """The rows at `positions`, which ascend."""
        self.count()
        found = zip(positions, self._reader.take(positions), strict=True)
        return [self._row(position, line, fields) for position, (line, fields) in found]

    def count(self) -> int:
        """The number of rows. The first call checks the whole source.

        Raises:
            SparsortError: there are no rows, a row is broken, lacks its id, or has the id of another.
        """
        if self._count is None:
            self._count = self._check()
        return self._count

    def columns(self) -> list[str]:
        """The fields of the first row."""
        return [str(name) for name in next(self._reader.records())[1]] if self.count() else []

    def require(self, fields: Sequence[str], reader: RowCheck | None = None) -> None:
        """Make sure that every row can be read, so that the last one cannot stop a run that has gone on for hours.

        Args:
            fields: the columns that every row has to have.
            reader: what will read the values of the rows, such as a prompt.

        Raises:
            SparsortError: a column is missing (names the row, the nearest one, and what there is); a value is of a kind that
                `reader` cannot read; or a path of `reader` leads to nothing in any row.
        """
        if {*fields, reader} - {None} <= self._required:
            return
        # A table has the same columns in every row, of one type each; elsewhere each row may lack its own.
        alike = not isinstance(self._reader, (SequenceReader, TextReader)) and (reader is None or reader.is_uniform)
        missing: set[str] | None = None
        for position, (line, record) in enumerate(self._reader.records(columns=fields)):
            where = f"{self.name}: {_place(position, line)}"
            for name in fields:
                if name not in record:
                    raise self._without_column(name, record, where, in_template=reader is not None)
            here = set() if reader is None else reader.check(record, where=where)
            missing = here if missing is None else missing & here
            if alike and not missing:
                break
        if reader is not None and (nowhere := sorted((missing or set()) & reader.paths)):
            raise SparsortError(
                f"{self.name}: the field {nowhere[0]!r} has no value in any row. Check the path, which is a column followed by "
                "keys and indices, such as meta.lang or messages[0].content."
            )
        self._required |= {*fields, reader} - {None}

    def check(self, read: Callable[[Mapping[str, Any], str], object], positions: Iterable[int] | None = None) -> None:
        """Read rows so that an error names the file, the row and the line, which the fields alone do not know.

        Args:
            read: gets the fields of a row, and what the row is called in an error.
            positions: the rows to read; None for all.

        Raises:
            SparsortError: as `read`.
        """
        places = range(self.count()) if positions is None else sorted(set(positions))
        for position, (line, record) in zip(places, self._reader.take(places), strict=True):
            read(record, f"{self.name}: {_place(position, line)}")

    def sample(self, n: int) -> list[Row]:
        """`n` rows of different contents, all contents where there are fewer; the order of the rows has no effect.

        See `sample_by_digest`. Reads the whole source once.
        """
        return sample_by_digest(((row.digest, row) for row in self.rows()), n)

    def _without_column(self, name: str, record: Mapping[str, Any], where: str, *, in_template: bool) -> SparsortError:
        error = missing_field(spell([name]), record, where, in_template=in_template)
        if not isinstance(self._reader, Delimited):
            return error
        return SparsortError(
            f"{error} If its first line is no header, name the columns with columns (--columns a,b,c)."
        )

    def _check(self) -> int:
        first = next(self._reader.records(), None)
        if first is None:
            raise SparsortError(f"{self.name} holds no rows. Pass a file with at least one example.")
        if self._id_column is None and "id" in first[1]:
            self._id_column = "id"
        total = self._reader.total()
        if total is None or self._id_column is not None:
            total = self._check_ids()
        return total

    def _check_ids(self) -> int:
        """Count the rows. Equal ids have equal hashes, so the hashes are all that is kept of a million ids."""
        hashes = array("q")
        total = 0
        column = self._id_column
        for position, (line, fields) in enumerate(self._reader.records(columns=[column] if column else None)):
            if column:
                hashes.append(hash(self._identity(position, line, fields)))
            total = position + 1
        order = np.argsort(np.frombuffer(hashes, dtype=np.int64), kind="stable") if hashes else np.empty(0, np.int64)
        ordered = np.frombuffer(hashes, dtype=np.int64)[order] if hashes else order
        again = np.flatnonzero(ordered[1:] == ordered[:-1])
        for index in again[np.argsort(order[again + 1])]:
            pair = [int(order[index]), int(order[index + 1])]
            (line, fields), (other_line, other) = self._reader.take(pair)
            name = self._identity(pair[0], line, fields)
            if name == self._identity(pair[1], other_line, other):
                raise SparsortError(
                    f"{self.name}: the id {name!r} stands twice, "
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
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise SparsortError(f"{self.name}, {_place(position, line)}: the id {name!r} is not valid text.")
        return name

    def _bad_identity(self, position: int, line: int, fields: Mapping[str, Any]) -> SparsortError:
        column, where = self._id_column or "", f"{self.name}, {_place(position, line)}"
        if column in fields:
            value = fields[column]
            what = f"holds {kind_of(value)}, not a text or a number"
            if is_missing(value):
                what = f"is {missing_name(value)}"
            return SparsortError(f"{where}: the id field {column!r} {what}. Name another with id_column (--id-column).")
        why = "" if self._explicit else " (the first row has one, so it holds the ids)"
        hint = did_you_mean(column, fields)
        return SparsortError(f"{where}: there is no field {column!r}{why}.{hint} The fields are: {', '.join(fields)}.")


def rows_digest(rows: Iterable[tuple[str, str]]) -> str:
    """128 bits over the (id, digest) of consecutive rows, as hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for name, digest in rows:
        state.update(f"{len(name)}:{name}{digest}".encode())
    return state.hexdigest()


def digest_of(fields: Mapping[str, Any], content: Collection[str] | None = None) -> str:
    """A row's content as 32 hexadecimal digits: 128 bits of BLAKE2b over its JSON with sorted keys.

    Args:
        fields: the row.
        content: the fields that count, None for all.

    A field that is missing (null, NaN, …) counts as absent, because a table has to fill in what a JSON line may leave out.
    Bytes, arrays and images count by their content.
    """
    present = {
        key: value for key, value in fields.items() if (content is None or key in content) and not is_missing(value)
    }
    try:
        text = _ENCODER.encode(present)
    except TypeError:  # keys that are no text, or of several types, deeper in the row
        text = _ENCODER.encode(_text_keys(present))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def sample_by_digest(rows: Iterable[tuple[str, Item]], n: int) -> list[Item]:
    """`n` of the rows: those with the smallest keyed hash of their digest, in the order of that hash.

    The sample is a function of the set of digests: neither the order of the rows nor the number of copies of one changes
    it, since rows with equal digests count once. Of such rows the first is returned.

    Args:
        rows: pairs of a digest and the row that has it; they are read once, and at most `n` are held at a time.
        n: how many to take; all different ones where there are fewer.
    """
    kept: dict[int, Item] = {}
    negated: list[int] = []  # heapq keeps the smallest number in front, and here the largest hash is the next to go
    for digest, row in rows:
        key = int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=16, key=_SAMPLE_KEY).digest(), "big")
        if key in kept:
            continue
        if len(kept) < n:
            heapq.heappush(negated, -key)
        elif key < -negated[0]:
            del kept[-heapq.heapreplace(negated, -key)]
        else:
            continue
        kept[key] = row
    return [kept[key] for key in sorted(kept)]


def open_rows(
    source: Any,
    *,
    id_column: str | None = None,
    content: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> RowSource:
    """The rows of `source`.

    Args:
        source: a path to `.jsonl`, `.ndjson`, `.json` (an array or columns, which are read into memory, or lines), `.csv`,
            `.tsv` (these also gzipped), `.parquet`, `.arrow`, a folder of Parquet files or one that `Dataset.save_to_disk`
            wrote; a `datasets.Dataset`; a `pyarrow.Table`; a list of dicts; or a `RowSource`, returned as it is.
        id_column: see `RowSource`.
        content: see `RowSource`.
        columns: names of the columns of a CSV or TSV file without a header.

    Raises:
        SparsortError: the path is missing, the format is not known, the source cannot be read twice, or `columns` is given for
            rows that have names.
    """
    if isinstance(source, RowSource):
        return source
    if columns is not None:
        return RowSource(_headless_reader(source, columns), id_column, content)
    return RowSource(_reader(source), id_column, content)


def _headless_reader(source: Any, columns: Sequence[str]) -> Reader:
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or "" in names or len(set(names)) < len(names):
        raise SparsortError(
            f"columns (--columns) is {names}; expected different names, none of them empty, such as a,b,c."
        )
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if _suffix(path) in _DELIMITERS and _exists(path) and not path.is_dir():
            return Delimited(path, _DELIMITERS[_suffix(path)], names)
    reader = _reader(source)
    raise SparsortError(
        f"columns (--columns) names the columns of a .csv or .tsv file without a header; {reader.name} has names of its own. "
        "Leave it out."
    )


def _reader(source: Any) -> Reader:
    source = readable(source)
    if isinstance(source, (str, os.PathLike)):
        return _path_reader(Path(source).expanduser())
    if isinstance(source, Sequence):
        return SequenceReader(f"list of {len(source)} rows", source)
    # A dataset or a table can only be passed by someone who has imported its library.
    datasets, arrow = sys.modules.get("datasets"), sys.modules.get("pyarrow")
    if datasets is not None and isinstance(source, datasets.Dataset):
        return dataset_reader(source)
    if arrow is not None and isinstance(source, arrow.Table):
        return table_reader(source, f"table of {source.num_rows} rows")
    kind = type(source).__name__
    package = type(source).__module__.partition(".")[0]
    step = _NEXT_STEP.get(f"{package}.{kind}") or _NEXT_STEP.get(
        kind, "Pass a path, a datasets.Dataset or a list of dicts."
    )
    if kind in ("DatasetDict", "IterableDatasetDict"):
        step = f"Pass one split of it: {', '.join(f'dataset[{name!r}]' for name in source)}."
    raise SparsortError(f"cannot read rows from a {kind}: they are read more than once, and from any position. {step}")


def _path_reader(path: Path) -> Reader:
    if not _exists(path):
        raise SparsortError(f"there is no file {path}.{_nearest(path)}")
    if path.is_dir():
        return _folder_reader(path)
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
        f"{path}: the format is told by the suffix, and {path.suffix!r} is none of "
        ".jsonl, .ndjson, .json, .csv, .tsv (each also with .gz), .parquet, .arrow."
    )


def _suffix(path: Path) -> str:
    """The suffix that names the format of a text file, in lower case and without that of its compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that holds a NUL
        return False


def _folder_reader(folder: Path) -> Reader:
    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(sorted(str(child) for child in folder.iterdir() if child.is_dir()))
        raise SparsortError(f"{folder} holds several splits. Pass one of them: {splits}.")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return saved_dataset_reader(folder)
    files = sorted(folder.glob("*.parquet"))
    matches = (re.fullmatch(r"(.+)-\d+-of-\d+\.parquet", file.name) for file in files)
    splits = ", ".join(sorted({match[1] for match in matches if match}))
    if "," in splits:
        raise SparsortError(
            f"{folder} holds Parquet files of several splits ({splits}). Give each a folder of its own."
        )
    if not files:
        raise SparsortError(
            f"{folder} is a folder without Parquet files, and not one that Dataset.save_to_disk wrote. Pass a file."
        )
    return merge(str(folder), map(parquet_reader, files))


def _nearest(path: Path) -> str:
    folder = path.parent
    names = [child.name for child in itertools.islice(folder.iterdir(), 1000)] if folder.is_dir() else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f" Did you mean {folder / near[0]}?"
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    return " For a dataset of the hub, load it first: datasets.load_dataset(…)."


def _place(position: int, line: int) -> str:
    return f"row {position} (line {line})" if line else f"row {position}"


def _plain(value: Any) -> Any:
    """A JSON form, the same in every process, of what JSON has none for."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"bytes:{hashlib.blake2b(value, digest_size=16).hexdigest()}"
    if callable(listed := getattr(value, "tolist", None)):  # NumPy's arrays and numbers, torch's tensors
        return listed()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if callable(content := getattr(value, "tobytes", None)):  # images
        return [type(value).__name__, getattr(value, "size", None), _plain(content())]
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _text_keys(inner) for key, inner in value.items()}
    return [_text_keys(inner) for inner in value] if isinstance(value, (list, tuple)) else value


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=_plain)
