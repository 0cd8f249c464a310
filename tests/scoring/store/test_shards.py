"""`scoring.store.shards`: a shard is whole or absent, and a folder of other settings or other data is refused by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handshake import Child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.scoring.data.digests import rows_digest
from sparsort.scoring.store import shards
from sparsort.scoring.store.shards import ShardStore

PROVENANCE: dict[str, Any] = {
    "scorer": "sparsity",
    "outliers": {"rule": "widest", "n": 4},
    "layers": (1, 2),
    "source": "rows.jsonl",
    "environment": {"torch": "2.13.0", "threads": 2},
}
TABLE = pa.table({"position": list(range(100)), "id": [f"q{i}" for i in range(100)], "gini": [0.1] * 100})
DEAD = 2**22 + 1  # above any process id that Linux gives


def begin(folder: Path, **changes: Any) -> ShardStore:
    return ShardStore.open(folder, provenance={**PROVENANCE, **changes}, shard_rows=100)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def silent(_sentence: str) -> None:
    pass


def test_an_unfinished_run_is_continued(tmp_path: Path) -> None:
    store = begin(tmp_path / "a" / "b")
    assert not store.is_done(0, "d0", silent)
    store.write(0, TABLE, "d0")
    again = begin(tmp_path / "a" / "b", source="moved.jsonl", environment={"torch": "9"}, layers=[1, 2])
    assert again.is_done(0, "d0", silent)
    assert not again.is_done(1, "d1", silent)
    assert again.provenance["source"] == "rows.jsonl"
    assert not again.finish(150)
    again.write(1, TABLE.slice(0, 50), "d1")
    assert again.finish(150)
    complete = ShardStore.complete(tmp_path / "a" / "b")
    assert complete.num_rows == 150
    assert complete.column_names == TABLE.column_names
    assert complete.select(["id"]).equals(pa.concat_tables([TABLE, TABLE.slice(0, 50)]).select(["id"]))
    assert [table.num_rows for table in complete.tables()] == [100, 50]
    manifest = json.loads((complete.folder / "manifest.json").read_text())
    assert [(shard["index"], shard["rows"], shard["digest"]) for shard in manifest["shards"]] == [
        (0, 100, "d0"),
        (1, 50, "d1"),
    ]
    begin(tmp_path / "a" / "b")
    assert json.loads((complete.folder / "manifest.json").read_text()) == manifest


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(SparsortError) as caught:
        ShardStore.open(
            tmp_path,
            provenance={**PROVENANCE, "outliers": {"rule": "widest", "n": 2}, "prompt": "{q}", "layers": None},
            shard_rows=200,
        )
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        "  shard_rows: 100 → 200",
        "  outliers.n: 4 → 2",
        "  layers: [1, 2] → null",
        '  prompt: absent → "{q}"',
    ]
    assert "--out" in lines[-1]


def test_a_folder_of_something_else_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SparsortError, match=r"is not a score folder: it contains thesis\.tex, but no manifest"):
        begin(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]
    store = begin(tmp_path / "scores")
    store.write(0, TABLE, "d0")
    (tmp_path / "scores" / "manifest.json").unlink()
    with pytest.raises(SparsortError, match=r"contains shard-00000.parquet, but no manifest"):
        begin(tmp_path / "scores")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "sparsort-scores", "ver', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("[]", "was not written by sparsort score"),
        ('{"name": "web app"}', "was not written by sparsort score"),
        ('{"format": "sparsort-scores", "version": 3}', "has format version 3; this sparsort reads 1 and 2. Update"),
        ('{"format": "sparsort-scores"}', "is damaged: it has no format version. Delete .* to score again"),
        ('{"format": "sparsort-scores", "version": "2"}', "its format version is '2', not a whole number"),
        ('{"format": "sparsort-scores", "version": true}', "its format version is True, not a whole number"),
        ('{"format": "sparsort-scores", "version": 1}', "lacks the settings of the run"),
        ('{"format": "sparsort-scores", "version": 2, "shard_rows": 100, "provenance": {}}', "content has changed"),
    ],
)
def test_a_bad_manifest_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SparsortError, match=message):
        begin(tmp_path)
    with pytest.raises(SparsortError, match=message):
        ShardStore.complete(tmp_path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_shard_is_not_done(data: st.DataObject, tmp_path: Path) -> None:
    store = begin(tmp_path)
    store.write(0, TABLE, "d0")
    path = store.path(0)
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        damaged = bytearray(whole)
        damaged[data.draw(st.integers(0, pages - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
    notes: list[str] = []
    if store.is_done(0, "d0", notes.append):
        assert next(store.tables()).equals(TABLE)
    else:
        assert "scored again" in notes[0]


def test_a_shard_of_other_rows_or_settings_is_refused(tmp_path: Path) -> None:
    store = begin(tmp_path / "a")
    store.write(1, TABLE, "d1")
    with pytest.raises(SparsortError, match=r"data has changed since shard-00001.parquet was scored: rows 100 to 199"):
        store.is_done(1, "other", silent)
    other = begin(tmp_path / "b", scorer="entropy")
    other.path(1).write_bytes(store.path(1).read_bytes())
    with pytest.raises(SparsortError, match="scored with other settings"):
        other.is_done(1, "d1", silent)
    pq.write_table(TABLE, store.path(2))
    notes: list[str] = []
    assert not store.is_done(2, "d2", notes.append)
    assert "it was not written by sparsort" in notes[0]


def test_shards_beyond_the_data_are_refused(tmp_path: Path) -> None:
    store = begin(tmp_path)
    store.write(2, TABLE, "d2")
    for call in (store.refuse_beyond, store.finish):
        with pytest.raises(
            SparsortError, match=r"has become shorter: .* up to shard-00002.parquet, but 200 rows fill 2"
        ):
            call(200)
    store.refuse_beyond(201)


def test_an_unfinished_folder_is_not_read(tmp_path: Path) -> None:
    store = begin(tmp_path)
    store.write(0, TABLE, "d0")
    with pytest.raises(SparsortError, match=r"not complete \(1 shard\(s\) so far\). Run the same command again"):
        ShardStore.complete(tmp_path)
    store.finish(100)
    complete = ShardStore.complete(tmp_path)
    complete.path(0).write_bytes(b"PAR1")
    with pytest.raises(SparsortError, match=r"cannot be read.*scores damaged shards again"):
        list(complete.tables())
    complete.path(0).unlink()
    with pytest.raises(SparsortError, match=r"lacks shard-00000.parquet"):
        ShardStore.complete(tmp_path)


def test_leftovers_of_killed_runs_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path)
    ours = [f".shard-00000.parquet.{DEAD}.tmp", f".shard-00003.parquet.{DEAD}.tmp", f".manifest.json.{DEAD}.tmp"]
    running = f".shard-00001.parquet.{os.getppid()}.tmp"
    others = ["notes.txt", ".hidden.1.tmp", f"shard-00000.parquet.{DEAD}.tmp"]
    for name in [*ours, running, *others]:
        (tmp_path / name).write_text("x")
    # A process of another machine may be writing such a file, so one is removed with its shard, or with the whole run.
    store = begin(tmp_path)
    assert set(names(tmp_path)) == {"manifest.json", *ours, running, *others}
    store.write(0, TABLE, "d0")
    store.close()
    kept = {"manifest.json", "shard-00000.parquet", running, *others}
    assert set(names(tmp_path)) == {"workers", *ours[1:], *kept}
    assert store.finish(100)
    assert set(names(tmp_path)) == kept


def test_a_first_run_that_was_killed_is_continued(tmp_path: Path) -> None:
    (tmp_path / f".manifest.json.{DEAD}.tmp").write_text("{")
    store = begin(tmp_path)
    store.write(0, TABLE, "d0")
    assert store.finish(100)
    assert names(tmp_path) == ["manifest.json", "shard-00000.parquet"]


def no_links(*_paths: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_second_process_is_refused(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    real = shards.refuse_foreign

    def first(folder: Path) -> None:
        """Another process makes the manifest after this one has seen that there is none."""
        monkeypatch.setattr(shards, "refuse_foreign", real)
        begin(folder, scorer="entropy")

    monkeypatch.setattr(shards, "refuse_foreign", first)
    real_exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self.name != "manifest.json" and real_exists(self))
    with pytest.raises(SparsortError, match='scorer: "entropy" → "sparsity"'):
        begin(tmp_path)
    assert begin(tmp_path, scorer="entropy").provenance["scorer"] == "entropy"
    assert names(tmp_path) == ["manifest.json"]


# Two such processes begin in the same 30 folders, each when the test lets both go; argv: folder, own name, links.
_RACER = """
import os, sys
from pathlib import Path
from handshake import hold
from sparsort.errors import SparsortError
from sparsort.scoring.store.shards import ShardStore

