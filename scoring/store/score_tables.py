"""The table of scores: its columns, how a scorer makes one, and how one without a digest is checked.

Contract: `find_problem` accepts a table if sparsort 0.1, which wrote no digests, could have written it. Files without page
checksums (single Parquet files, JSONL) reveal less than shards: a flipped bit in a metric other than the main one can pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.data.digests import rows_digest
from sparsort.scoring.data.rows import Row

# "missing" means that the row lacks the number that a column scorer reads. The other names describe the text or the state.
STATUSES = ("ok", "empty", "invalid", "too_long", "zero", "not_finite", "missing")

BASE = pa.schema(
    [
        ("position", pa.int64()),
        ("id", pa.string()),
        ("difficulty", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("n_tokens", pa.int32()),
        ("n_truncated", pa.int32()),
        ("digest", pa.string()),
    ]
)


def scores_schema(metrics: Iterable[str]) -> pa.Schema:
    """The columns of a table of scores: the fixed columns, then one float64 column per metric."""
    return pa.schema([*BASE, *(pa.field(name, pa.float64()) for name in metrics)])


def score_table(
    rows: Sequence[Row],
    difficulty: NDArray[np.floating[Any]],
    status: Sequence[str],
    reason: Sequence[str],
    n_tokens: Sequence[int] | NDArray[np.integer[Any]],
    n_truncated: Sequence[int] | NDArray[np.integer[Any]],
    metrics: Mapping[str, NDArray[np.floating[Any]]],
) -> pa.Table:
    """Make the table of scores of `rows`. Every other argument has one value per row.

    Raises:
        SparsortError: a row is "ok" without a finite difficulty, or has a difficulty and is not "ok".
    """
    if unknown := set(status) - set(STATUSES):
        raise unknown_choice("status", min(unknown), STATUSES)
    values = np.asarray(difficulty, dtype=np.float64)
    scored = np.array([state == "ok" for state in status], dtype=bool)
    wrong = np.flatnonzero(np.where(scored, ~np.isfinite(values), ~np.isnan(values)))
    if wrong.size:
        row = int(wrong[0])
        raise SparsortError(
            f"row {rows[row].position} has status {status[row]!r} and difficulty {values[row]}: "
            "a row must have a finite difficulty if and only if its status is 'ok'. This is a fault of the scorer."
        )
    columns = [
        pa.array([row.position for row in rows], pa.int64()),
        pa.array([row.id for row in rows], pa.string()),
        pa.array(values),
        pa.array(list(status), pa.string()),
        pa.array(list(reason), pa.string()),
        pa.array(np.asarray(n_tokens, dtype=np.int32)),
        pa.array(np.asarray(n_truncated, dtype=np.int32)),
        pa.array([row.digest for row in rows], pa.string()),
        *(pa.array(np.asarray(column, dtype=np.float64)) for column in metrics.values()),
    ]
    return pa.Table.from_arrays(columns, schema=scores_schema(metrics))


def find_problem(table: pa.Table, provenance: Mapping[str, Any]) -> str | None:
    """The reason why sparsort cannot have written this table with this provenance, as a clause; None if it can."""
    base, orientation = scores_schema([]), provenance.get("orientation", {})
    names = table.column_names[len(base) :]
    if not table.schema.equals(scores_schema(names)) or len(set(names)) != len(names):
        return "its columns are not those of a table of scores"
    if absent := sorted(set(orientation) - set(names)):
        return f"it lacks the metric {absent[0]!r} of its provenance"
    if any(table.column(name).null_count for name in table.column_names):
        return "values are missing"
    status, difficulty = table["status"].to_pylist(), table["difficulty"].to_numpy()
    if unknown := set(status) - set(STATUSES):
        return f"{min(unknown)!r} is not a status"
    scored = np.array([state == "ok" for state in status], dtype=bool)
    if not np.array_equal(scored, np.isfinite(difficulty)) or np.isinf(difficulty).any():
        return "a row has a difficulty but not the status 'ok', or the status 'ok' but no difficulty"
    if any(table[name].to_numpy().min(initial=0) < 0 for name in ("position", "n_tokens", "n_truncated")):
        return "a position or a number of tokens is negative"
    return None


def find_other_difficulty(table: pa.Table, provenance: Mapping[str, Any]) -> str | None:
    """The problem if the difficulty is not the oriented metric of the provenance, as a clause; None if it is.

    In sparsort 0.1 this holds for every scorer. It is checked in files whose values have no other protection.
    """
    metric, orientation = provenance.get("metric"), provenance.get("orientation", {})
    if metric not in table.column_names or metric not in orientation:
        return None
    scored = np.array([state == "ok" for state in table["status"].to_pylist()], dtype=bool)
    oriented = table[metric].to_numpy() * float(orientation[metric])
    if np.array_equal(oriented[scored], table["difficulty"].to_numpy()[scored]):
        return None
    return f"its difficulty is not the metric {metric!r}"


def rows_digest_of(table: pa.Table) -> str:
    """The `rows_digest` of a table of scores."""
    return rows_digest(zip(table["id"].to_pylist(), table["digest"].to_pylist(), strict=True))
