"""A curriculum as a plain file: the rows in training order, for trainers that read data in the order in which it is stored.

Contract: line i of the export is the i-th row that an epoch of the plan shows, with all its fields and three more: `order` and
`stage` (both from 0) and `difficulty`. A row that the epoch shows twice is written twice. The rows are copied once into a
temporary Arrow file next to the export, which is mapped and read in training order, so memory grows by 16 bytes a row and does
not depend on the size of a row. The export appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import RowSource, open_rows
from sparsort.storage.files import sync, write_atomically
from sparsort.terminal.progress import progress

FIELDS = ("order", "stage", "difficulty")
# Used for all three where the data has a column of one of these names.
_PREFIX = "curriculum_"
_ROWS_AT_ONCE = 10_000
# Rows that are looked up in the mapped file before its pages are released. A row far from the others may map 64 KB.
_ROWS_MAPPED = 1_000
_PARQUET, _JSONL = ".parquet", ".jsonl"


def check_export(path: str | Path) -> Path:
    """The path of an export, if one can be written there.

    Raises:
        SparsortError: another suffix than .parquet or .jsonl, or a folder that is not empty.
    """
    path = Path(path).expanduser()
    if path.suffix not in (_PARQUET, _JSONL, ""):
        raise SparsortError(
            f"cannot export to {path.name!r}: expected a name that ends in .parquet or .jsonl, or a folder, which is "
            "written with datasets.Dataset.save_to_disk."
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise SparsortError(f"{path} is a folder that is not empty. Choose another name.")
    return path


def export_plan(plan: CurriculumPlan, data: Any, path: str | Path, *, epoch: int = 0) -> int:
    """Write the rows of one epoch in training order.

    Args:
        plan: the plan.
        data: the rows that the plan was made for, in any form that `open_rows` reads.
        path: a name that ends in .parquet or .jsonl, or a folder for `datasets.load_from_disk`.
        epoch: the epoch, from 0.

    Returns:
        The number of rows written.

    Raises:
        SparsortError: the data has another number of rows than the plan, a column holds values of several types, or the file
            cannot be written.

    Example:
        >>> export_plan(CurriculumPlan.open("plan"), "train.jsonl", "ordered.parquet")
    """
    target, source = check_export(path), open_rows(data)
    if source.count() != plan.n_rows:
        raise SparsortError(
            f"{source.name} has {source.count():,} rows, and the plan was made for {plan.n_rows:,}. Pass the data of the plan."
        )
    order, stages = _sequence(plan, epoch)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        rows = _MappedRows(_copy(source, Path(scratch) / "rows.arrow"))
        # The first row may lack a column that later rows have.
        names = _field_names(rows.columns)
        chunks = _in_order(rows, order, stages, plan.difficulty, names)
        if target.suffix == _PARQUET:
            with _refusing(source.name), write_atomically(target) as temporary:
                _write_parquet(temporary, chunks, len(order))
        elif target.suffix == _JSONL:
            with write_atomically(target) as temporary:
                _write_jsonl(temporary, chunks, len(order))
        else:
            _write_dataset(target, chunks, len(order), Path(scratch))
    return len(order)


def _sequence(plan: CurriculumPlan, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The rows of the epoch in training order, and the stage of each."""
    batches = [plan.batch(number, epoch) for number in range(plan.n_batches)]
    stages = np.repeat([plan.stage(number) for number in range(plan.n_batches)], list(map(len, batches)))
    return np.concatenate(batches), stages.astype(np.int32)


def _field_names(columns: Sequence[str]) -> dict[str, str]:
    prefix = _PREFIX if set(FIELDS) & set(columns) else ""
    names = {name: prefix + name for name in FIELDS}
    if taken := sorted(set(names.values()) & set(columns)):
        raise SparsortError(f"the data has a column {taken[0]!r} already, which the export adds. Rename it.")
    return names


def _copy(source: RowSource, path: Path) -> Path:
    """The rows as an Arrow file."""
    schema = pa.schema([])
    # The first pass finds the type of every column: a column may be null, or lack, in the first rows.
    for rows in _batches(source, "columns"):
        schema = _unified(schema, rows, source.name)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for rows in _batches(source, "rows"):
            with _refusing(source.name):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return path


