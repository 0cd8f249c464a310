"""Readers of columnar data: Parquet, Arrow, `datasets.Dataset`; see `readers.Reader` for what they promise.

A late start skips whole row groups or record batches, the check of the ids reads the id column only, and at most 1024
rows at a time become Python objects. A dataset is read as it is stored: no image or audio is decoded to read a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from sparsort.errors import SparsortError
from sparsort.scoring.data.readers import STRIDE, Reader, Record, SequenceReader

_BUFFER = 1 << 20  # bytes


class TableReader:
    """Columnar rows: `batches(start, columns)` yields Arrow tables or record batches that begin at row `start`."""

    def __init__(self, name: str, total: int, batches: Callable[[int, Sequence[str] | None], Iterator[Any]]) -> None:
        self.name = name
        self._total = total
        self._batches = batches

    def total(self) -> int:
        return self._total

    def records(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Record]:
        for piece in self._pieces(start, columns):
            for fields in self._listed(piece):
                yield 0, fields

    def take(self, positions: Sequence[int]) -> Iterator[Record]:
        if not positions:
            return
        first, taken = positions[0], 0
        for piece in self._pieces(first, None):
            inside = taken
            while inside < len(positions) and positions[inside] < first + piece.num_rows:
                inside += 1
            if inside > taken:
                for fields in self._listed(piece.take([position - first for position in positions[taken:inside]])):
                    yield 0, fields
            first, taken = first + piece.num_rows, inside
            if taken == len(positions):
                return

    def _listed(self, piece: Any) -> list[dict[str, Any]]:
        """Rows as Python objects. Arrow holds values that Python cannot: dates after the year 9999, text that is not UTF-8."""
        try:
            return cast(list[dict[str, Any]], piece.to_pylist())
        except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            name = next((name for name in piece.column_names if not _has_python_values(piece.column(name))), None)
            which = "" if name is None else f", column {name!r} ({piece.schema.field(name).type})"
            raise SparsortError(
                f"{self.name}{which} holds a value that cannot be read: {error}. Convert the column to text, or leave it out."
            ) from error

    def _pieces(self, start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        """At most STRIDE rows at a time, so that a row group of long texts never stands as Python objects."""
        import pyarrow as pa

        if start >= self._total:
            return
        try:
            for batch in self._batches(start, columns):
                for offset in range(0, batch.num_rows, STRIDE):
                    yield batch.slice(offset, STRIDE)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.name, "a table", error) from error


def merge(name: str, readers: Iterable[TableReader]) -> TableReader:
    """Several tables, one after the other, under one name."""
    parts = list(readers)

    def batches(start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        for part in parts:
            if start < part.total():
                yield from part._batches(start, columns)
            start = max(0, start - part.total())

    return TableReader(name, sum(part.total() for part in parts), batches)


def parquet_reader(path: Path) -> TableReader:
    """The rows of one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            total, names = file.metadata.num_rows, file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(str(path), "Parquet", error) from error
    _check_names(names, str(path))

    def batches(start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        # With a buffer, pages are read as they are needed; without, the whole column of a row group at once.
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            groups: list[int] = []
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if groups or start < size:
                    groups.append(group)
                else:
                    start -= size
            for batch in file.iter_batches(
                batch_size=STRIDE, row_groups=groups, columns=_known(columns, file.schema_arrow.names)
            ):
                if start < batch.num_rows:
                    yield batch.slice(start)
                start = max(0, start - batch.num_rows)

    return TableReader(str(path), total, batches)


def arrow_reader(path: Path) -> TableReader:
    """The rows of one Arrow file, memory-mapped: the stream form that `datasets` writes, or the file form."""
    import pyarrow as pa

    try:
        with path.open("rb") as handle:
            stream = handle.read(6) != b"ARROW1"
        table = (pa.ipc.open_stream if stream else pa.ipc.open_file)(pa.memory_map(str(path))).read_all()
        table.validate()
        # Names that are not UTF-8 are a ValueError when Python first reads them.
        _check_names(table.column_names, str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(str(path), "Arrow", error) from error
    return table_reader(table, str(path), checked=True)


def saved_dataset_reader(folder: Path) -> Reader:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the JSON files decide what runs: lookups, casts, memory maps
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SparsortError(
            f"{folder} cannot be read as a saved dataset: {reason}. Save it again with save_to_disk."
        ) from error
    return dataset_reader(dataset, str(folder), checked=True)


def dataset_reader(dataset: Any, name: str | None = None, *, checked: bool = False) -> Reader:
    """The rows of a `datasets.Dataset`, with its selection and order; a transform of its own makes the fields.

    `name` and `checked` are those of `table_reader`.
    """
    name = name or f"dataset {dataset.info.dataset_name or dataset.builder_name or ''}[{dataset.split or len(dataset)}]"
    if dataset.format["type"] == "custom":
        return SequenceReader(name, dataset)
    raw = dataset.with_format("arrow")

    def batches(start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        part = raw.select(range(start, len(raw)))
        kept = _known(columns, raw.column_names)
        for piece in (part.select_columns(kept) if kept else part).iter(batch_size=STRIDE):
            if checked:
                piece.validate(full=True)
            yield piece

    return TableReader(name, len(dataset), batches)


def table_reader(table: Any, name: str, *, checked: bool = False) -> TableReader:
    """The rows of a `pyarrow.Table`.

    Args:
        table: the table.
        name: for messages.
        checked: validate the values as they are read. A damaged Arrow file has offsets outside of its buffers, which
            would be followed.
    """
    _check_names(table.column_names, name)

    def batches(start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        kept = _known(columns, table.column_names)
        part = (table.select(kept) if kept else table).slice(start)
        for offset in range(0, part.num_rows, STRIDE) if checked else ():
            piece = part.slice(offset, STRIDE)
            piece.validate(full=True)
            yield piece
        if not checked:
            yield part

    return TableReader(name, table.num_rows, batches)


def _check_names(names: Sequence[str], name: str) -> None:
    if twice := next((column for column in names if names.count(column) > 1), None):
        raise SparsortError(f"{name} has two columns with the name {twice!r}. Rename one of them.")


def _has_python_values(column: Any) -> bool:
    try:
        column.to_pylist()
    except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _unreadable(name: str, form: str, error: Exception) -> SparsortError:
    return SparsortError(f"{name} cannot be read as {form}: {error}. Write the file again, or check its suffix.")


def _known(columns: Sequence[str] | None, names: Sequence[str]) -> list[str] | None:
    """The columns to read: all of them where one is missing, so that the error can name what there is."""
    return list(columns) if columns and set(columns) <= set(names) else None
