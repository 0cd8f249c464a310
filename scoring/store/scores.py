"""Scores: one row per example, and how every number in it came to be.

Contract: a score is the pair (table, provenance). The table has the columns of `score_tables.scores_schema`: who the row is, its
`difficulty` (rises with what the scorer holds to be harder; NaN where there is no score, with a `status` and a
`reason`) and every metric that was measured. It survives Parquet, JSONL, `datasets.Dataset` and a score folder to the
last bit.

Where provenance rides: Parquet, the schema metadata under `sparsort`; a folder, its manifest; JSONL, the file
`NAME.provenance.json` beside it, so that every line of `NAME.jsonl` stays a row for other tools; `Dataset`, the text of
`info.description`, which `map`, `select` and `save_to_disk` keep. Where it was lost, what is read says so. Every form is written
with digests and checked against them when it is read (`score_files`, `shards`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import spell
from sparsort.scoring.data.rows import digest_of, rows_digest
from sparsort.scoring.store import score_files
from sparsort.scoring.store.score_tables import BASE, scores_schema
from sparsort.storage.integrity import as_written
from sparsort.values import as_text, is_missing

if TYPE_CHECKING:
    import datasets

_SHOWN = 5  # rows named in an error before it says "and n more"


class Columns(Protocol):
    """What `Scores` needs of a table; `pyarrow.Table` has it."""

    @property
    def num_rows(self) -> int: ...

    @property
    def column_names(self) -> list[str]: ...

    def select(self, columns: list[str]) -> pa.Table: ...


class Scores:
    """Scored rows, in the order of their source.

    Args:
        table: columns of `scores_schema`; a complete `shards.ShardStore` does as well and is read a column at a time.
        provenance: JSON values. Used here: `scorer` (the kind), `metric` (behind `difficulty`), `orientation`
            ({metric: +1 where a higher value is harder, else -1}), `id_column` (None where ids are positions).
    """

    def __init__(self, table: pa.Table | Columns, provenance: Mapping[str, Any]) -> None:
        self._columns: Columns = _checked(table) if isinstance(table, pa.Table) else table
        _need_columns(self._columns.column_names)
        self.provenance = dict(provenance)

    @cached_property
    def table(self) -> pa.Table:
        """The whole table; one on disk is read on first use."""
        return self._columns.select(self._columns.column_names)

    @property
    def kind(self) -> str:
        """The scorer that made them: a name of `sparsort.scoring.scorers.SCORERS`, "calibrated" or "candidates"."""
        return str(self.provenance.get("scorer", "unknown"))

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    def __repr__(self) -> str:
        return f"Scores({len(self)} rows, {self.kind}, metrics: {', '.join(self.metrics)})"

    @property
    def ids(self) -> list[str]:
        return list(self._column("id").to_pylist())

    @property
    def difficulty(self) -> NDArray[np.float64]:
        """(N,) float64; NaN where `status` is not "ok"."""
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
        """How often each value of a text column occurs."""
        return {item["values"]: item["counts"] for item in pc.value_counts(self._column(name)).to_pylist()}

    def by(self, metric: str) -> Scores:
        """The same rows with `difficulty` taken from another metric, turned so that it rises with what is harder."""
        orientation = self.provenance.get("orientation", {})
        choices = [name for name in self.metrics if name in orientation]
        if metric not in choices:
            raise unknown_choice("metric", metric, choices)
        values = self.column(metric) * float(orientation[metric])
        values[self.column("status") != "ok"] = np.nan
        index = self.table.schema.get_field_index("difficulty")
        table = self.table.set_column(index, "difficulty", pa.array(values, pa.float64()))
        return Scores(table, {**self.provenance, "metric": metric})

    def difficulty_of(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """The difficulty of each of `rows`, (len(rows),) float64, NaN where it has no score.

        A row is found by its id where it has the id field of the scored source, else by its content: the fields that
        the scorer read.

        Raises:
            SparsortError: some rows were not scored, or an id now stands for another content.
        """
        column, content = self.provenance.get("id_column"), self.provenance.get("content")
        found, difficulty, absent = np.full(len(rows), np.nan), self.difficulty, []
        for place, row in enumerate(rows):
            name = _id_of(row, column, place)
            digest = digest_of(row, content)
            index = self._by_digest.get(digest) if name is None else self._by_id.get(name)
            if index is not None and content is not None and self._digests[index] != digest:
                raise SparsortError(
                    f"row {place} ({column} {name!r}) is not the row that was scored under this id: "
                    f"{', '.join(content)} differ. Score the rows that you have (sparsort score)."
                )
            if index is None:
                absent.append(f"row {place} ({'looked up by its content' if name is None else f'{column} {name!r}'})")
            else:
                found[place] = difficulty[index]
        if absent:
            more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
            raise SparsortError(
                f"{len(absent)} of {len(rows)} rows have no score: {', '.join(absent[:_SHOWN])}{more}. "
                "Score the file that holds them (sparsort score), or pass the rows as they were when they were scored."
            )
        return found

    def order(self, *, descending: bool = False) -> NDArray[np.int64]:
        """Row numbers of the table by difficulty, (N,): ties by id, rows without a score last, either way."""
        keys = pa.table({"difficulty": self._column("difficulty"), "id": self._column("id")})
        direction = "descending" if descending else "ascending"
        # Arrow sorts NaN behind every number in both directions.
        indices = pc.sort_indices(keys, sort_keys=[("difficulty", direction), ("id", "ascending")])
        return np.asarray(indices.to_numpy(), dtype=np.int64)

    def ranked(self, *, descending: bool = False) -> list[str]:
        """Ids by difficulty: see `order`."""
        return list(self._column("id").take(pa.array(self.order(descending=descending))).to_pylist())

    def to_dataset(self) -> datasets.Dataset:
        """A `datasets.Dataset` with the columns of `scores_schema`."""
        return score_files.to_dataset(self.table, self.provenance)

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Scores:
        """What `to_dataset` gave, also after `map`, `select` or `save_to_disk`.

        Raises:
            SparsortError: its provenance is damaged, or its rows are although `datasets` did not change them.
        """
        return cls(*score_files.from_dataset(dataset))

    def to_parquet(self, path: str | Path) -> None:
        """Write one Parquet file, atomically, with a digest of the whole file in it."""
        score_files.write_parquet(self.table, self.provenance, Path(path))

    @classmethod
    def from_parquet(cls, path: str | Path) -> Scores:
        """What `to_parquet` wrote.

        Raises:
            SparsortError: it is missing, damaged, or something else.
        """
        return cls(*score_files.read_parquet(Path(path)))

    def to_jsonl(self, path: str | Path) -> None:
        """Write one JSON object per row, then the provenance with a digest of them. NaN is null, an infinity is text."""
        score_files.write_jsonl(self.table, self.provenance, Path(path))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Scores:
        """What `to_jsonl` wrote.

        Raises:
            SparsortError: it is missing or damaged, or does not belong to the provenance next to it.
        """
        with as_written(path, next_step="Score again (sparsort score)."):
            rows, provenance, is_whole = score_files.read_jsonl(Path(path))
        _need_columns(rows[0])
        schema = scores_schema([name for name in rows[0] if name not in BASE.names])
        try:
            columns = [_column_of(rows, field) for field in schema]
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise SparsortError(f"{path} does not hold scores: {error}. Score again (sparsort score).") from error
        table = pa.Table.from_arrays(columns, schema=schema)
        if not is_whole and provenance.get("scorer") != "unknown":
            score_files.refuse_implausible(table, provenance, Path(path))
        return cls(table, provenance)

    def save(self, folder: str | Path) -> None:
        """Write a new score folder, such as `sparsort score --out` makes.

        Raises:
            SparsortError: the folder is not empty, or the disk refuses.
        """
        from sparsort.scoring.store.shards import MANIFEST, ShardStore

        if (Path(folder) / MANIFEST).exists():
            raise SparsortError(f"{folder} already holds scores. Choose another folder, or delete it.")
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
        return {digest: index for index, digest in reversed(list(enumerate(self._digests)))}  # the first of equal rows

    def _column(self, name: str) -> pa.ChunkedArray:
        return (self.table if "table" in self.__dict__ else self._columns.select([name])).column(name)


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of numbers as a new array, without `to_numpy`, which imports pandas."""
    if column.null_count or not column.num_chunks:
        return np.asarray(column.to_numpy())
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def _checked(table: pa.Table) -> pa.Table:
    """The columns of the schema, in its order and types; other columns that are no numbers are left out."""
    _need_columns(table.column_names)
    extra = [field.name for field in table.schema if field.name not in BASE.names and pa.types.is_floating(field.type)]
    schema = scores_schema(extra)
    return table.select(schema.names).cast(schema)


def _need_columns(names: Iterable[str]) -> None:
    if missing := set(BASE.names) - set(names):
        raise SparsortError(
            f"this is not a table of scores, it lacks the column(s) {', '.join(sorted(missing))}. "
            "Make one with sparsort score."
        )


def _id_of(row: Mapping[str, Any], column: str | None, place: int) -> str | None:
    """The id of a row that is looked up; None where it has none and is found by its content."""
    given = row.get(column) if column else None
    return None if is_missing(given) else as_text(given, field=spell([str(column)]), where=f"row {place}")


def _column_of(rows: Sequence[Mapping[str, Any]], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    return pa.array(map(score_files.from_json, values) if pa.types.is_floating(field.type) else values, field.type)