folder, own, has_links = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"

def no_links(*paths):
    raise OSError(1, "Operation not permitted")

if not has_links:
    os.link = no_links
for at in range(30):
    hold("ready")
    try:
        ShardStore.open(folder / f"out{at}", provenance={"scorer": own}, shard_rows=100)
        print(own, flush=True)
    except SparsortError as error:
        print("refused", flush=True)
"""


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_simultaneous_processes_one_wins(has_links: bool, tmp_path: Path) -> None:
    with Child(_RACER, tmp_path, "a", has_links) as one, Child(_RACER, tmp_path, "b", has_links) as other:
        for at in range(30):
            assert (one.line(), other.line()) == ("ready", "ready")
            one.go()
            other.go()
            pair = (one.line(), other.line())
            assert pair in (("a", "refused"), ("refused", "b"))
            manifest = json.loads((tmp_path / f"out{at}" / "manifest.json").read_text())
            assert manifest["provenance"]["scorer"] in pair
            assert names(tmp_path / f"out{at}") == ["manifest.json"]


def test_shards_of_other_settings_are_not_finished(tmp_path: Path) -> None:
    ours, other = begin(tmp_path / "a"), begin(tmp_path / "b", scorer="entropy")
    ours.write(0, TABLE, "d0")
    other.write(1, TABLE, "d1")
    ours.path(1).write_bytes(other.path(1).read_bytes())
    with pytest.raises(SparsortError, match=r"shard-00001.parquet was scored with other settings"):
        ours.finish(200)
    pq.write_table(TABLE, ours.path(1))
    assert not ours.finish(200)
    with pytest.raises(SparsortError, match="not complete"):
        ShardStore.complete(tmp_path / "a")


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begin(tmp_path)
    store.write(0, TABLE, "d0")

    def full(_table: pa.Table, path: Path, **_options: Any) -> None:
        path.write_bytes(b"PAR1 and then no more")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(SparsortError, match=r"cannot write .*shard-00001.parquet: the disk is full.*finished work"):
            store.write(1, TABLE, "d1")
    assert names(tmp_path) == ["manifest.json", "shard-00000.parquet", "workers"]
    assert begin(tmp_path).is_done(0, "d0", silent)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsortError, match=r"cannot write .*a part of this path is a file"):
        begin(tmp_path / "file" / "scores")
    with pytest.raises(SparsortError, match=r"cannot write .*file"):
        begin(tmp_path / "file")
    begin(tmp_path / "scores")

    def refuse(self: Path, *_args: Any, **_options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(SparsortError, match=r"cannot write .*read-only"):
        begin(tmp_path / "scores")


def test_provenance_has_to_be_json(tmp_path: Path) -> None:
    for value in (object(), float("nan"), {1, 2}):
        with pytest.raises(SparsortError, match="not made of JSON values"):
            begin(tmp_path / "a", extra=value)
    with pytest.raises(SparsortError, match="shard_rows is 0"):
        ShardStore.open(tmp_path / "a", provenance={}, shard_rows=0)
    assert not (tmp_path / "a").exists()


def test_the_digest_of_rows_depends_on_ids_contents_and_order() -> None:
    ways = [[("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")], [("a", "1")], [("ab", "12")], [("a1", "b2")], []]
    assert len({rows_digest(rows) for rows in ways}) == len(ways)
