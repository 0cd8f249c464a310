"""`curriculum.ablation.store.store`: acknowledged outcomes are kept through kills, damage and concurrent runs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from handshake import Child
from outcome_stores import FEATURES, GROUP, IDENTITY, blocks, grid, make, outcomes, rows

from sparsort.curriculum.ablation.store.store import OutcomeStore
from sparsort.errors import SparsortError


def python(script: str, *arguments: object, cwd: Path) -> Child:
    prelude = (
        "import itertools, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from handshake import die_in, hold\n"
        "from sparsort.errors import SparsortError\n"
        "from sparsort.curriculum.ablation.store.store import OutcomeStore, Outcomes\n"
        f"FEATURES = {FEATURES!r}\n"
        f"IDENTITY = {IDENTITY!r}\n"
    )
    return Child(prelude + script, *arguments, cwd=cwd)


# Damage


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flipped_at_the_end(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 4]) + content[-19:]


def emptied(_content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, flipped_at_the_end, emptied])
def test_a_damaged_block_is_set_aside_and_its_pairs_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    store = make(tmp_path)
    for i in range(3):
        store.write(GROUP, outcomes(grid(f"p{i}", 4), seed=i))
    victim = blocks(store)[1]
    content = damage(victim.read_bytes())
    victim.write_bytes(content)
    with caplog.at_level(logging.WARNING, "sparsort"):
        found = make(tmp_path).read(GROUP)
    assert found.pairs() == grid("p0", 4) + grid("p2", 4)
    assert [record.name for record in caplog.records] == ["sparsort"]
    assert victim.name in caplog.text
    assert "set aside" in caplog.text
    assert [path.read_bytes() for path in blocks(store, "broken")] == [content]
    assert store.missing(GROUP, grid("p1", 4)) == grid("p1", 4)
    assert store.summary().broken == 1
    store.write(GROUP, outcomes(grid("p1", 4), seed=1))
    assert store.missing(GROUP, grid("p1", 4)) == []
    assert len(caplog.records) == 1


def test_a_damaged_file_that_cannot_be_renamed_is_skipped_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 2)))
    store.write(GROUP, outcomes(grid("r", 2)))
    blocks(store)[0].write_bytes(b"PAR1")

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    assert store.read(GROUP).pairs() == grid("r", 2)
    assert "renaming it failed: Read-only file system" in caplog.text


def test_a_whole_block_that_pyarrow_cannot_read_is_an_error_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 2)))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("Support for codec 'zstd' not built")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(SparsortError, match=r"is intact, but pyarrow .* codec"):
        store.read(GROUP)
    assert len(blocks(store)) == 1


def test_a_block_that_the_disk_cannot_read_is_an_error_and_stays(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 2)))
    folder = blocks(store)[0].with_name("block-000007-000001-00000000-0000000000000000.parquet")
    folder.mkdir()
    with pytest.raises(SparsortError, match=r"cannot read .*Is a directory"):
        store.read(GROUP)
    assert folder.is_dir()


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(SparsortError, match=r"cannot write .*(in the way|is a file)"):
            make(folder)
    store = make(tmp_path / "store")
    (tmp_path / "store" / "groups").touch()
    for act in (lambda: store.write(GROUP, outcomes(grid("p", 1))), lambda: store.put_note(GROUP, "n", 1)):
        with pytest.raises(SparsortError, match="cannot write"):
            act()
    with pytest.raises(SparsortError, match="cannot write"), store.claim(GROUP):
        pass
    assert len(store.read(GROUP)) == 0


def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    store = make(tmp_path)
    (tmp_path / "groups" / "g" / ".lock").mkdir(parents=True)
    with pytest.raises(SparsortError, match=r"cannot write .*\.lock"), store.claim("g"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_after_a_full_disk_what_was_stored_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = make(tmp_path)
    store.write(GROUP, outcomes(grid("p", 3)))
    store.put_note(GROUP, "n", [1])
    before = sorted(tmp_path.rglob("*"))

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for act in (
            lambda: store.write(GROUP, outcomes(grid("r", 3))),
            lambda: store.put_note(GROUP, "n", [2]),
            lambda: store.compact(GROUP) and store.write("new", outcomes(grid("r", 3))),
        ):
            with pytest.raises(SparsortError, match="cannot write"):
                act()
    assert [path for path in sorted(tmp_path.rglob("*.*")) if path.suffix in {".parquet", ".json", ".tmp"}] == [
        path for path in before if path.suffix in {".parquet", ".json"}
    ]
    assert make(tmp_path).read(GROUP).pairs() == grid("p", 3)
    assert store.get_note(GROUP, "n") == [1]
    store.write(GROUP, outcomes(grid("r", 3)))
    assert store.missing(GROUP, grid("r", 3)) == []


LIMITED = """
import resource
store = OutcomeStore.existing(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
n, rng = 5000, np.random.default_rng(0)
try:
    store.write("g", Outcomes(prefix=["r"] * n, query=[f"q{i}" for i in range(n)], log_p=rng.normal(size=(n, 2)),
                              n_tokens=np.ones((n, 2)), features=rng.normal(size=(n, 3))))
except SparsortError as error:
    print(error)
"""


def test_a_file_that_the_system_does_not_let_grow_is_an_error(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.write("g", outcomes(grid("p", 3)))
    process = python(LIMITED, store.folder, cwd=tmp_path)
    out, _ = process.communicate()
    assert "cannot write" in out
    assert "larger than this process may write (ulimit -f)" in out
    assert store.read("g").pairs() == grid("p", 3)
    assert sorted(path.suffix for path in (store.folder / "groups" / "g").iterdir()) == [".parquet"]


# Kills, and processes at once

# Writes without end; argv: folder, own name, whether it compacts, and the function call at which it dies (0: it does not).
WRITER = """
store = OutcomeStore(Path(sys.argv[1]), IDENTITY, feature_names=FEATURES)
me, compacts, moment = sys.argv[2], sys.argv[3] == "compacts", int(sys.argv[4])
hold("ready")
if moment:
    die_in(moment)
for batch in itertools.count():
    n = 1 + batch % 7
    value = np.full((n, 2), -float(batch), np.float32)
    store.write("g", Outcomes(prefix=[f"{me}-{batch}"] * n, query=[f"q{i}" for i in range(n)], log_p=value,
                              n_tokens=np.ones((n, 2), int), features=np.full((n, 3), np.nan)))
    print(batch, flush=True)
    if compacts and batch % 3 == 2:
        store.compact("g")
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(0)
    folder = tmp_path / "store"
    acknowledged: dict[str, int] = {}
    for turn in range(2):
        # First at a function call, of which a batch takes about 450; then from outside, also between the writes of C++.
        moments = [rng.randrange(1, 5000) if turn == 0 else 0 for _ in range(3)]
        writers = {
            f"w{turn}{i}": python(WRITER, folder, f"w{turn}{i}", ["compacts", "writes"][i % 2], moment, cwd=tmp_path)
            for i, moment in enumerate(moments)
        }
        for writer in writers.values():
            assert writer.line() == "ready"
        for writer in writers.values():
            writer.go()
        for (name, writer), moment in zip(writers.items(), moments, strict=True):
            written = [] if moment else [int(writer.line()) for _ in range(rng.randrange(1, 8))]
            if not moment:
                writer.kill()
            assert writer.stdout is not None
            with writer:
                written += [int(entry) for entry in writer.stdout.read().split()]
                assert writer.was_killed()
            assert written == list(range(len(written)))
            acknowledged[name] = len(written)
    store = make(folder)
    found = store.read("g")
    held = rows(found)
    batches = {prefix: 0 for prefix, _ in held}
    for i, (prefix, _) in enumerate(found.pairs()):
        batches[prefix] += 1
        assert found.log_p[i].tolist() == [-float(prefix.split("-")[1])] * 2
    for prefix, count in batches.items():
        assert count == 1 + int(prefix.split("-")[1]) % 7
    for name, batch_count in acknowledged.items():
        for batch in range(batch_count):
            assert f"{name}-{batch}" in batches
    assert len(batches) - sum(acknowledged.values()) <= len(acknowledged)
    assert blocks(store, "broken") == []
    assert caplog.records == []
    with store.claim("g") as ours:
        assert ours


@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "at once"])
def test_a_kill_while_blocks_are_merged_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    class Killed(BaseException):
        pass

    unlink = Path.unlink
    for survivor in range(6):
        store = make(tmp_path / str(survivor))
        for i in range(5):
            store.write(GROUP, outcomes(grid("p", 2 + i), seed=i))
        if at_once:  # writers that listed the same blocks gave the same number
            for block in blocks(store):
                block.rename(block.with_name(f"block-000000-{block.name.split('-', 2)[2]}"))
        before, calls = rows(store.read(GROUP)), iter(range(100))

        def kill(path: Path, missing_ok: bool = False, limit: int = survivor, calls: Iterator[int] = calls) -> None:
            if path.suffix == ".parquet" and next(calls) == limit:
                raise Killed
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", kill)
            if survivor < 5:
                with pytest.raises(Killed):
                    store.compact(GROUP)
            else:
                assert store.compact(GROUP)
        assert len(blocks(store)) == 6 - survivor
        assert rows(make(store.folder).read(GROUP)) == before
        assert store.compact(GROUP)
        assert [block.name.split("-")[1] for block in blocks(store)] == ["000000"]
        assert rows(store.read(GROUP)) == before


