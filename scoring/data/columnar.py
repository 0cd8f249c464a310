"""Readers of columnar data: Parquet, Arrow, `datasets.Dataset`; see `readers.Reader` for their contract.

A late start skips whole row groups or record batches. The check of the ids reads only the id column. At most 1024 rows at a
time become Python objects. A dataset is read as it is stored, so that no image or audio is decoded to read a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from sparsort.errors import SparsortError
from sparsort.scoring.data.readers import STRIDE, Reader, Record, SequenceReader

_BUFFER = 1 << 20  # bytes
# Arrow has values that Python cannot represent, such as dates after the year 9999, and text that is not UTF-8.
_UNCONVERTIBLE = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)


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
            for fields in self._to_python(piece):
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
                for fields in self._to_python(piece.take([position - first for position in positions[taken:inside]])):
                    yield 0, fields
            first, taken = first + piece.num_rows, inside
            if taken == len(positions):
                return

    def _to_python(self, piece: Any) -> list[dict[str, Any]]:
        try:
            return cast(list[dict[str, Any]], piece.to_pylist())
        except _UNCONVERTIBLE as error:
            # The error does not name the column, so the columns are tried one by one.
            name = next((name for name in piece.column_names if not _has_python_values(piece.column(name))), None)
            column = "" if name is None else f", column {name!r} ({piece.schema.field(name).type})"
            raise SparsortError(
                f"{self.name}{column} contains a value that cannot be read: {error}. Convert the column to text, or remove it."
            ) from error

    def _pieces(self, start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        """Yield at most STRIDE rows at a time, so that a row group of long texts is never converted as a whole."""
        import pyarrow as pa

        if start >= self._total:
            return
        try:
            for batch in self._batches(start, columns):
                for offset in range(0, batch.num_rows, STRIDE):
                    yield batch.slice(offset, STRIDE)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.name, "a table", error) from error


def _merge(name: str, readers: Iterable[TableReader]) -> TableReader:
    """Concatenate several tables under one name."""
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
        # With a buffer, pages are read when they are needed. Without one, Arrow reads the whole column of a row group.
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            # Row groups before `start` are never read. `start` then counts from the first group that is read.
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


def folder_reader(folder: Path) -> Reader:
    """The rows of a folder of Parquet files, or of one that `Dataset.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(sorted(str(child) for child in folder.iterdir() if child.is_dir()))
        raise SparsortError(f"{folder} contains several splits. Pass one of them: {splits}.")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return _saved_dataset_reader(folder)
    files = sorted(folder.glob("*.parquet"))
    # The hub names the files of a split train-00000-of-00002.parquet and so on.
    matches = (re.fullmatch(r"(.+)-\d+-of-\d+\.parquet", file.name) for file in files)
    splits = ", ".join(sorted({match[1] for match in matches if match}))
    if "," in splits:
        raise SparsortError(f"{folder} contains Parquet files of several splits ({splits}). Use one folder per split.")
    if not files:
        raise SparsortError(
            f"{folder} is a folder without Parquet files, and not one that Dataset.save_to_disk wrote. Pass a file."
        )
    return _merge(str(folder), map(parquet_reader, files))


def arrow_reader(path: Path) -> TableReader:
    """The rows of one Arrow file, memory-mapped, in the stream format that `datasets` writes or in the file format."""
    import pyarrow as pa

    try:
        with path.open("rb") as handle:
            stream = handle.read(6) != b"ARROW1"
        table = (pa.ipc.open_stream if stream else pa.ipc.open_file)(pa.memory_map(str(path))).read_all()
        table.validate()
        # A name that is not UTF-8 raises a ValueError when Python first reads it.
        _check_names(table.column_names, str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(str(path), "Arrow", error) from error
    return table_reader(table, str(path), checked=True)


def _saved_dataset_reader(folder: Path) -> Reader:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # JSON files in the folder control which code of `datasets` runs, so any error can occur
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SparsortError(
            f"{folder} cannot be read as a saved dataset: {reason}. Save it again with save_to_disk."
        ) from error
    # The files were not checked when the dataset was opened.
    return dataset_reader(dataset, str(folder), checked=True)


def dataset_reader(dataset: Any, name: str | None = None, *, checked: bool = False) -> Reader:
    """The rows of a `datasets.Dataset`, with its selection, order and custom transform; see `table_reader` for `checked`."""
    name = name or f"dataset {dataset.info.dataset_name or dataset.builder_name or ''}[{dataset.split or len(dataset)}]"
    if dataset.format["type"] == "custom":
        return SequenceReader(name, dataset)
    raw = dataset.with_format("arrow")

    def batches(start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        part = raw.select(range(start, len(raw)))
        names = _known(columns, raw.column_names)
        for piece in (part.select_columns(names) if names else part).iter(batch_size=STRIDE):
            if checked:
                piece.validate(full=True)
            yield piece

    return TableReader(name, len(dataset), batches)


def table_reader(table: Any, name: str, *, checked: bool = False) -> TableReader:
    """The rows of a `pyarrow.Table`.

    Args:
        table: the table.
        name: the name of the source in messages.
        checked: validate the values while they are read. In a damaged Arrow file, offsets may point outside of its buffers,
            and Arrow would follow them.
    """
    _check_names(table.column_names, name)

    def batches(start: int, columns: Sequence[str] | None) -> Iterator[Any]:
        known = _known(columns, table.column_names)
        part = (table.select(known) if known else table).slice(start)
        for offset in range(0, part.num_rows, STRIDE) if checked else ():
            piece = part.slice(offset, STRIDE)
            piece.validate(full=True)
            yield piece
        if not checked:
            yield part

    return TableReader(name, table.num_rows, batches)


def _check_names(names: Sequence[str], name: str) -> None:
    if duplicate := next((column for column in names if names.count(column) > 1), None):
        raise SparsortError(f"{name} has two columns with the name {duplicate!r}. Rename one of them.")


def _has_python_values(column: Any) -> bool:
    try:
        column.to_pylist()
    except _UNCONVERTIBLE:
        return False
    return True


def _unreadable(name: str, form: str, error: Exception) -> SparsortError:
    return SparsortError(f"{name} cannot be read as {form}: {error}. Write the file again, or check its suffix.")


def _known(columns: Sequence[str] | None, names: Sequence[str]) -> list[str] | None:
    """The columns to read; None, for all, if one of them does not exist, so that the error can list all columns."""
    return list(columns) if columns and set(columns) <= set(names) else None
