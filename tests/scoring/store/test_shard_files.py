"""`shard_files`: small shards are read from their copy, others and older ones from their pages, with the same result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsort.errors import SparsortError
from sparsort.scoring.store import shard_files, shards
from sparsort.scoring.store.scores import Scores
from sparsort.scoring.store.shard_files import column_names, read_shard, write_shard
from sparsort.scoring.store.shards import ShardStore
from sparsort.storage.parquet_seal import add_seal, read_copy, read_seal

FACTS = {"index": 3, "rows": 2, "digest": "ab", "settings": "cd"}
PROVENANCE = {"scorer": "length", "metric": "length"}


def _table(first: int, count: int) -> pa.Table:
    rows = range(first, first + count)
    columns = {
        "position": pa.array(rows, pa.int64()),
        "id": [f"q{row}" for row in rows],
        "difficulty": [None if row % 7 == 3 else row / 3 for row in rows],
        "status": ["ok" for _ in rows],
        "reason": ["" for _ in rows],
        "n_tokens": pa.array(rows, pa.int32()),
        "n_truncated": pa.array([0 for _ in rows], pa.int32()),
        "digest": ["ä" * (row % 3) for row in rows],
    }
    return pa.table(columns)


def test_a_small_shard_has_a_copy_and_a_large_one_has_none(tmp_path: Path) -> None:
    small, large = _table(0, 2), _table(0, 4000)
    for name, table in (("small", small), ("large", large)):
        write_shard(tmp_path / name, table, FACTS)
        assert read_seal(tmp_path / name) == FACTS
        assert read_shard(tmp_path / name).equals(table)
        assert read_shard(tmp_path / name, ["id", "difficulty"]).equals(table.select(["id", "difficulty"]))
        assert column_names(tmp_path / name) == table.column_names
        # Other readers see the pages.
        assert pq.read_table(tmp_path / name).equals(table)
    assert read_copy(tmp_path / "small") is not None
    assert read_copy(tmp_path / "large") is None


def test_a_shard_of_an_earlier_version_is_read_from_its_pages(tmp_path: Path) -> None:
    path, table = tmp_path / "a", _table(0, 2)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    assert read_shard(path).equals(table)
    add_seal(path, FACTS)
    assert (read_copy(path), read_seal(path)) == (None, FACTS)
    assert read_shard(path).equals(table)


def test_no_bit_of_a_shard_changes_what_is_read(tmp_path: Path) -> None:
    path, table = tmp_path / "a", _table(0, 2)
    write_shard(path, table, FACTS)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    copy = read_copy(path) or b""
    begin = whole.index(copy)
    # In front of the footer, whose damage `read_seal` finds.
    for byte in range(0, footer, 3):
        content = bytearray(whole)
        content[byte] ^= 1 << (byte % 8)
        path.write_bytes(content)
        assert begin <= byte < begin + len(copy) or read_copy(path) in (copy, None)
        assert begin > byte or byte >= begin + len(copy) or read_copy(path) is None
        try:
            found = read_shard(path)
        except SparsortError:
            continue
        assert found.equals(table), byte


def test_columns_of_many_shards_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore.open(tmp_path, provenance=PROVENANCE, shard_rows=2)
    for index in range(5):
        store.write(index, _table(2 * index, 2), f"d{index}")
    assert store.finish(10)
    opened: list[str] = []

    def read(path: Path, columns: list[str] | None = None) -> pa.Table:
        opened.append(path.name)
        return shard_files.read_shard(path, columns)

    monkeypatch.setattr(shards, "read_shard", read)
    scores = Scores.load(tmp_path)
    assert scores.ids == [f"q{row}" for row in range(10)]
    assert scores.column("n_tokens").tolist() == list(range(10))
    assert scores.table.equals(_table(0, 10).combine_chunks())
    assert opened == [f"shard-{index:05d}.parquet" for index in range(5)]
    # Beyond the rows that are kept in memory, the columns of a report are read together if the shards are small.
    monkeypatch.setattr(shards, "_MAX_WHOLE_ROWS", 9)
    scores = Scores.load(tmp_path)
    assert scores.ids == [f"q{row}" for row in range(10)]
    assert scores.column("n_tokens").tolist() == list(range(10))
    assert len(opened) == 10
    # Of large shards, only the named columns are read.
    monkeypatch.setattr(shards, "_SMALL_ROWS", 1)
    scores = Scores.load(tmp_path)
    assert scores.ids == [f"q{row}" for row in range(10)]
    assert scores.column("n_tokens").tolist() == list(range(10))
    assert len(opened) == 20


def test_a_score_without_a_model_imports_neither_torch_nor_scipy(tmp_path: Path) -> None:
    """They take most of the time of a resume."""
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two two"}\n')
    code = """
import sys
from sparsort.recipes.cli.app import app
score = ["score", sys.argv[1], "--scorer", "compression", "-p", "{text}", "--out", sys.argv[2]]
for command in (score, score, ["plan", sys.argv[2], "--batch-size", "1"]):
    app(command, standalone_mode=False)
assert not {"torch", "scipy", "transformers"} & set(sys.modules)
"""
    arguments = [str(tmp_path / "rows.jsonl"), str(tmp_path / "s")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