def test_a_reader_never_sees_less_while_blocks_are_merged(fsyncless: None, tmp_path: Path) -> None:
    store, written, failed = make(tmp_path), 0, []
    done = threading.Event()

    def merge() -> None:
        try:
            while not done.is_set():
                make(tmp_path).compact(GROUP)
        except BaseException as error:  # noqa: BLE001 (reported to the test below)
            failed.append(error)

    thread = threading.Thread(target=merge)
    thread.start()
    try:
        for i in range(40):
            store.write(GROUP, outcomes([(f"p{i}", "q")], seed=i))
            written += 1
            assert len(store.read(GROUP)) == written
            assert store.missing(GROUP, [(f"p{j}", "q") for j in range(written + 1)]) == [(f"p{written}", "q")]
    finally:
        done.set()
        thread.join()
    assert failed == []


CREATOR = """
hold("ready")
try:
    store = OutcomeStore(Path(sys.argv[1]), {**IDENTITY, "weights": sys.argv[2]}, feature_names=FEATURES)
    store.write("g", Outcomes(prefix=[sys.argv[3]], query=["q"], log_p=[[-1.0]], n_tokens=[[1]], features=[[1, 2, 3]]))
    print("made", flush=True)
except SparsortError as error:
    print("refused" if "weights:" in str(error) else error, flush=True)
"""


