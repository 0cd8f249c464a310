"""Scores that were written before files had digests: everything that they imply about themselves, checked before use.

Contract: a table passes if it could have been written by sparsort 0.1; a shard passes if its pages have their checksums, its rows
have the digest in its footer, and its footer agrees with itself, with the manifest and with the settings. Of all single-bit
flips of such a shard, not one that passes changes a value (`tests/scoring/store/test_unsealed.py` and
`benchmarks/checks/bit_flips.py`).
Files without page checksums (single Parquet files, JSONL) imply less: a flip in a metric other than the main one can pass.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import rows_digest
from sparsort.scoring.store.score_tables import STATUSES, scores_schema
from sparsort.storage.parquet_seal import DamagedError

# What pyarrow raises for a file whose bytes have changed.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError)


def check_shard(path: Path, *, settings: str, shard_rows: int, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The rows and the digest of an unsealed shard.

    Args:
        path: the shard.
        settings: digest of the settings in the manifest.
        shard_rows: the most rows that it may have.
        provenance: of the manifest.

    Returns:
        `{"rows": N, "digest": …, "settings": …}`, as a seal would say.

    Raises:
        DamagedError: it contradicts itself or the manifest.
        FileNotFoundError: it is missing.
        SparsortError: the disk cannot read it.
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
        if getattr(error, "errno", None):  # of the disk, not of the content
            raise SparsortError(f"cannot read {path}: {error}.") from error
        raise DamagedError(path, str(error).splitlines()[0]) from error
    if not {b"sparsort.digest", b"sparsort.settings"} <= set(metadata):
        raise DamagedError(path, "it is not a shard of scores as sparsort writes them")
    digest, found_settings = (
        metadata[key].decode("utf-8", "replace") for key in (b"sparsort.digest", b"sparsort.settings")
    )
    if not rows == table.num_rows <= shard_rows:
        raise DamagedError(path, f"its footer says {rows} rows, and it has {table.num_rows} of at most {shard_rows}")
    if described != table.column_names:
        raise DamagedError(path, "its footer names other columns than its schema")
    if sum(one != other for one, other in zip(found_settings, settings, strict=False)) == 1:
        # Digests of two settings differ in about 30 of their 32 digits.
        raise DamagedError(path, "its digest of the settings has changed since it was written")
    if found_settings == settings and (problem := find_problem(table, provenance)):
        raise DamagedError(path, problem)
    if "digest" in table.column_names and rows_digest_of(table) != digest:
        raise DamagedError(path, "its rows are not those of the digest in it")
    return {"rows": rows, "digest": digest, "settings": found_settings}


def find_problem(table: pa.Table, provenance: Mapping[str, Any]) -> str | None:
    """Why a table cannot be scores as sparsort wrote them, in words; None if it can.

    Args:
        table: columns of `scores_schema`.
        provenance: of the scores.
    """
    base, orientation = scores_schema([]), provenance.get("orientation", {})
    names = table.column_names[len(base) :]
    if not table.schema.equals(scores_schema(names)) or len(set(names)) != len(names):
        return "its columns are not those of scores"
    if absent := sorted(set(orientation) - set(names)):
        return f"it lacks the metric {absent[0]!r} that its provenance names"
    if any(table.column(name).null_count for name in table.column_names):
        return "values are missing"
    status, difficulty = table["status"].to_pylist(), table["difficulty"].to_numpy()
    if unknown := set(status) - set(STATUSES):
        return f"{min(unknown)!r} is no status"
    scored = np.array([state == "ok" for state in status], dtype=bool)
    if not np.array_equal(scored, np.isfinite(difficulty)) or np.isinf(difficulty).any():
        return "a row has a difficulty without the status 'ok', or the other way round"
    if any(table[name].to_numpy().min(initial=0) < 0 for name in ("position", "n_tokens", "n_truncated")):
        return "a position or a number of tokens is negative"
    return None


def find_other_difficulty(table: pa.Table, provenance: Mapping[str, Any]) -> str | None:
    """What is wrong if the difficulty is not the oriented metric that the provenance names; None if it is that metric.

    Every scorer of sparsort 0.1 gave such tables. The check is for files whose values have no other guard.
    """
    metric, orientation = provenance.get("metric"), provenance.get("orientation", {})
    if metric not in table.column_names or metric not in orientation:
        return None
    scored = np.array([state == "ok" for state in table["status"].to_pylist()], dtype=bool)
    turned = table[metric].to_numpy() * float(orientation[metric])
    if np.array_equal(turned[scored], table["difficulty"].to_numpy()[scored]):
        return None
    return f"its difficulty is not the metric {metric!r}"


def rows_digest_of(table: pa.Table) -> str:
    """The `rows_digest` of a table of scores."""
    return rows_digest(zip(table["id"].to_pylist(), table["digest"].to_pylist(), strict=True))


def _described_names(file: pq.ParquetFile) -> list[str] | None:
    """The columns that Arrow's own copy of the schema in the footer names; None if there is no copy."""
    kept = (file.metadata.metadata or {}).get(b"ARROW:schema")
    return None if kept is None else list(pa.ipc.read_schema(pa.BufferReader(base64.b64decode(kept))).names)
