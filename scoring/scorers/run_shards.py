"""Run a scorer over a source, a shard at a time.

Contract: the shard (`shard_rows` consecutive rows) is the unit of work. With a folder, memory holds one shard at a time, and
every shard is on disk before the next one begins: a run that is killed at any moment and started again loses nothing, writes
nothing twice and scores no finished shard again. A run that resumes compares the digests of the rows, which it reads again,
unless the source is a file that has not changed since the run began.

Any number of processes, on any number of machines that share a disk, may run over the same folder. The first one makes the
manifest; each claims a shard before it scores it, and takes over the claims of dead processes (`store.claims`). A process
returns when the shards that it was asked for are done, by whichever process. The one that finds all shards done completes the
folder.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import rows_digest
from sparsort.scoring.data.readers import STRIDE
from sparsort.scoring.data.rows import Row, RowSource
from sparsort.scoring.store.manifest import as_json, load_snapshot, save_snapshot
from sparsort.scoring.store.score_tables import scores_schema
from sparsort.scoring.store.scores import Scores
from sparsort.scoring.store.shards import ShardStore, beginning

SHARD_ROWS = 2048
Outcome = Literal["scored", "kept", "claimed"]


def _ignore(_: Any) -> None:
    pass


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
    """What one call did, and what is done in the score folder.

    Attributes:
        folder: the score folder.
        total: the number of shards of all rows.
        done: the shards that are done, by any process.
        scored: the shards that this call scored.
        kept: the shards that this call was asked for and found done.
        complete: whether all shards are done and listed, so that the scores can be read.
    """

    folder: Path
    total: int
    done: int
    scored: int
    kept: int
    complete: bool

    def load(self) -> Scores:
        """The scores; a `SparsortError` if the folder is not complete."""
        return Scores.load(self.folder)


def run(
    source: RowSource,
    scorer: Job,
    *,
    out: Path | None,
    shard_rows: int = SHARD_ROWS,
    advance: Callable[[int], None] = _ignore,
    note: Callable[[str], None] = _ignore,
    scored: Callable[[pa.Table], None] = _ignore,
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
        reader = _ShardReader(source, _checked_shard_rows(shard_rows))
        tables = []
        for index in range(count_shards(source.count(), shard_rows)):
            tables.append(_score(scorer, reader.read(index), advance))
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
    advance: Callable[[int], None] = _ignore,
    note: Callable[[str], None] = _ignore,
    scored: Callable[[pa.Table], None] = _ignore,
) -> Coverage:
    """Score the shards k, k + n, k + 2n, … of `source` into `out`, for `part` = (k, n); other arguments as for `run`.

    Raises:
        SparsortError: see `run`; or `part` is not 0 <= k < n.
    """
    check_part(part)
    with ShardRun.begin(source, lambda: scorer, out=out, shard_rows=shard_rows, note=note) as shards:
        return shards.run(shards.numbers(part), advance, scored)


def check_part(part: tuple[int, int]) -> None:
    """Raise a `SparsortError` unless `part` is (k, n) with 0 <= k < n."""
    if not (len(part) == 2 and all(type(number) is int for number in part) and 0 <= part[0] < part[1]):
        raise SparsortError(
            f"part is {part}; expected (k, n) with 0 <= k < n, such as (0, 4), the first of four processes."
        )


def cover(store: ShardStore, rows: int, *, scored: int, kept: int) -> Coverage:
    """List the shards in the manifest if all are done, and return the coverage of the folder.

    Args:
        store: the score folder.
        rows: the number of all rows.
        scored, kept: see `Coverage`.
    """
    total, complete = count_shards(rows, store.shard_rows), store.finish(rows)
    done = total if complete else len(store.indices())
    return Coverage(folder=store.folder, total=total, done=done, scored=scored, kept=kept, complete=complete)


def count_rows(numbers: Collection[int], rows: int, shard_rows: int) -> int:
    """The number of rows in some shards.

    Args:
        numbers: different numbers of shards.
        rows: the number of all rows.
        shard_rows: the rows of each shard except the last.
    """
    last = count_shards(rows, shard_rows) - 1
    return len(numbers) * shard_rows - ((last + 1) * shard_rows - rows if last in numbers else 0)


def count_shards(rows: int, shard_rows: int) -> int:
    """The number of shards of some rows."""
    return -(-rows // shard_rows)


class ShardRun:
    """A run over one folder, in one process. Use it as a context manager, or call `close`.

    Attributes:
        store: the score folder.
        total: the number of shards of all rows.
    """

    def __init__(self, source: RowSource, job: Job, store: ShardStore, note: Callable[[str], None]) -> None:
        self.store = store
        self.total = count_shards(source.count(), store.shard_rows)
        self._source, self._job, self._note = source, job, note
        self._reader = _ShardReader(source, store.shard_rows)
        # Finished shards have the rows of a file that has not changed, so the rows need not be read to prove it.
        self._is_same_source = source.restore(load_snapshot(store.folder))

    @classmethod
    def begin(
        cls,
        source: RowSource,
        prepare: Callable[[], Job],
        *,
        out: Path,
        shard_rows: int,
        note: Callable[[str], None] = _ignore,
    ) -> ShardRun:
        """Begin or resume the run in `out`; of several processes, the first calls `prepare` while the others wait.

        Args:
            source, out, shard_rows, note: see `run`.
            prepare: makes the job, with the fitted values in the manifest of `out`, if it has one.
        """
        _checked_shard_rows(shard_rows)
        with beginning(out) as is_first:
            job = prepare()
            store = ShardStore.open(out, provenance=_provenance(source, job), shard_rows=shard_rows)
            if is_first and load_snapshot(out) is None:
                save_snapshot(out, source.snapshot())
        # Counting also reads and checks the whole source before anything is scored.
        store.refuse_beyond(source.count())
        return cls(source, job, store, note)

    def __enter__(self) -> ShardRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what other processes can see of this one."""
        self.store.close()

    def suspend(self) -> None:
        """Close the file of the rows, and end the thread of the claims, until the next shard."""
        self._reader = _ShardReader(self._source, self.store.shard_rows)
        self.store.claims.close()

    def numbers(self, part: tuple[int, int] = (0, 1)) -> range:
        """The numbers of the shards of a part."""
        return range(part[0], self.total, part[1])

    def run(
        self,
        numbers: Iterable[int],
        advance: Callable[[int], None] = _ignore,
        scored: Callable[[pa.Table], None] = _ignore,
    ) -> Coverage:
        """Return when all of these shards are done, by this process or by another; `advance` and `scored` are those of `run`."""
        outcomes: dict[Outcome, int] = {"scored": 0, "kept": 0, "claimed": 0}
        waiting, is_waiting = list(numbers), False
        while waiting:
            claimed = []
            for index in waiting:
                outcome = self.score_shard(index, advance, scored)
                outcomes[outcome] += 1
                if outcome == "claimed":
                    claimed.append(index)
            if claimed:
                if not is_waiting:
                    self._note(f"waiting for {len(claimed)} shard(s) that other processes have claimed.")
                is_waiting = True
                self.store.claims.pause()
            waiting = claimed
        return cover(self.store, self._source.count(), scored=outcomes["scored"], kept=outcomes["kept"])

    def score_shard(
        self,
        index: int,
        advance: Callable[[int], None] = _ignore,
        scored: Callable[[pa.Table], None] = _ignore,
    ) -> Outcome:
        """Score one shard, unless it is done or claimed by another process."""
        if self._is_done(index, advance, self._note):
            return "kept"
        with self.store.claimed(index) as is_ours:
            if not is_ours:
                return "claimed"
            # Another process may have finished it before this one made its claim.
            if self._is_done(index, advance, _ignore):
                return "kept"
            rows = self._reader.read(index)
            table = _score(self._job, rows, advance)
            self.store.write(index, table, _digest_of(rows))
            scored(table)
        return "scored"

    def _is_done(self, index: int, advance: Callable[[int], None], note: Callable[[str], None]) -> bool:
        if not self.store.path(index).exists():
            return False
        digest = None if self._is_same_source else _digest_of(self._reader.read(index))
        if not self.store.is_done(index, digest, note):
            return False
        begin = index * self.store.shard_rows
        advance(min(self.store.shard_rows, self._source.count() - begin))
        return True