class _MappedRows:
    """Rows of an Arrow file at any positions, in memory that does not grow with the file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        from datasets import Dataset

        with path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_file(pa.py_buffer(self._pages)).read_all()
        # `Dataset` looks rows up in a mapped table without joining its chunks, which Arrow's own `take` would. It computes a
        # fingerprint by a copy of all rows, unless one is given.
        self._rows = Dataset(table, fingerprint="rows").with_format("arrow")
        self.columns: list[str] = table.schema.names

    def take(self, places: NDArray[np.int64]) -> pa.Table:
        """The rows at some positions, copied from the file."""
        parts = []
        for first in range(0, len(places), _ROWS_MAPPED):
            parts.append(self._rows[places[first : first + _ROWS_MAPPED].tolist()].combine_chunks())
            # Mapped pages count as memory of this process until they are released.
            if hasattr(mmap, "MADV_DONTNEED"):
                self._pages.madvise(mmap.MADV_DONTNEED)
        return pa.concat_tables(parts)


def _batches(source: RowSource, title: str) -> Iterator[list[Mapping[str, Any]]]:
    rows = source.rows()
    with progress(title, source.count()) as advance:
        while batch := [row.fields for row in itertools.islice(rows, _ROWS_AT_ONCE)]:
            yield batch
            advance(len(batch))


def _unified(schema: pa.Schema, rows: list[Mapping[str, Any]], name: str) -> pa.Schema:
    names = dict.fromkeys(itertools.chain(schema.names, *rows))
    with _refusing(name):
        found = pa.schema([(key, pa.array([row.get(key) for row in rows]).type) for key in names])
        return pa.unify_schemas([schema, found], promote_options="permissive")


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Raise a `SparsortError` if Arrow has no type for the values, such as half of a surrogate pair, or cannot write it."""
    try:
        yield
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise SparsortError(
            f"{name} cannot be written as a table: {error}. Give each column values of one type that the format can hold."
        ) from error


def _in_order(
    rows: _MappedRows,
    order: NDArray[np.int64],
    stages: NDArray[np.int32],
    difficulty: NDArray[np.float32],
    names: Mapping[str, str],
) -> Iterator[pa.Table]:
    """The rows in training order, a chunk at a time."""
    for first in range(0, len(order), _ROWS_AT_ONCE):
        places = order[first : first + _ROWS_AT_ONCE]
        chunk = rows.take(places)
        columns = {
            "order": pa.array(np.arange(first, first + len(places))),
            "stage": pa.array(stages[first : first + len(places)]),
            "difficulty": pa.array(difficulty[places]),
        }
        for name, column in columns.items():
            chunk = chunk.append_column(names[name], column)
        yield chunk


def _write_parquet(path: Path, chunks: Iterator[pa.Table], total: int) -> None:
    first = next(chunks)
    with progress("export", total) as advance, pq.ParquetWriter(path, first.schema) as writer:
        for chunk in itertools.chain([first], chunks):
            writer.write_table(chunk)
            advance(len(chunk))


def _write_jsonl(path: Path, chunks: Iterator[pa.Table], total: int) -> None:
    with progress("export", total) as advance, path.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            for row in chunk.to_pylist():
                file.write(json.dumps(_without_nan(row), ensure_ascii=False, default=str) + "\n")
            advance(len(chunk))


def _without_nan(value: Any) -> Any:
    """The value with null for numbers that JSON lacks: a row without a score has the difficulty NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_dataset(target: Path, chunks: Iterator[pa.Table], total: int, scratch: Path) -> None:
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    first, saved, had_bars = next(chunks), scratch / "dataset", is_progress_bar_enabled()
    # The library writes a dataset of one row, whose only file is then replaced by all rows. It could write all of them itself
    # only from another file, which it would map.
    disable_progress_bars()
    try:
        Dataset(first.slice(0, 1)).save_to_disk(saved)
    finally:
        if had_bars:
            enable_progress_bars()
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    with (
        progress("export", total) as advance,
        pa.OSFile(str(saved / state["_data_files"][0]["filename"]), "wb") as sink,
        pa.ipc.new_stream(sink, first.schema) as writer,
    ):
        for chunk in itertools.chain([first], chunks):
            writer.write_table(chunk)
            advance(len(chunk))
    # The library caches results of `map` by this fingerprint, so every export needs one of its own.
    state["_fingerprint"] = uuid.uuid4().hex[:16]
    (saved / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    sync(saved)
    if target.exists():
        target.rmdir()
    shutil.move(os.fspath(saved), target)
    sync(target.parent)
