"""The state of a score folder: what is done, by which processes, and what is claimed.

Contract: no shard is opened and nothing is written, so this takes at most two seconds for 100,000 shards. Of a finished folder
only the manifest is left, and it does not say who made the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsort.scoring.store.claims import Claim, Owner, State, read_claims
from sparsort.scoring.store.manifest import WORKERS, load_snapshot, read_manifest, shard_numbers
from sparsort.scoring.store.work_log import read_logs


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """A process that has finished shards of an unfinished run.

    Attributes:
        owner: the process, and since when it has worked.
        state: whether it still runs.
        shards: the number of shards that it finished.
        rows: the number of rows in them.
        last: the wall time at which it finished the last one, in seconds since 1970.
    """

    owner: Owner
    state: State
    shards: int
    rows: int
    last: float


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a score folder.

    Attributes:
        folder: the folder.
        complete: whether the run is finished.
        done: the number of shards that are done.
        total: the number of all shards; None if the run has not counted its rows yet.
        rows: the number of all rows; None likewise.
        unscored: the number of rows with each status other than "ok", of the shards in the logs.
        workers: the processes that finished shards, the latest first.
        claims: what processes have claimed.
    """

    folder: Path
    complete: bool
    done: int
    total: int | None
    rows: int | None
    unscored: Mapping[str, int] = field(default_factory=dict)
    workers: tuple[WorkerStatus, ...] = ()
    claims: tuple[Claim, ...] = ()


def read_status(folder: Path) -> Status:
    """Read the state of a score folder.

    Raises:
        SparsortError: it is not a score folder, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    if "shards" in manifest:
        done = len(manifest["shards"])
        return Status(folder=folder, complete=True, done=done, total=done, rows=manifest.get("rows"))
    snapshot = load_snapshot(folder)
    rows = snapshot["rows"] if snapshot is not None else None
    unscored: Counter[str] = Counter()
    workers = []
    for owner, log in read_logs(folder / WORKERS):
        for shard in log:
            if shard.unscored:
                unscored.update(shard.unscored)
        n_rows, last = sum(shard.rows for shard in log), max((shard.at for shard in log), default=owner.since)
        workers.append(WorkerStatus(owner=owner, state=owner.state(), shards=len(log), rows=n_rows, last=last))
    return Status(
        folder=folder,
        complete=False,
        done=len(shard_numbers(folder)),
        total=None if rows is None else -(-rows // manifest["shard_rows"]),
        rows=rows,
        unscored=dict(sorted(unscored.items())),
        workers=tuple(sorted(workers, key=lambda worker: -worker.last)),
        claims=tuple(read_claims(folder / WORKERS)),
    )
