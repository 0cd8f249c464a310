"""The table of scores: its columns, and how a scorer makes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.data.rows import Row

# "missing": the row lacks the number that a column scorer reads. Every other name says what the text or the state was.
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
    """The columns of a table of scores: the fixed ones, then one float64 a metric."""
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
    """The table of scores of `rows`; every other argument has one value a row.

    Raises:
        SparsortError: a row is "ok" without a finite difficulty, or has a difficulty without being "ok".
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
            "a row has a finite difficulty exactly when its status is 'ok'. This is a fault of the scorer."
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
