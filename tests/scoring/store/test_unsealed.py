"""Scores of version 0.1, which have no digests, are read if intact, and refused or scored again if not.

`tests/data/scores_version_1` is a folder as sparsort 0.1 wrote it: 50 rows, thirteen metrics, one shard. One flipped bit of its
footer (byte 10255) makes Parquet readers give 34 rows without an error.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sparsort.errors import SparsortError
from sparsort.recipes.cli.app import app
from sparsort.scoring.data.rows import RowSource, open_rows
from sparsort.scoring.scorers.run_shards import run
from sparsort.scoring.store.score_tables import find_other_difficulty, find_problem
from sparsort.scoring.store.scores import Scores
from sparsort.scoring.store.shards import ShardStore

OLD = Path(__file__).parents[2] / "data" / "scores_version_1"
BYTE, BIT = 10255, 5


class Again:
    """The scorer of the folder, that gives the numbers which are in it and counts how often it is asked."""

    def __init__(self, scores: Scores) -> None:
        added = ("source", "id_column", "content")
        self.provenance = {key: value for key, value in scores.provenance.items() if key not in added}
        self.metrics, self.table, self.calls = scores.metrics, scores.table, 0

    def score_rows(self, _rows: Any, advance: Any) -> pa.Table:
        self.calls += 1
        advance(len(self.table))
        return self.table


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "scores"))


@pytest.fixture
def rows34(old: Path) -> Path:
    flip(old / "shard-00000.parquet", BYTE, BIT)
    assert pq.read_table(old / "shard-00000.parquet").num_rows == 34  # what nobody noticed
    return old


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def source() -> RowSource:
    """Rows with the ids and digests of those that were scored; their texts are not kept."""
    table = Scores.load(OLD).table
    made = open_rows([{"id": name, "text": ""} for name in table["id"].to_pylist()], content=["text"])
    digests = table["digest"].to_pylist()
    rows = [type(row)(row.position, row.id, row.fields, digests[row.position]) for row in made.rows()]
    made.rows = lambda start=0: iter(rows[start:])  # type: ignore[method-assign]
    return made


def test_an_old_folder_is_read_and_nothing_is_written(old: Path) -> None:
    before = contents(old)
    scores = Scores.load(old)
    assert len(scores) == 50
    assert len(set(scores.ids)) == 50
    assert find_problem(scores.table, scores.provenance) is None
    assert find_other_difficulty(scores.table, scores.provenance) is None
    np.testing.assert_array_equal(scores.difficulty, scores.column("gini"))
    assert contents(old) == before


def test_fewer_rows_by_one_bit_are_refused_by_readers(rows34: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SparsortError, match=r"shard-00000.parquet is damaged: its footer says .* scores damaged shards"
    ):
        Scores.load(rows34)
    result = CliRunner().invoke(app, ["plan", str(rows34), "--batch-size", "10"])
    assert result.exit_code == 2
    assert "is damaged" in " ".join(result.output.split())


def test_fewer_rows_by_one_bit_are_scored_again(rows34: Path) -> None:
    scorer, notes = Again(Scores.load(OLD)), []
    scores = run(source(), scorer, out=rows34, shard_rows=50, note=notes.append)
    assert scorer.calls == 1
    assert notes[0].startswith("shard-00000.parquet is damaged (its footer says")
    assert scores.table.equals(Scores.load(OLD).table)
    manifest = json.loads((rows34 / "manifest.json").read_text())
    assert manifest["version"] == 2


def test_digests_are_added_once_the_shards_have_passed(old: Path) -> None:
    scorer, shard = Again(Scores.load(OLD)), (old / "shard-00000.parquet").read_bytes()
    for _ in range(2):
        run(source(), scorer, out=old, shard_rows=50)
        manifest = json.loads((old / "manifest.json").read_text())
        assert (manifest["version"], manifest["shards"][0]["record"]["bytes"]) == (2, len(shard))
    assert scorer.calls == 0
    assert (old / "shard-00000.parquet").read_bytes() == shard
    flip(old / "shard-00000.parquet", BYTE, BIT)
    with pytest.raises(SparsortError, match="is damaged: its content has changed"):
        Scores.load(old)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows", 51), ("rows", 34), ("shard_rows", 51), ("version", 3), ("shards", []), ("shards", [{"index": 0}])],
)
def test_an_old_manifest_that_contradicts_its_shards_is_refused(key: str, value: Any, old: Path) -> None:
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(SparsortError):
        Scores.load(old)


def test_no_flip_that_passes_changes_a_value(old: Path) -> None:
    """120 bits of each of pages, footer and manifest; `benchmarks/checks/bit_flips.py` tries more."""
    rng, expected = np.random.default_rng(0), Scores.load(OLD)
    shard, manifest = old / "shard-00000.parquet", old / "manifest.json"
    size = shard.stat().st_size
    footer = size - 8 - int.from_bytes(shard.read_bytes()[-8:-4], "little")
    passed = 0
    for path, low, high in ((shard, 0, footer), (shard, footer, size), (manifest, 0, manifest.stat().st_size)):
        whole = path.read_bytes()
        for byte, bit in zip(rng.integers(low, high, 120).tolist(), rng.integers(0, 8, 120).tolist(), strict=True):
            flip(path, byte, bit)
            try:
                found = Scores.load(old)
            except SparsortError:
                continue
            finally:
                path.write_bytes(whole)
            passed += 1
            assert found.table.equals(expected.table), (path.name, byte, bit)
            if path == shard:
                assert found.provenance == expected.provenance
    assert passed > 20  # an oracle that refuses everything would show nothing


def test_an_old_shard_of_a_run_that_is_not_finished_is_checked(old: Path) -> None:
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["shards"], manifest["rows"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    store = ShardStore.open(old, provenance=manifest["provenance"], shard_rows=50)
    digest = "937e44a6fe786d8e301738d6e1f543f3"
    assert store.is_done(0, digest, pytest.fail)
    with pytest.raises(SparsortError, match="the data has changed"):
        store.is_done(0, digest[::-1], pytest.fail)
    notes: list[str] = []
    flip(old / "shard-00000.parquet", BYTE, BIT)
    assert not store.is_done(0, digest, notes.append)
    assert "its footer says" in notes[0]


def test_impossible_tables_of_scores_are_refused() -> None:
    scores = Scores.load(OLD)
    table, provenance = scores.table, scores.provenance
    difficulty = table["difficulty"].to_numpy().copy()
    difficulty[3] = np.nan
    changed: list[tuple[str, pa.Array, str]] = [
        ("difficulty", pa.array(difficulty), "a difficulty but not the status"),
        ("status", pa.array(["okay"] * 50), "'okay' is not a status"),
        ("n_tokens", pa.array([-1] * 50, pa.int32()), "is negative"),
        ("reason", pa.array([None] * 50, pa.string()), "values are missing"),
        ("gini", pa.array(["a"] * 50), "not those of a table of scores"),
    ]
    for name, column, problem in changed:
        place = table.schema.get_field_index(name)
        assert problem in (find_problem(table.set_column(place, name, column), provenance) or "")
    assert "lacks the metric 'gini'" in (find_problem(table.drop_columns("gini"), provenance) or "")
    other = table.set_column(table.schema.get_field_index("gini"), "gini", table["hoyer"])
    assert "is not the metric 'gini'" in (find_other_difficulty(other, provenance) or "")


def test_files_without_digests_are_read_if_they_are_consistent(tmp_path: Path) -> None:
    scores = Scores.load(OLD)
    kept = {b"sparsort": json.dumps(scores.provenance).encode()}
    pq.write_table(scores.table.replace_schema_metadata(kept), tmp_path / "a.parquet")
    scores.to_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.provenance.json").write_text(json.dumps(scores.provenance))
    for name in ("a.parquet", "a.jsonl"):
        found = Scores.load(tmp_path / name)
        assert found.table.equals(scores.table)
        assert found.provenance == scores.provenance
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(first | {"difficulty": 0.5}), *lines[1:]]))
    with pytest.raises(SparsortError, match="is not the metric 'gini'"):
        Scores.load(tmp_path / "a.jsonl")
    pq.write_table(scores.table.slice(0, 0).replace_schema_metadata({b"sparsort": b"{"}), tmp_path / "b.parquet")
    with pytest.raises(SparsortError, match=r"the provenance in .* cannot be read"):
        Scores.load(tmp_path / "b.parquet")
