"""Scores as a table: rows, parts, joins, other libraries, and what people see."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pytest

from sparsort import ColumnScorer, CompressionScorer, LengthScorer, LossScorer, Scores, SparsityScorer, SparsortError
from sparsort.recipes.score.config import ScorerConfig
from sparsort.recipes.score.score import score_file
from sparsort.scoring.prompts.spec import PromptSpec

ROWS = [{"id": f"r{i}", "text": "word " * (i * 7 % 5 + 1), "label": i % 2} for i in range(10)]


@pytest.fixture
def scores() -> Scores:
    return LengthScorer(unit="characters").score(ROWS, prompt="{text}")


def test_rows_by_position_and_id(scores: Scores) -> None:
    rows = list(scores)
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    assert scores[3] == rows[3] == scores["r3"]
    assert scores[-1] == rows[9]
    with pytest.raises(IndexError):
        scores[10]
    with pytest.raises(SparsortError, match="unknown id 'r33'"):
        scores["r33"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (slice(2, 8, 3), ["r2", "r5"]),
        ([4, -1], ["r4", "r9"]),
        (np.array([True, False] * 5), ["r0", "r2", "r4", "r6", "r8"]),
        (["r7", "r1"], ["r7", "r1"]),
        ([], []),
    ],
)
def test_parts_are_scores(scores: Scores, key: Any, expected: list[str]) -> None:
    part = scores[key]
    assert isinstance(part, Scores)
    assert part.ids == expected
    assert part.provenance["selected"] == {"rows": len(expected), "of": 10}
    assert part.kind == scores.kind
    with pytest.raises(SparsortError, match="one boolean for each of 10 rows"):
        scores[np.array([True])]


@pytest.mark.parametrize("key", [1.5, [0.5], None, {"r1": 1}, [[1]]])
def test_what_cannot_be_an_index(scores: Scores, key: Any) -> None:
    with pytest.raises(SparsortError, match=r"scores cannot be indexed by .*; expected a position, an id"):
        scores[key]


def test_no_rows(scores: Scores, tmp_path: Path) -> None:
    empty = scores.filter(lambda row: False)
    assert list(empty) == []
    assert repr(empty).startswith("Scores: 0 rows")
    assert "<svg" not in empty._repr_html_()
    assert empty.plot().patches[0].get_height() == 0
    with pytest.raises(SparsortError, match="no rows to save"):
        empty.save(tmp_path / "empty")


def test_filter(scores: Scores, tmp_path: Path) -> None:
    long = scores.filter(lambda row: row["difficulty"] > 15)
    assert set(long.ids) == {row["id"] for row in ROWS if len(row["text"]) > 15}
    long.save(tmp_path / "part")
    assert Scores.load(tmp_path / "part").ids == long.ids


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow", "datasets", "list"])
def test_a_join_has_the_rows_of_the_data_and_its_kind(scores: Scores, library: str) -> None:
    import datasets
    import pyarrow as pa

    data = [ROWS[7], ROWS[2]]
    forms = {
        "pandas": pandas.DataFrame(data, index=[50, 60]),
        "polars": polars.DataFrame(data),
        "pyarrow": pa.Table.from_pylist(data),
        "datasets": datasets.Dataset.from_list(data),
        "list": data,
    }
    joined = scores.join(forms[library])
    expected = {"list": pa.Table, "pyarrow": pa.Table}.get(library, type(forms[library]))
    assert type(joined) is expected
    frame = pandas.DataFrame(joined.to_pylist() if expected is pa.Table else joined.to_dict())
    assert frame["id"].tolist() == ["r7", "r2"]
    assert frame["label"].tolist() == [1, 0]
    assert frame["difficulty"].tolist() == [scores["r7"]["difficulty"], scores["r2"]["difficulty"]]
    if library == "pandas":
        assert joined.index.tolist() == [50, 60]


def test_a_join_keeps_columns_of_the_same_name(scores: Scores) -> None:
    joined = scores.join([{**ROWS[0], "difficulty": "easy"}])
    assert joined["difficulty"].to_pylist() == ["easy"]
    assert joined["score_difficulty"].to_pylist() == [scores[0]["difficulty"]]


def test_a_join_keeps_columns_that_the_first_row_lacks(scores: Scores) -> None:
    assert scores.join([ROWS[0], {**ROWS[1], "note": "late"}])["note"].to_pylist() == [None, "late"]
    with pytest.raises(SparsortError, match="values of one type"):
        scores.join([{**ROWS[0], "note": 1}, {**ROWS[1], "note": "late"}])


def test_a_join_with_rows_that_were_not_scored_is_refused(scores: Scores) -> None:
    with pytest.raises(SparsortError, match="1 of 1 rows have no score"):
        scores.join([{"id": "other", "text": "x"}])


def test_conversions(scores: Scores) -> None:
    assert scores.to_pandas()["id"].tolist() == scores.ids
    assert scores.to_polars()["id"].to_list() == scores.ids
    assert scores.to_arrow() is scores.table


def test_saving_and_uploading(scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    scores.save_to_disk(tmp_path / "saved")
    assert Scores.load(tmp_path / "saved").ids == scores.ids

    class Hub:
        """The hub as a local folder."""

        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
            assert (repo_type, private, exist_ok) == ("dataset", True, True)
            return f"hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, repo_type: str, folder_path: Path, commit_message: str) -> None:
            Path(folder_path).rename(tmp_path / "hub")
            Path(folder_path).mkdir()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert scores.push_to_hub("owner/name", private=True, token="secret") == "hub/owner/name"
    assert Scores.from_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").ids == scores.ids
    card = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert json.loads(card.partition("```json\n")[2].partition("\n```")[0]) == json.loads(json.dumps(scores.provenance))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(SparsortError, match="cannot upload to 'owner/name': no network"):
        scores.push_to_hub("owner/name", token="secret")


def test_what_people_see(scores: Scores) -> None:
    assert repr(scores) == "Scores: 10 rows, length (length)\n  prompt: {text}\n  difficulty: 5 to 25, median 15"
    page = scores._repr_html_()
    assert page.count("<rect") == 30
    assert "r4" in page
    axes = scores.plot()
    assert math.isclose(sum(bar.get_height() for bar in axes.patches), 10)


def test_a_summary_names_model_prompt_and_answer(make_tiny_model: Callable[..., Path]) -> None:
    model = str(make_tiny_model("llama"))
    turns = [{"role": "user", "content": "Is this kind?\n{text}"}]
    summary = repr(SparsityScorer(model).score(ROWS, turns, answer=" {label}"))
    assert f"\n  model: {model[:99]}" in summary
    assert "\n  prompt: [user] Is this kind? {text} [answer] {label}\n" in summary


def test_failures_are_counted_by_status_and_warned_about_once() -> None:
    with pytest.warns(UserWarning, match="2 of 3 rows have no score: 2 empty") as caught:
        scores = LengthScorer(unit="characters").score([{"text": "a"}, {"text": ""}, {"text": ""}], prompt="{text}")
    assert [warning.filename for warning in caught] == [__file__]
    assert "\n  2 of 3 rows have no score: 2 empty\n" in repr(scores)
    with pytest.warns(UserWarning, match="2 of 3 rows have no score") as caught:
        score_file(
            [{"text": "a"}, {"text": ""}, {"text": ""}],
            scorer=ScorerConfig(scorer="length", unit="characters"),
            prompt=PromptSpec("{text}"),
        )
    assert [warning.filename for warning in caught] == [__file__]


def test_scorers_show_their_settings(make_tiny_model: Callable[..., Path]) -> None:
    model = str(make_tiny_model("llama"))
    assert repr(SparsityScorer(model, site="layer:0")) == (
        f"SparsityScorer(model={model!r}, site='layer:0', pooling='last', metric='gini', outliers='none')"
    )
    assert repr(LossScorer(model, on="prompt")) == f"LossScorer(model={model!r}, on='prompt')"
    assert repr(LengthScorer(unit="characters")) == "LengthScorer(unit='characters')"
    assert repr(ColumnScorer("steps")) == "ColumnScorer(column='steps', descending=False)"
    assert repr(CompressionScorer()) == "CompressionScorer()"


def test_html_shows_text_as_text() -> None:
    rows = [{"id": "<script>", "text": "a"}, {"id": "b", "text": "bb"}]
    page = LengthScorer(unit="characters").score(rows, prompt="{text}")._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_ids_in_a_column_of_a_frame_choose_rows() -> None:
    scores = CompressionScorer().score([{"id": name, "text": name * 9} for name in "abc"], prompt="{text}")
    assert scores[np.array(["c", "a"], dtype=object)].ids == ["c", "a"]