class _ShardReader:
    """Reads the rows of shards. Shards in ascending order are streamed, others are sought."""

    def __init__(self, source: RowSource, shard_rows: int) -> None:
        self._source, self._shard_rows = source, shard_rows
        self._rows: Iterator[Row] = iter(())
        # The position of the next row of the stream; beyond every source before the first shard.
        self._next = source.count() + STRIDE
        self._last: tuple[int, list[Row]] = (-1, [])

    def read(self, index: int) -> list[Row]:
        """The rows of shard `index`."""
        if self._last[0] == index:
            return self._last[1]
        begin = index * self._shard_rows
        # Seeking reads up to `STRIDE` records too, so a short distance is skipped in the stream.
        if not 0 <= begin - self._next <= STRIDE:
            self._rows, self._next = self._source.rows(begin), begin
        self._last = (-1, [])
        rows = list(itertools.islice(self._rows, begin - self._next, begin - self._next + self._shard_rows))
        self._next = begin + len(rows)
        self._last = (index, rows)
        return rows


def _checked_shard_rows(shard_rows: int) -> int:
    if shard_rows < 1:
        raise SparsortError(f"shard_rows is {shard_rows}; expected at least 1.")
    return shard_rows


def _digest_of(rows: Iterable[Row]) -> str:
    return rows_digest((row.id, row.digest) for row in rows)


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
