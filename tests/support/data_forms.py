"""The same rows in every form in which a caller may hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]


def columns(rows: Rows) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _jsonl(rows: Rows, folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _parquet(rows: Rows, folder: Path) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


# Each takes the rows and an empty folder. The form "hub" needs `datasets.load_dataset` to be replaced.
FORMS: dict[str, Callable[[Rows, Path], Any]] = {
    "rows": lambda rows, _: list(rows),
    "columns": lambda rows, _: columns(rows),
    "columns of arrays": lambda rows, _: {name: np.array(values) for name, values in columns(rows).items()},
    "pandas": lambda rows, _: pandas.DataFrame(columns(rows), index=range(7, 7 + len(rows))),
    "polars": lambda rows, _: polars.DataFrame(columns(rows)),
    "polars, lazy": lambda rows, _: polars.LazyFrame(columns(rows)),
    "arrow table": lambda rows, _: pa.table(columns(rows)),
    "arrow batch": lambda rows, _: pa.RecordBatch.from_pydict(columns(rows)),
    "arrow stream": lambda rows, _: pa.table(columns(rows)).to_reader(),
    "dataset": lambda rows, _: datasets.Dataset.from_dict(columns(rows)),
    "streamed dataset": lambda rows, _: datasets.Dataset.from_dict(columns(rows)).to_iterable_dataset(),
    "generator": lambda rows, _: (row for row in rows),
    "path": _jsonl,
    "path as text": _parquet,
    "hub": lambda rows, _: "hub:owner/name:train",
}
# Forms that can be read only once.
ONCE = ("arrow stream", "streamed dataset", "generator")
