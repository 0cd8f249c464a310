"""The file of one shard: sealed Parquet and, in a small shard, a copy of its table that can be read faster.

Contract: reading returns the table that was written, or raises an error that names the file. Opening a Parquet file and each of
its columns takes a fixed time. With 10,000 shards, this would be most of the time of `sparsort plan`. The copy is an Arrow IPC
stream between the pages and the footer, and takes less than half of that time (`benchmarks/speed/many_shards.py`). A shard
without a copy, and every shard of an earlier version, is read from its pages.

A shard of version 0.1 has no seal. It is accepted if its pages have their checksums, its rows have the digest in its footer, and
its footer agrees with itself, with the manifest and with the settings. No single-bit flip that passes these checks changes a
value (`tests/scoring/store/test_unsealed.py`, `benchmarks/checks/bit_flips.py`).
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsort.errors import SparsortError
from sparsort.scoring.store.score_tables import find_problem, rows_digest_of
from sparsort.storage.parquet_seal import DamagedError, add_seal, read_copy

# The errors of pyarrow for a file whose bytes have changed.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError)
# The largest table, in bytes of memory, whose shard has a copy: about 400 rows.
MAX_COPY_BYTES = 1 << 16
SCORE_AGAIN = "Run the command that made these scores again: it scores damaged shards again and keeps the others."


def write_shard(path: Path, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Write a table and its seal to a file that no other process reads yet; an `OSError` if the disk cannot be written."""
    table = table.replace_schema_metadata(None)
    is_small = table.nbytes <= MAX_COPY_BYTES
    # For a small file, dictionaries of columns and compression take more time than the saved bytes are worth.
    coding: dict[str, Any] = {"compression": "none", "use_dictionary": False} if is_small else {"compression": "zstd"}
    pq.write_table(table, path, write_page_checksum=True, **coding)
    add_seal(path, facts, copy=_stream(table) if is_small else b"")


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a shard, or some of its columns; a `SparsortError` if the file is missing or cannot be read."""
    with _readable(path):
        if (copy := read_copy(path)) is not None:
            table = pa.ipc.open_stream(copy).read_all()
            return table if columns is None else table.select(columns)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            # One thread, because distributing such small columns to several threads takes longer than reading them.
            return file.read(columns=columns, use_threads=False).replace_schema_metadata(None)


def column_names(path: Path) -> list[str]:
    """The columns of a shard; a `SparsortError` if the file is missing or cannot be read."""
    with _readable(path), pq.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def check_unsealed_shard(
    path: Path, *, settings: str, shard_rows: int, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Check a shard without a seal.

    Args:
        path: the shard.
        settings: digest of the settings in the manifest.
        shard_rows: the largest number of rows that it may have.
        provenance: provenance in the manifest.

    Returns:
        The facts that a seal would have: `{"rows": N, "digest": …, "settings": …}`.

    Raises:
        DamagedError: the shard contradicts itself or the manifest.
        FileNotFoundError: the file is missing.
        SparsortError: the disk cannot read the file.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata, rows = file.schema_arrow.metadata or {}, file.metadata.num_rows
            described = _described_names(file)
            table = file.read().replace_schema_metadata(None)
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        if getattr(error, "errno", None):  # an error of the disk, and not of the content
            raise SparsortError(f"cannot read {path}: {error}.") from error
        raise DamagedError(path, str(error).splitlines()[0]) from error
    if not {b"sparsort.digest", b"sparsort.settings"} <= set(metadata):
        raise DamagedError(path, "it is not a shard of scores as sparsort writes them")
    digest, own_settings = (
        metadata[key].decode("utf-8", "replace") for key in (b"sparsort.digest", b"sparsort.settings")
    )
    if not rows == table.num_rows <= shard_rows:
        raise DamagedError(path, f"its footer says {rows} rows, and it has {table.num_rows} of at most {shard_rows}")
    if described != table.column_names:
        raise DamagedError(path, "its footer names other columns than its schema")
    # The digests of different settings differ in about 30 of their 32 digits, so a single different digit is damage.
    if sum(one != other for one, other in zip(own_settings, settings, strict=False)) == 1:
        raise DamagedError(path, "its digest of the settings has changed since it was written")
    if own_settings == settings and (problem := find_problem(table, provenance)):
        raise DamagedError(path, problem)
    if "digest" in table.column_names and rows_digest_of(table) != digest:
        raise DamagedError(path, "its rows do not have the digest in its footer")
    return {"rows": rows, "digest": digest, "settings": own_settings}


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


def _described_names(file: pq.ParquetFile) -> list[str] | None:
    """The columns in the copy of the schema that Arrow stores in the footer; None if there is no copy."""
    schema = (file.metadata.metadata or {}).get(b"ARROW:schema")
    return None if schema is None else list(pa.ipc.read_schema(pa.BufferReader(base64.b64decode(schema))).names)
