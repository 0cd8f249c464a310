"""`scoring.store.scores`: the table survives every form to the last bit, and finds the difficulty of the right row."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.scoring.data.rows import open_rows
from sparsort.scoring.store.score_tables import STATUSES, score_table, scores_schema
from sparsort.scoring.store.scores import Scores

PROVENANCE = {
    "scorer": "sparsity",
    "metric": "gini",
    "orientation": {"gini": 1, "l0_relative": -1},
    "id_column": "id",
    "prompt": "Question: {question}\n„Answer“:",
    "environment": {"torch": "2.13.0"},
}


def make(difficulty: list[float], metrics: dict[str, list[float]] | None = None, **provenance: Any) -> Scores:
    rows = list(open_rows([{"id": f"q{i}", "question": f"text {i}"} for i in range(len(difficulty))]).rows())
    status = ["ok" if math.isfinite(value) else "zero" for value in difficulty]
    reason = ["" if state == "ok" else "the state is zero" for state in status]
    columns = {name: np.array(values) for name, values in (metrics or {"gini": difficulty}).items()}
    count = range(len(rows))
    table = score_table(rows, np.array(difficulty), status, reason, list(count), [0] * len(rows), columns)
    return Scores(table, {**PROVENANCE, **provenance})


def bits(scores: Scores) -> list[tuple[Any, ...]]:
    """Every value, floats by their bits (one NaN for all)."""
    packed = [
        [struct.pack("<d", math.nan if v != v else v) if isinstance(v, float) else v for v in column.to_pylist()]
        for column in scores.table.columns
    ]
    return list(zip(scores.table.column_names, packed, strict=True))


def through_dataset(scores: Scores, _folder: Path) -> Scores:
    return Scores.from_dataset(scores.to_dataset())


def through_saved_dataset(scores: Scores, folder: Path) -> Scores:
    scores.to_dataset().save_to_disk(str(folder / "dataset"))
    return Scores.load(folder / "dataset")


def through_parquet(scores: Scores, folder: Path) -> Scores:
    scores.to_parquet(folder / "scores.parquet")
    return Scores.load(folder / "scores.parquet")


def through_jsonl(scores: Scores, folder: Path) -> Scores:
    scores.to_jsonl(folder / "scores.jsonl")
    return Scores.load(folder / "scores.jsonl")


def through_folder(scores: Scores, folder: Path) -> Scores:
    scores.save(folder / "scores")
    return Scores.load(folder / "scores")


WAYS = [through_dataset, through_saved_dataset, through_parquet, through_jsonl, through_folder]
VALUES = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.just(math.nan), st.just(-0.0))


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_round_trip_keeps_every_bit(
    way: Callable[[Scores, Path], Scores], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    difficulty = data.draw(st.lists(VALUES, min_size=1, max_size=12))
    size = len(difficulty)
    metrics = data.draw(
        st.dictionaries(
            st.sampled_from(["gini", "l0_relative", "hoyer"]),
            st.lists(st.floats(), min_size=size, max_size=size),
            max_size=3,
        )
    )
    scores = make(difficulty, metrics or {"l1": [math.nan] * size}, note=data.draw(st.text(max_size=20)))
    back = way(scores, tmp_path_factory.mktemp("round"))
    assert back.table.schema.equals(scores.table.schema)
    assert bits(back) == bits(scores)
    assert back.provenance == scores.provenance
    assert len(back) == size
    assert back.kind == "sparsity"
    assert back.ids == scores.ids


def test_the_columns_are_those_of_the_schema() -> None:
    scores = make([0.5, math.nan])
    names = ["position", "id", "difficulty", "status", "reason", "n_tokens", "n_truncated", "digest", "gini"]
    assert scores.to_dataset().column_names == names
    assert scores.table.schema.equals(scores_schema(["gini"]))
    assert scores.metrics == ["gini"]
    assert scores.column("status").tolist() == ["ok", "zero"]
    assert scores.counts("status") == {"ok": 1, "zero": 1}
    assert repr(scores).startswith("Scores: 2 rows, sparsity (gini)\n  1 of 2 rows have no score: 1 zero\n")
    with pytest.raises(SparsortError, match=r"unknown column 'statsu'. Did you mean 'status'"):
        scores.column("statsu")


def test_provenance_survives_what_a_dataset_goes_through(tmp_path: Path) -> None:
    dataset = make([3.0, 1.0, 2.0]).to_dataset().map(lambda row: {"extra": row["id"] * 2}).select([2, 0])
    dataset.save_to_disk(str(tmp_path / "d"))
    back = Scores.from_dataset(datasets.load_from_disk(str(tmp_path / "d")))
    assert back.provenance == PROVENANCE
    assert back.ids == ["q2", "q0"]
    assert back.metrics == ["gini"]


def test_lost_provenance_is_reported(tmp_path: Path) -> None:
    scores = make([1.0])
    scores.to_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.provenance.json").unlink()
    dataset = datasets.Dataset.from_dict(scores.to_dataset().to_dict())
    scores.table.to_pandas().to_parquet(tmp_path / "a.parquet")
    for back in (
        Scores.load(tmp_path / "a.jsonl"),
        Scores.from_dataset(dataset),
        Scores.load(tmp_path / "a.parquet"),
    ):
        assert back.kind == "unknown"
        assert "not known" in back.provenance["note"]
        assert back.difficulty.tolist() == [1.0]


def test_jsonl_is_strict_json_a_row_a_line(tmp_path: Path) -> None:
    make([1.0, math.nan], {"gini": [math.inf, math.nan]}).to_jsonl(tmp_path / "a.jsonl")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    first, second = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "a.jsonl").read_text().splitlines()
    )
    assert (first["gini"], second["gini"], second["difficulty"]) == ("inf", None, None)


def test_by_orients_another_metric_so_that_it_rises_with_difficulty() -> None:
    scores = make([0.1, 0.9, math.nan], {"gini": [0.1, 0.9, 0.4], "l0_relative": [0.3, 0.2, 0.1], "l1": [1.0, 2, 3]})
    other = scores.by("l0_relative")
    np.testing.assert_array_equal(other.difficulty, [-0.3, -0.2, math.nan])
    assert other.provenance["metric"] == "l0_relative"
    np.testing.assert_array_equal(other.by("gini").difficulty, scores.difficulty)
    assert scores.provenance["metric"] == "gini"
    with pytest.raises(SparsortError, match=r"unknown metric 'ginni'. Did you mean 'gini'"):
        scores.by("ginni")
    with pytest.raises(SparsortError, match="unknown metric 'l1'"):
        scores.by("l1")


def test_difficulty_is_found_by_id_else_by_content() -> None:
    scores = make([0.1, 0.9, math.nan])
    found = scores.difficulty_of([{"id": "q2"}, {"id": "q1", "question": "another text"}, {"id": "q0"}])
    np.testing.assert_array_equal(found, [math.nan, 0.9, 0.1])
    nameless = Scores(scores.table, {**PROVENANCE, "id_column": None})
    row = {"question": "text 1", "id": "q1"}
    np.testing.assert_array_equal(nameless.difficulty_of([row]), [0.9])
    assert scores.difficulty_of([]).shape == (0,)
    with pytest.raises(SparsortError, match=r"7 of 8 rows have no score: row 0 \(id '0'\).* and 2 more"):
        scores.difficulty_of([{"id": i} for i in range(7)] + [row])
    with pytest.raises(SparsortError, match=r"1 of 1 rows have no score: row 0 \(looked up by its content\)"):
        scores.difficulty_of([{"question": "text 1"}])


def test_equal_rows_without_ids_share_the_first_score() -> None:
    rows = list(open_rows([{"q": "a"}, {"q": "a"}]).rows())
    table = score_table(rows, np.array([1.0, 2.0]), ["ok"] * 2, [""] * 2, [1, 1], [0, 0], {})
    assert Scores(table, {}).difficulty_of([{"q": "a"}]).tolist() == [1.0]


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, math.nan]), min_size=1, max_size=30))
def test_ranked_is_by_difficulty_then_id_with_unscored_rows_last(difficulty: list[float]) -> None:
    scores = make(difficulty)
    for sign, ranked in ((1, scores.ranked()), (-1, scores.ranked(descending=True))):
        keys = {
            name: (v != v, 0.0 if v != v else sign * v, name) for name, v in zip(scores.ids, difficulty, strict=True)
        }
        assert ranked == sorted(scores.ids, key=lambda name: keys[name])
    assert [scores.ids[i] for i in scores.order()] == scores.ranked()


def test_a_plausible_number_without_a_score_is_refused() -> None:
    rows = list(open_rows([{"q": 1}]).rows())
    for value, status in ((0.5, "zero"), (math.nan, "ok"), (math.inf, "ok"), (math.inf, "empty")):
        with pytest.raises(SparsortError, match="fault of the scorer"):
            score_table(rows, np.array([value]), [status], [""], [1], [0], {})
    with pytest.raises(SparsortError, match=r"unknown status 'okay'. Did you mean 'ok'"):
        score_table(rows, np.array([1.0]), ["okay"], [""], [1], [0], {})
    assert STATUSES[0] == "ok"


def test_a_table_that_has_no_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsortError, match=r"lacks the column\(s\) difficulty, digest"):
        Scores(pa.table({"id": ["a"]}), {})
    (tmp_path / "a.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(SparsortError, match="not a table of scores"):
        Scores.load(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(SparsortError, match="cannot be read as Parquet"):
        Scores.load(tmp_path / "a.parquet")
    with pytest.raises(SparsortError, match="is not a score folder"):
        Scores.load(tmp_path / "none")
    with pytest.raises(SparsortError, match="is not a score folder"):
        Scores.load(tmp_path)


def test_save_does_not_write_over_other_scores(tmp_path: Path) -> None:
    make([1.0, 2.0]).save(tmp_path / "a")
    with pytest.raises(SparsortError, match="already contains scores"):
        make([3.0, 2.0]).save(tmp_path / "a")
    assert Scores.load(tmp_path / "a").difficulty.tolist() == [1.0, 2.0]