def test_of_processes_that_make_a_store_at_once_one_identity_wins(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    processes = [python(CREATOR, folder, ["even", "odd"][i % 2], i, cwd=tmp_path) for i in range(3)]
    for process in processes:
        assert process.line() == "ready"
    for process in processes:
        process.go()
    printed = [process.communicate()[0].strip() for process in processes]
    winner = OutcomeStore.existing(folder)
    parity = ["even", "odd"].index(winner.identity["weights"])
    assert printed == ["made" if i % 2 == parity else "refused" for i in range(3)]
    assert sorted(winner.read("g").prefix.tolist()) == [str(i) for i in range(3) if i % 2 == parity]


HOLDER = """
store = OutcomeStore.existing(Path(sys.argv[1]))
with store.claim("g") as ours:
    hold(ours)
"""


def test_a_claim_holds_between_processes_and_goes_with_a_kill(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    store.write("g", outcomes(grid("p", 1)))
    store.write("g", outcomes(grid("r", 1)))
    holder = python(HOLDER, store.folder, cwd=tmp_path)
    assert holder.line() == "True"
    with store.claim("g") as ours, store.claim("h") as another:
        assert (ours, another) == (False, True)
    assert not store.compact("g")
    store.write("g", outcomes(grid("s", 1)))
    assert len(blocks(store)) == 3
    holder.kill()
    holder.communicate()
    with store.claim("g") as ours:
        assert ours
        second = python(HOLDER, store.folder, cwd=tmp_path)
        assert second.communicate("\n")[0].strip() == "False"
        assert store.compact("g")
    assert len(blocks(store)) == 1


def test_a_claim_is_released_when_its_block_ends_or_fails(tmp_path: Path) -> None:
    store, other = make(tmp_path), make(tmp_path)
    with store.claim("g") as ours:
        assert ours
        with other.claim("g") as again, store.claim("g") as nested:
            assert (again, nested) == (False, False)
        assert not other.compact("g")
        assert store.compact("g")
    with pytest.raises(ZeroDivisionError), store.claim("g"):
        _ = 1 // 0
    with other.claim("g") as ours:
        assert ours
        assert not store.compact("g")
    assert store.groups() == []


def test_without_locks_every_claim_succeeds_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with make(tmp_path).claim("g") as ours:
        assert ours
    assert "does not support locks" in caplog.text


def test_a_claim_clears_what_was_left_half_written_long_ago(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write("g", outcomes(grid("p", 1)))
    old, fresh = (blocks(store)[0].with_name(f".block-{name}.parquet.77.tmp") for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"PAR1")
    long_ago = fresh.stat().st_mtime - 7200
    os.utime(old, (long_ago, long_ago))
    with store.claim("g"):
        pass
    assert (old.exists(), fresh.exists()) == (False, True)
    assert len(store.read("g")) == 1


def test_writers_of_one_process_do_not_collide(fsyncless: None, tmp_path: Path) -> None:
    store, same = make(tmp_path), outcomes(grid("p", 3))

    def write() -> None:
        for i in range(20):
            store.write(GROUP, same)
            store.put_note(GROUP, "n", i)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(blocks(store)) == 60
    assert store.summary().rows == 180
    assert rows(store.read(GROUP)) == rows(same)
