"""Rows as people have them: every form gives the rows of the plain list."""

from __future__ import annotations

import datetime
import importlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from data_forms import FORMS, columns

from sparsort.errors import SparsortError
from sparsort.scoring.data.inputs import readable
from sparsort.scoring.data.rows import open_rows

ROWS = [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c", "n": 3}]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_rows(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(columns(ROWS)))
    source = open_rows(FORMS[form](ROWS, tmp_path))
    assert [dict(row.fields) for row in source.rows()] == ROWS
    assert [row.digest for row in source.rows()] == [row.digest for row in open_rows(ROWS).rows()]


@pytest.mark.parametrize(
    "texts",
    [["a", "b"], ("a", "b"), np.array(["a", "b"]), iter(["a", "b"])],
    ids=["list", "tuple", "array", "iterator"],
)
def test_texts_are_rows_with_the_field_text(texts: Any) -> None:
    assert [dict(row.fields) for row in open_rows(texts).rows()] == [{"text": "a"}, {"text": "b"}]


def test_a_column_of_pandas_is_texts() -> None:
    series = pandas.Series(["a", "b"], index=[5, 6])
    assert [dict(row.fields) for row in open_rows(series).rows()] == [{"text": "a"}, {"text": "b"}]


def test_a_frame_keeps_values_of_several_types_and_missing_ones() -> None:
    day = datetime.date(2026, 1, 2)
    frame = pandas.DataFrame({"x": ["a", 1, day], 0: [1.5, None, 2.5]})
    rows = [dict(row.fields) for row in open_rows(frame).rows()]
    assert [row["x"] for row in rows] == ["a", 1, day]
    assert rows[0]["0"] == 1.5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": [1, 2], "b": [1]}, "different lengths"),
        ({"a": "text"}, r"Pass \[row\] for a single row"),
        (["a", {"text": "b"}], "row 1 is dict"),
        (lambda: 1, "cannot read rows from a function"),
        (np.zeros((2, 2)), "cannot read rows from a ndarray"),
    ],
)
def test_mistakes(source: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        open_rows(source)


def test_a_hub_id_loads_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str | None) -> Any:
        asked.append((name, config, split))
        one = datasets.Dataset.from_dict(columns(ROWS))
        return one if split else datasets.DatasetDict({"train": one, "test": one})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(readable("hub:owner/name:config:test")) == 3
    assert len(readable(Path("hub:owner/name:train"))) == 3
    assert asked == [("owner/name", "config", "test"), ("owner/name", None, "train")]
    with pytest.raises(SparsortError, match="hub:owner/name:train, hub:owner/name:test"):
        readable("hub:owner/name")


def test_a_hub_that_refuses_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SparsortError, match="cannot load the dataset 'hub:owner/name': offline"):
        open_rows("hub:owner/name")


def test_missing_texts_are_rows_without_a_text() -> None:
    assert readable(["a", None, float("nan")]) == [{"text": "a"}, {"text": None}, {"text": None}]
    assert readable([None, "a"]) == [{"text": None}, {"text": "a"}]


def test_a_dictionary_of_columns_may_name_the_rows() -> None:
    frame = {"text": {0: "x", 1: "y"}, "label": {0: "a", 1: "b"}}
    assert readable(frame) == [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    with pytest.raises(SparsortError, match="other row labels"):
        readable({"text": {0: "x"}, "label": {1: "a"}})
    with pytest.raises(SparsortError, match="'text' is set"):
        readable({"text": {"x", "y"}})


@pytest.mark.parametrize("make", ["pandas.array", "pandas.Index", "pyarrow.array"])
def test_arrays_of_texts(make: str) -> None:
    module, _, name = make.partition(".")
    values = getattr(importlib.import_module(module), name)(["x", "y"])
    assert readable(values) == [{"text": "x"}, {"text": "y"}]
