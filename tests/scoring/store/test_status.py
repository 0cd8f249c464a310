"""`scoring.store.status` and the logs that it reads: who has done what, without opening a shard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from command_line import run

from sparsort.errors import SparsortError
from sparsort.scoring.store import shards as module
from sparsort.scoring.store.claims import Claims, Owner, this_process
from sparsort.scoring.store.manifest import WORKERS, load_snapshot, save_snapshot
from sparsort.scoring.store.shards import ShardStore
from sparsort.scoring.store.status import read_status
from sparsort.scoring.store.work_log import read_logs

ELSEWHERE = Owner(host="node7", machine="other boot", pid=77, start="1", since=1e9)


def table(rows: int, **columns: list[Any]) -> pa.Table:
    return pa.table({"position": list(range(rows)), "id": [f"q{n}" for n in range(rows)], **columns})


def begin(folder: Path) -> ShardStore:
    return ShardStore.open(folder, provenance={"scorer": "length"}, shard_rows=4)


def silent(_sentence: str) -> None:
    pass


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    """A folder of 10 rows with two of three shards."""
    store = begin(tmp_path / "scores")
    save_snapshot(store.folder, {"rows": 10})
    store.write(0, table(4, status=["ok", "empty", "ok", "too_long"]), "d0")
    store.write(2, table(2, status=["ok", "empty"]), "d2")
    return store


def test_the_status_of_an_unfinished_folder(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.claimed(1):
        Claims(store.folder / WORKERS, owner=ELSEWHERE)._take("00007")
        for path in store.folder.glob("shard-*"):
            # No shard is opened.
            path.write_bytes(b"damaged")
        status = read_status(store.folder)
        shown = run("status", store.folder).stdout
        printed = json.loads(run("status", store.folder, "--json").stdout)
    assert (status.done, status.total, status.rows, status.complete) == (2, 3, 10, False)
    assert status.unscored == {"empty": 2, "too_long": 1}
    (worker,) = status.workers
    assert (worker.owner, worker.state, worker.shards, worker.rows) == (this_process(), "alive", 2, 6)
    assert [(claim.name, claim.owner, claim.state) for claim in status.claims] == [
        ("00001", this_process(), "alive"),
        ("00007", ELSEWHERE, "unknown"),
    ]
    assert "2 of 3 shards are done. The run is not complete." in shown
    assert "Rows without a score: 2 empty, 1 too_long." in shown
    assert "node7 77" in shown
    assert printed["claims"][1]["owner"]["host"] == "node7"
    with pytest.raises(SparsortError, match="is not a score folder"):
        read_status(store.folder.parent)


def test_a_finished_folder_has_only_its_manifest(store: ShardStore) -> None:
    store.write(1, table(4), "d1")
    assert store.finish(10)
    status = read_status(store.folder)
    assert (status.done, status.total, status.rows, status.complete) == (3, 3, 10, True)
    assert (status.workers, status.claims) == ((), ())


def test_a_logged_shard_is_not_opened_unless_it_was_written_since(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = module.read_seal_and_record
    monkeypatch.setattr(module, "read_seal_and_record", lambda path: opened.append(path.name) or real(path))
    again = begin(store.folder)
    assert again.logged() == {0, 2}
    assert again.is_done(0, "d0", silent)
    with pytest.raises(SparsortError, match=r"the data has changed since shard-00002\.parquet was scored"):
        again.is_done(2, "other", silent)
    assert opened == []
    path = store.path(2)
    path.write_bytes(path.read_bytes()[:-1])
    damaged: list[str] = []
    again = begin(store.folder)
    assert again.logged() == {0}
    assert not again.is_done(2, "d2", damaged.append)
    assert opened == ["shard-00002.parquet"]
    assert "shard-00002.parquet is damaged" in damaged[0]


def test_a_damaged_log_is_a_shorter_log(store: ShardStore) -> None:
    (path,) = (store.folder / WORKERS).glob("log-*")
    whole = path.read_bytes()
    ((owner, shards),) = read_logs(store.folder / WORKERS)
    assert (owner, [done.shard for done in shards]) == (this_process(), [0, 2])
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        logs = list(read_logs(store.folder / WORKERS))
        assert all(log == shards[: len(log)] for _, log in logs)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert {done for _, log in read_logs(store.folder / WORKERS) for done in map(str, log)} <= set(map(str, shards))
        assert begin(store.folder).is_done(0, "d0", silent)


def test_a_snapshot_vouches_only_for_shards_that_were_scored_after_it(store: ShardStore) -> None:
    save_snapshot(store.folder, {"rows": 11})
    assert load_snapshot(store.folder) == {"rows": 10}
    path = store.folder / WORKERS / "rows.json"
    path.write_text(path.read_text().replace("10", "12"))
    assert load_snapshot(store.folder) is None
    assert load_snapshot(store.folder / "nowhere") is None


def test_the_owner_of_a_log_is_read_back() -> None:
    assert Owner.read(dataclasses.asdict(ELSEWHERE)) == ELSEWHERE
    assert Owner.read({"host": "x"}) is None
