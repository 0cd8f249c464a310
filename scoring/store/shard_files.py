"""The file of one shard: sealed Parquet and, in a small shard, a copy of its table that is read faster.

Contract: what is read is the table that was written, or an error that names the file. Opening a Parquet file and each of its
columns takes a fixed time, which for 10,000 shards is most of what `sparsort plan` may take; the copy, an Arrow IPC stream
between pages and footer, takes less than half of it (`benchmarks/speed/many_shards.py`). A shard without a copy is read from its
pages, as is every shard of an earlier version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsort.errors import SparsortError
from sparsort.storage.parquet_seal import add_seal, read_copy

# Bytes of a table in memory up to which its shard has a copy: some 400 rows.
MOST_OF_COPY = 1 << 16
SCORE_AGAIN = "Run the command that made these scores again: it scores damaged shards again and keeps the others."


def write_shard(path: Path, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Write a table and its seal to a file that nobody reads yet, such as a temporary one.

    Raises:
        OSError: the disk refuses.
    """
    table = table.replace_schema_metadata(None)
    is_small = table.nbytes <= MOST_OF_COPY
    # In a small file a dictionary of a column and a compressor's tables cost more time than they save bytes.
    coding: dict[str, Any] = {"compression": "none", "use_dictionary": False} if is_small else {"compression": "zstd"}
    pq.write_table(table, path, write_page_checksum=True, **coding)
    add_seal(path, facts, copy=_stream(table) if is_small else b"")


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a shard, or some of its columns.

    Raises:
        SparsortError: the file is missing, or cannot be read.
    """
    with _readable(path):
        if (copy := read_copy(path)) is not None:
            table = pa.ipc.open_stream(copy).read_all()
            return table if columns is None else table.select(columns)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            # One thread: handing such small columns to others takes longer than reading them.
            return file.read(columns=columns, use_threads=False).replace_schema_metadata(None)


def column_names(path: Path) -> list[str]:
    """The columns of a shard.

    Raises:
        SparsortError: the file is missing, or cannot be read.
    """
    with _readable(path), pq.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SparsortError(f"{path} cannot be read: {error}. {SCORE_AGAIN}") from error
