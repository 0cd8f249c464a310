"""Scores: one row per example, with the provenance of every number.

Contract: scores are a pair (table, provenance). The table has the columns of `score_tables.scores_schema`: the identity of the
row, its `difficulty` (higher for rows that the scorer considers harder; NaN, with a `status` and a `reason`, if there is no
score), and every metric that was measured. Parquet, JSONL, `datasets.Dataset` and a score folder preserve it to the last bit.

The provenance is stored in the schema metadata of Parquet (under `sparsort`), in the manifest of a folder, in
`NAME.provenance.json` next to JSONL (so that every line of `NAME.jsonl` is a row for other tools), and in `info.description` of a
`Dataset` (which `map`, `select` and `save_to_disk` preserve). If it has been lost, the scores are read with an unknown origin.
Every format is written with digests, which are checked when it is read (`score_files`, `shards`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import spell
from sparsort.scoring.data.digests import digest_of, rows_digest
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.store import score_files, score_views
from sparsort.scoring.store.score_tables import BASE, scores_schema
from sparsort.storage.files import disk_errors
from sparsort.storage.integrity import as_written
from sparsort.values import as_text, is_missing

if TYPE_CHECKING:
    import datasets

_MAX_NAMED = 5  # rows that an error names before "and n more"

# For an unknown id, the nearest one is suggested only if there are at most this many ids.
_MAX_IDS = 1000


class Columns(Protocol):
    """The methods of a table that `Scores` needs, such as those of `pyarrow.Table`."""

    @property
    def num_rows(self) -> int: ...

    @property
    def column_names(self) -> list[str]: ...

    def select(self, columns: list[str]) -> pa.Table: ...


class Scores:
    """Scored rows, in the order of their source.

    Args:
        table: a table with the columns of `scores_schema`, or a complete `shards.ShardStore`, whose columns are read when used.
        provenance: JSON values. Used here: `scorer` (the kind), `metric` (the source of `difficulty`), `orientation`
            ({metric: +1 if a higher value is harder, otherwise -1}), `id_column` (None if ids are positions).
    """

    def __init__(self, table: pa.Table | Columns, provenance: Mapping[str, Any]) -> None:
        self._columns: Columns = _checked(table) if isinstance(table, pa.Table) else table
        _need_columns(self._columns.column_names)
        self.provenance = dict(provenance)

    @cached_property
    def table(self) -> pa.Table:
        """The whole table, which is read on first use if it is on disk."""
        return self._columns.select(self._columns.column_names)

    @property
    def kind(self) -> str:
        """The scorer: a name in `sparsort.scoring.scorers.SCORERS`, "calibrated" or "candidates"."""
        return str(self.provenance.get("scorer", "unknown"))

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    def __repr__(self) -> str:
        return score_views.summary(self)

    def _repr_html_(self) -> str:
        return score_views.as_html(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, as dictionaries."""
        for batch in self.table.to_batches():
            yield from batch.to_pylist()

    @overload
    def __getitem__(self, key: int | str) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, key: slice | Sequence[int] | Sequence[bool] | list[str] | NDArray[Any]) -> Scores: ...

    def __getitem__(self, key: Any) -> dict[str, Any] | Scores:
        """A row by its position or its id, or some of the rows as `Scores`.

        Args:
            key: a position, which may be negative; an id; a slice; a list or an array of positions or of ids; or one boolean per
                row.

        Raises:
            IndexError: there is no row at this position.
            SparsortError: there is no row with this id, the number of booleans is not the number of rows, or `key` is something
                else.
        """
        if isinstance(key, str):
            key = self._place_of(key)
        if isinstance(key, (int, np.integer)):
            position = range(len(self))[key]
            row: dict[str, Any] = self.table.slice(position, 1).to_pylist()[0]
            return row
        if isinstance(key, slice):
            return self._take(np.arange(len(self))[key])
        chosen = np.asarray(key)
        # A text column of a data frame becomes an array of objects.
        is_text = chosen.dtype.kind == "U" or (chosen.size and all(isinstance(name, str) for name in chosen.ravel()))
        if is_text and chosen.ndim == 1:
            return self._take(np.array([self._place_of(name) for name in chosen.tolist()], dtype=np.int64))
        # An empty list has no type of its own.
        if chosen.ndim != 1 or (chosen.dtype.kind not in "iub" and chosen.size):
            raise SparsortError(
                f"scores cannot be indexed by {key!r:.80}; expected a position, an id, a slice, a list of positions or ids, or "
                "one boolean per row."
            )
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise SparsortError(
                    f"the mask has the shape {chosen.shape}; expected one boolean for each of {len(self)} rows."
                )
            chosen = np.flatnonzero(chosen)
        return self._take(np.arange(len(self))[chosen.astype(np.int64)])

    def _place_of(self, name: str) -> int:
        if name in self._by_id:
            return self._by_id[name]
        if len(self) > _MAX_IDS:
            raise SparsortError(f"no row has the id {name!r}; there are {len(self):,} rows.")
        raise unknown_choice("id", name, self.ids)

    def filter(self, keep: Callable[[dict[str, Any]], bool]) -> Scores:
        """The rows for which `keep` returns true, such as `scores.filter(lambda row: row["difficulty"] > 0.5)`."""
        return self[np.array([bool(keep(row)) for row in self], dtype=bool)]

    def join(self, data: Any) -> Any:
        """The scored data with the columns of the scores; see `score_views.join`."""
        return score_views.join(self, data)

    def plot(self, axes: Any = None) -> Any:
        """A histogram of the difficulty; see `score_views.plot`."""
        return score_views.plot(self, axes)

    def to_arrow(self) -> pa.Table:
        """The scores as a `pyarrow.Table`."""
        return self.table

    def to_pandas(self) -> Any:
        """The scores as a pandas data frame."""
        return self.table.to_pandas()

    def to_polars(self) -> Any:
        """The scores as a polars data frame.

        Raises:
            SparsortError: polars is not installed.
        """
        try:
            import polars
        except ModuleNotFoundError as error:
            raise SparsortError("polars is not installed. Install it with: pip install polars.") from error
        return polars.from_arrow(self.table)

    def save_to_disk(self, folder: str | Path) -> None:
        """Write `to_dataset()` to a folder, which `datasets.load_from_disk` and `Scores.load` read."""
        with disk_errors(Path(folder)):
            self.to_dataset().save_to_disk(str(folder))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the scores to the Hub as a dataset, with a card that gives their provenance; see `score_views.push`."""
        with tempfile.TemporaryDirectory() as folder:
            return score_views.push(self, repo_id, private=private, token=token, folder=Path(folder))

    def _take(self, positions: NDArray[np.int64]) -> Scores:
        rows = {"selected": {"rows": len(positions), "of": len(self)}}
        return Scores(self.table.take(pa.array(positions)), {**self.provenance, **rows})

    @property
    def ids(self) -> list[str]:
        return list(self._column("id").to_pylist())

    @property
    def difficulty(self) -> NDArray[np.float64]:
        """(N,) float64; NaN if `status` is not "ok"."""
        return self.column("difficulty")

    @property
    def metrics(self) -> list[str]:
        """The names of the metric columns."""
        return [name for name in self._columns.column_names if name not in BASE.names]

    def column(self, name: str) -> NDArray[Any]:
        """One column, (N,): float64 for a metric, object for text."""
        if name not in self._columns.column_names:
            raise unknown_choice("column", name, self._columns.column_names)
        column = self._column(name)
        return np.asarray(column.to_pylist(), dtype=object) if pa.types.is_string(column.type) else _numbers(column)

    def counts(self, name: str) -> dict[str, int]:
        """The number of occurrences of each value of a text column."""
        return {item["values"]: item["counts"] for item in pc.value_counts(self._column(name)).to_pylist()}

    def by(self, metric: str) -> Scores:
        """The same rows, with another metric as the `difficulty`, oriented so that a higher value is harder."""
        orientation = self.provenance.get("orientation", {})
        choices = [name for name in self.metrics if name in orientation]
        if metric not in choices:
            raise unknown_choice("metric", metric, choices)
        values = self.column(metric) * float(orientation[metric])
        values[self.column("status") != "ok"] = np.nan
        index = self.table.schema.get_field_index("difficulty")
        table = self.table.set_column(index, "difficulty", pa.array(values, pa.float64()))
        return Scores(table, {**self.provenance, "metric": metric})

    def difficulty_of(self, rows: Any) -> NDArray[np.float64]:
        """The difficulty of each row, (n,) float64; NaN for a row whose status is not "ok".

        A row that has the id field of the scored source is looked up by its id. Any other row is looked up by its content, which
        is the fields that the scorer read.

        Args:
            rows: n rows, in any form that `open_rows` reads.

        Raises:
            SparsortError: some rows were not scored, or a row differs in content from the scored row with the same id.
        """
        return self.difficulty[self.places_of(rows)]

    def places_of(self, rows: Any) -> NDArray[np.int64]:
        """The position in the table of each of the n rows, (n,), looked up as in `difficulty_of`.

        Raises:
            SparsortError: as `difficulty_of`.
        """
        rows = rows_of(rows)
        column, content = self.provenance.get("id_column"), self.provenance.get("content")
        places, absent = np.zeros(len(rows), dtype=np.int64), []
        for number, row in enumerate(rows):
            name = _id_of(row, column, number)
            digest = digest_of(row, content)
            index = self._by_digest.get(digest) if name is None else self._by_id.get(name)
            if index is not None and content is not None and self._digests[index] != digest:
                raise SparsortError(
                    f"row {number} ({column} {name!r}) is not the row that was scored under this id: "
                    f"{', '.join(content)} differ. Score the rows that you have (sparsort score)."
                )
            if index is None:
                absent.append(f"row {number} ({'looked up by its content' if name is None else f'{column} {name!r}'})")
            else:
                places[number] = index
        if absent:
            more = f" and {len(absent) - _MAX_NAMED} more" if len(absent) > _MAX_NAMED else ""
            raise SparsortError(
                f"{len(absent)} of {len(rows)} rows have no score: {', '.join(absent[:_MAX_NAMED])}{more}. "
                "Score the file that contains them (sparsort score), or pass the rows as they were when they were scored."
            )
        return places

    def order(self, *, descending: bool = False) -> NDArray[np.int64]:
        """Row numbers by difficulty, (N,), ties by id. Rows without a score are last, in both directions."""
        keys = pa.table({"difficulty": self._column("difficulty"), "id": self._column("id")})
        direction = "descending" if descending else "ascending"
        # Arrow sorts NaN after every number in both directions.
        indices = pc.sort_indices(keys, sort_keys=[("difficulty", direction), ("id", "ascending")])
        return np.asarray(indices.to_numpy(), dtype=np.int64)

    def ranked(self, *, descending: bool = False) -> list[str]:
        """The ids in the order of difficulty; see `order`."""
        return list(self._column("id").take(pa.array(self.order(descending=descending))).to_pylist())

    def to_dataset(self) -> datasets.Dataset:
        """Convert the scores to a `datasets.Dataset` with the columns of `scores_schema`."""
        return score_files.to_dataset(self.table, self.provenance)

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Scores:
        """Read a dataset that `to_dataset` returned, also after `map`, `select` or `save_to_disk`.

        Raises:
            SparsortError: the provenance is damaged, or the rows are damaged and were not changed by `datasets`.
        """
        return cls(*score_files.from_dataset(dataset))

    def to_parquet(self, path: str | Path) -> None:
        """Write one Parquet file, atomically, which contains its own digest."""
        score_files.write_parquet(self.table, self.provenance, Path(path))

    @classmethod
    def from_parquet(cls, path: str | Path) -> Scores:
        """Read a file that `to_parquet` wrote; a `SparsortError` if it is missing or damaged, or does not contain scores."""
        return cls(*score_files.read_parquet(Path(path)))

    def to_jsonl(self, path: str | Path) -> None:
        """Write one JSON object per row, and a file with the provenance and a digest. NaN is null, an infinity is text."""
        score_files.write_jsonl(self.table, self.provenance, Path(path))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Scores:
        """Read a file that `to_jsonl` wrote; a `SparsortError` if it is missing or damaged, or the provenance does not match."""
        with as_written(path, next_step="Score again (sparsort score)."):
            rows, provenance, is_whole = score_files.read_jsonl(Path(path))
        _need_columns(rows[0])
        schema = scores_schema([name for name in rows[0] if name not in BASE.names])
        try:
            columns = [_column_of(rows, field) for field in schema]
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise SparsortError(f"{path} does not contain scores: {error}. Score again (sparsort score).") from error
        table = pa.Table.from_arrays(columns, schema=schema)
        if not is_whole and provenance.get("scorer") != "unknown":
            score_files.refuse_implausible(table, provenance, Path(path))
        return cls(table, provenance)

    def save(self, folder: str | Path) -> None:
        """Write a new score folder, like `sparsort score --out`; a `SparsortError` if the folder exists and is not empty."""
        from sparsort.scoring.store.manifest import MANIFEST
        from sparsort.scoring.store.shards import ShardStore

        if not len(self):
            raise SparsortError(f"there are no rows to save in {folder}. Select at least one.")
        if (Path(folder) / MANIFEST).exists():
            raise SparsortError(f"{folder} already contains scores. Choose another folder, or delete it.")
        store = ShardStore.open(Path(folder), provenance=self.provenance, shard_rows=max(1, len(self)))
        store.write(0, self.table, rows_digest(zip(self.ids, self.table["digest"].to_pylist(), strict=True)))
        store.finish(len(self))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a score folder, a `.parquet` or `.jsonl` file of scores, or a saved `Dataset` of them."""
        path = Path(path).expanduser()
        if path.suffix == ".parquet" and path.is_file():
            return cls.from_parquet(path)
        if path.suffix == ".jsonl" and path.is_file():
            return cls.from_jsonl(path)
        if (path / "dataset_info.json").exists():
            return cls(*score_files.load_dataset(path))
        from sparsort.scoring.store.shards import ShardStore

        store = ShardStore.complete(path)
        return cls(store, store.provenance)

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    @cached_property
    def _digests(self) -> list[str]:
        return list(self._column("digest").to_pylist())

    @cached_property
    def _by_digest(self) -> dict[str, int]:
        # In reverse, so that the first of several equal rows is kept.
        return {digest: index for index, digest in reversed(list(enumerate(self._digests)))}

    def _column(self, name: str) -> pa.ChunkedArray:
        # Only this column is read from disk, unless the whole table is already in memory.
        return (self.table if "table" in self.__dict__ else self._columns.select([name])).column(name)


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Convert a column of numbers to a new array."""
    # `to_numpy` imports pandas, so it is used only for columns with nulls or without chunks.
    if column.null_count or not column.num_chunks:
        return np.asarray(column.to_numpy())
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def _checked(table: pa.Table) -> pa.Table:
    """The table with the columns, order and types of the schema; other columns are kept only if they are metrics."""
    _need_columns(table.column_names)
    extra = [field.name for field in table.schema if field.name not in BASE.names and pa.types.is_floating(field.type)]
    schema = scores_schema(extra)
    return table.select(schema.names).cast(schema)


def _need_columns(names: Iterable[str]) -> None:
    if missing := set(BASE.names) - set(names):
        raise SparsortError(
            f"this is not a table of scores, because it lacks the column(s) {', '.join(sorted(missing))}. "
            "Make one with sparsort score."
        )


def _id_of(row: Mapping[str, Any], column: str | None, number: int) -> str | None:
    """The id of a row; None if it has none and must be looked up by its content."""
    value = row.get(column) if column else None
    return None if is_missing(value) else as_text(value, field=spell([str(column)]), where=f"row {number}")


def _column_of(rows: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    return pa.array(map(score_files.from_json, values) if pa.types.is_floating(field.type) else values, field.type)
