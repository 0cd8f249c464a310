"""Run a scorer over a source, a shard at a time, in this process.

Contract: the shard (`shard_rows` consecutive rows) is the unit of work. With a folder, memory holds one shard at a time, and
every shard is on disk before the next one begins: a run that is killed at any moment and started again loses nothing, writes
nothing twice and scores no finished shard again. A run that resumes reads the source from the beginning, because only the
digests of the rows prove that they have not changed.

For several machines, call `run_part(…, part=(k, n))` in process k of n (an array job, or torchrun's rank and world size), all
with the same `out` on a shared disk. The process that ends last, or any later `run`, completes the folder.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import Row, RowSource, rows_digest
from sparsort.scoring.store.score_tables import scores_schema
from sparsort.scoring.store.scores import Scores
from sparsort.scoring.store.shards import ShardStore, as_json

SHARD_ROWS = 2048


class Job(Protocol):
    """Scores shards of one source under one request.

    Attributes:
        provenance: JSON values: everything that can change a score, and under "environment" facts that are recorded but
            never compared.
        metrics: the names of the table's metric columns.
    """

    provenance: dict[str, Any]
    metrics: Sequence[str]

    @abstractmethod
    def score_rows(self, rows: Sequence[Row], advance: Callable[[int], None]) -> pa.Table:
        """Return the `score_table` of these rows, in their order; call `advance(n)` whenever n more rows are scored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The work of one process: shards scored now, shards kept from an earlier run, and whether the folder is complete."""

    scored: int
    kept: int
    complete: bool


def run(
    source: RowSource,
    scorer: Job,
    *,
    out: Path | None,
    shard_rows: int = SHARD_ROWS,
    advance: Callable[[int], None] = lambda _count: None,
    note: Callable[[str], None] = lambda _sentence: None,
    scored: Callable[[pa.Table], None] = lambda _table: None,
) -> Scores:
    """Score every row of `source`.

    Args:
        source: the rows.
        scorer: the job that scores them.
        out: the score folder, new or begun; None keeps the table in memory.
        shard_rows: rows per shard.
        advance: called with a number of rows whenever they are done, including rows that were already on disk.
        note: called with a sentence about an event that the user should know of but that is no error, such as a damaged
            shard.
        scored: called with the table of every shard that was scored now.

    Returns:
        The scores; with `out`, columns are read from the folder when they are first used.

    Raises:
        SparsortError: see `ShardStore.open` and `ShardStore.is_done`.
    """
    if out is None:
        tables = []
        for _, rows in _shards(source, shard_rows):
            tables.append(_score(scorer, rows, advance))
            scored(tables[-1])
        return Scores(pa.concat_tables(tables), _provenance(source, scorer))
    run_part(source, scorer, out=out, part=(0, 1), shard_rows=shard_rows, advance=advance, note=note, scored=scored)
    return Scores.load(out)


def run_part(
    source: RowSource,
    scorer: Job,
    *,
    out: Path,
    part: tuple[int, int],
    shard_rows: int = SHARD_ROWS,
    advance: Callable[[int], None] = lambda _count: None,
    note: Callable[[str], None] = lambda _sentence: None,
    scored: Callable[[pa.Table], None] = lambda _table: None,
) -> Coverage:
    """Score the shards k, k + n, k + 2n, … of `source` into `out`, for `part` = (k, n); other arguments as for `run`.

    Raises:
        SparsortError: see `run`; or `part` is not 0 <= k < n.
    """
    if not 0 <= part[0] < part[1]:
        raise SparsortError(
            f"part is {part}; expected (k, n) with 0 <= k < n, such as (0, 4), the first of four processes."
        )
    store = ShardStore.open(out, provenance=_provenance(source, scorer), shard_rows=shard_rows, part=part)
    # Counting also reads and checks the whole source before anything is scored.
    store.refuse_beyond(source.count())
    new = kept = 0
    for index, rows in _shards(source, shard_rows, part):
        digest = rows_digest((row.id, row.digest) for row in rows)
        if store.is_done(index, digest, note):
            kept += 1
            advance(len(rows))
        else:
            table = _score(scorer, rows, advance)
            store.write(index, table, digest)
            scored(table)
            new += 1
    return Coverage(scored=new, kept=kept, complete=store.finish(source.count()))


def _shards(source: RowSource, shard_rows: int, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, list[Row]]]:
    if shard_rows < 1:
        raise SparsortError(f"shard_rows is {shard_rows}; expected at least 1.")
    if part[1] == 1:
        # A single process streams the source once, instead of seeking to the beginning of every shard.
        rows = source.rows()
        for index in itertools.count():
            if not (shard := list(itertools.islice(rows, shard_rows))):
                return
            yield index, shard
    for begin in range(part[0] * shard_rows, source.count(), part[1] * shard_rows):
        yield begin // shard_rows, list(itertools.islice(source.rows(begin), shard_rows))


def _score(scorer: Job, rows: Sequence[Row], advance: Callable[[int], None]) -> pa.Table:
    table = scorer.score_rows(rows, advance)
    # A scorer may come from outside this package: a shard with other rows or columns must not reach the disk.
    same_rows = table["position"].to_pylist() == [row.position for row in rows]
    if not same_rows or not table.schema.equals(scores_schema(scorer.metrics)):
        raise SparsortError(
            f"{type(scorer).__name__}.score_rows gave a table that is not that of its {len(rows)} rows in order, "
            "with the columns of scores_schema(metrics). This is a fault of the scorer; score_table makes such a table."
        )
    return table


def _provenance(source: RowSource, scorer: Job) -> dict[str, Any]:
    return as_json(
        {**scorer.provenance, "source": source.name, "id_column": source.id_column, "content": source.content}
    )
