"""export_plan: the rows in the order of the plan's batches, in each format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sparsort import plan_curriculum
from sparsort.curriculum.loading.export import export_plan
from sparsort.errors import SparsortError

N = 50
DIFFICULTY = np.random.default_rng(0).permutation(N).astype(float)
ROWS = [{"id": f"r{i}", "text": f"row {i}", "meta": {"n": i}, "maybe": None if i < 40 else i} for i in range(N)]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    from datasets import load_from_disk

    return list(load_from_disk(str(path)))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_rows_are_those_of_the_batches_in_order(name: str, epoch: int, tmp_path: Path) -> None:
    plan = plan_curriculum(DIFFICULTY, batch_size=7, stages=3)
    assert export_plan(plan, ROWS, tmp_path / name, epoch=epoch) == N
    exported = read(tmp_path / name)
    places = np.concatenate([plan.batch(number, epoch) for number in range(plan.n_batches)])
    stages = [plan.stage(number) for number in range(plan.n_batches) for _ in plan.batch(number, epoch)]
    assert [row["id"] for row in exported] == [f"r{place}" for place in places]
    assert [row["order"] for row in exported] == list(range(N))
    assert [row["stage"] for row in exported] == stages
    assert [row["difficulty"] for row in exported] == DIFFICULTY[places].tolist()
    assert [{key: row[key] for key in ROWS[0]} for row in exported] == [ROWS[place] for place in places]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_row_that_an_epoch_shows_twice_is_written_twice(tmp_path: Path) -> None:
    plan = plan_curriculum(DIFFICULTY, batch_size=10, mode="pool", pacing="linear:start=0.2", steps=20)
    count = export_plan(plan, ROWS, tmp_path / "rows.jsonl")
    assert count == sum(len(plan.batch(number)) for number in range(plan.n_batches)) == 200


def test_a_row_without_a_score_has_the_difficulty_null(tmp_path: Path) -> None:
    difficulty = DIFFICULTY.copy()
    difficulty[3] = np.nan
    export_plan(plan_curriculum(difficulty, batch_size=10, unscored="last"), ROWS, tmp_path / "rows.jsonl")
    by_id = {row["id"]: row for row in read(tmp_path / "rows.jsonl")}
    assert by_id["r3"]["difficulty"] is None


def test_columns_of_the_same_name_are_kept(tmp_path: Path) -> None:
    rows = [{"text": str(i), "difficulty": "easy"} for i in range(N)]
    export_plan(plan_curriculum(DIFFICULTY, batch_size=10), rows, tmp_path / "rows.jsonl")
    first = read(tmp_path / "rows.jsonl")[0]
    assert first["difficulty"] == "easy"
    assert set(first) == {"text", "difficulty", "curriculum_order", "curriculum_stage", "curriculum_difficulty"}


def test_mistakes(tmp_path: Path) -> None:
    plan = plan_curriculum(DIFFICULTY, batch_size=10)
    with pytest.raises(SparsortError, match="49 rows, and the plan was made for 50"):
        export_plan(plan, ROWS[1:], tmp_path / "rows.jsonl")
    with pytest.raises(SparsortError, match=r"ends in \.parquet or \.jsonl"):
        export_plan(plan, ROWS, tmp_path / "rows.csv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(SparsortError, match="not empty"):
        export_plan(plan, ROWS, tmp_path / "full")
    mixed = [{"text": "a" if i % 2 else i} for i in range(N)]
    with pytest.raises(SparsortError, match="values of one type"):
        export_plan(plan, mixed, tmp_path / "rows.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_column_that_only_later_rows_have_keeps_its_values(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": "zz", "stage": "dev", "difficulty": "hard"}]
    plan = plan_curriculum([0.0, 1.0], batch_size=1)
    export_plan(plan, rows, tmp_path / "o.jsonl")
    second = json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert (second["stage"], second["difficulty"], second["curriculum_difficulty"]) == ("dev", "hard", 1.0)


@pytest.mark.parametrize(
    ("value", "name"),
    [("\ud800", "o.jsonl"), ({}, "o.parquet"), (2**70, "o.parquet")],
    ids=["surrogate", "empty", "large"],
)
def test_values_that_a_format_cannot_hold_are_refused(tmp_path: Path, value: Any, name: str) -> None:
    rows = [{"id": "a", "x": value}, {"id": "b", "x": value}]
    with pytest.raises(SparsortError, match="cannot be written as a table"):
        export_plan(plan_curriculum([0.0, 1.0], batch_size=1), rows, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
