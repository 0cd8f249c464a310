"""Missing values and values that have a text: one rule for the values of every library, and for paths into nested values."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.values import as_text, has_text, is_missing, number_array, put, row_of, text_at, value_at, without

MISSING: list[Any] = [
    None,
    float("nan"),
    complex(float("nan"), 0),
    Decimal("NaN"),
    Decimal("sNaN"),
    np.float64("nan"),
    np.float32("nan"),
    np.float16("nan"),
    np.datetime64("NaT"),
    np.timedelta64("NaT"),
    np.array(np.nan),
    np.array(None),
    np.ma.masked,
    pd.NA,
    pd.NaT,
    torch.tensor(float("nan")),
    torch.tensor(float("nan"), dtype=torch.bfloat16),
]
# Each with its text: that of `str`, except for a tensor, which is written as its number.
WITH_TEXT: list[tuple[Any, str]] = [
    ("", ""),
    ("nan", "nan"),
    ("None", "None"),
    (np.str_("word"), "word"),
    (0, "0"),
    (True, "True"),
    (1.5, "1.5"),
    (float("inf"), "inf"),
    (Decimal("1.50"), "1.50"),
    (Fraction(1, 3), "1/3"),
    (np.int64(-3), "-3"),
    (np.float32(0.1), "0.1"),
    (np.bool_(True), "True"),
    (np.array(7), "7"),
    (torch.tensor(2.5), "2.5"),
    (datetime.date(2024, 2, 29), "2024-02-29"),
    (datetime.datetime(2024, 2, 29, 12), "2024-02-29 12:00:00"),
    (datetime.time(12, 30), "12:30:00"),
    (datetime.timedelta(hours=1), "1:00:00"),
    (pd.Timestamp("2024-02-29"), "2024-02-29 00:00:00"),
    (np.datetime64("2024-02-29"), "2024-02-29"),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
]
NO_TEXT: list[tuple[Any, str]] = [
    ([], "a list"),
    (["joy"], "a list"),
    (("joy",), "a list"),
    ({}, "a dictionary"),
    ({"lang": "de"}, "a dictionary"),
    ({"joy"}, "a set"),
    (b"joy", "bytes"),
    (np.bytes_(b"joy"), "bytes"),
    (bytearray(b"joy"), "bytes"),
    (np.array([1.0]), "an array"),
    (np.array(["joy"]), "an array"),
    (torch.ones(1), "an object of the type Tensor"),
    (object(), "an object of the type object"),
]


@pytest.mark.parametrize("value", MISSING, ids=lambda value: f"{type(value).__name__} {value}")
def test_every_form_of_nothing_is_missing(value: Any) -> None:
    assert is_missing(value)


@pytest.mark.parametrize(("value", "text"), WITH_TEXT, ids=lambda value: f"{type(value).__name__} {value!r}")
def test_a_value_with_a_text_is_written_as_it_always_was(value: Any, text: str) -> None:
    assert not is_missing(value)
    assert as_text(value, field="x", where="row 0") == text
    assert text == (str(value) if not isinstance(value, torch.Tensor) else str(value.item()))


@pytest.mark.parametrize(("value", "kind"), NO_TEXT, ids=lambda value: f"{type(value).__name__}")
def test_anything_else_is_refused_with_its_kind_and_place(value: Any, kind: str) -> None:
    assert not is_missing(value)
    assert not has_text(value)
    with pytest.raises(SparsortError, match=rf"row 7 has {kind}.*'meta'"):
        as_text(value, field="meta", where="row 7")


def test_pandas_rows_of_mixed_columns() -> None:
    frame = pd.DataFrame(
        {
            "text": pd.array(["a", None, "c"], dtype="string"),
            "count": pd.array([1, None, 3], dtype="Int64"),
            "when": pd.to_datetime(["2024-01-01", None, None]),
            "score": [1.5, np.nan, 2.0],
            "flag": pd.array([True, None, False], dtype="boolean"),
        }
    )
    found = [{name: is_missing(value) for name, value in row.items()} for row in frame.to_dict("records")]
    assert found == [{name: bool(gone) for name, gone in row.items()} for row in frame.isna().to_dict("records")]


def test_no_attribute_is_ever_looked_up() -> None:
    class Trap:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    for field in ("x.real", "x.__class__", "x[0]"):
        with pytest.raises(SparsortError, match="Only dictionaries and lists have parts"):
            value_at({"x": Trap()}, field, where="row 0")
        with pytest.raises(SparsortError, match="Only dictionaries and lists have parts"):
            value_at({"x": 5}, field, where="row 0")
        with pytest.raises(SparsortError, match="Only dictionaries and lists have parts"):
            value_at({"x": "text"}, field, where="row 0")


def test_paths_through_what_libraries_give() -> None:
    row = {"turns": np.array([{"role": "user"}, {"role": "bot"}], dtype=object), "pair": (1, {"a": [None, "deep"]})}
    assert value_at(row, "turns[-1].role", where="row 0") == "bot"
    assert text_at(row, "pair[1].a[1]", where="row 0") == "deep"
    for field in ("pair[1].a[0]", "pair[1].b", "pair[1].b.c", "pair[9]", "pair[-3]", "turns[0].name"):
        assert value_at(row, field, where="row 0") is None
    with pytest.raises(SparsortError, match=r"has no key 'role'.*\{turns\[0\]\.role\}"):
        value_at(row, "turns.role", where="row 0")


def test_a_column_with_a_dot_is_named_in_brackets_and_the_message_shows_how() -> None:
    row = {"a.b": "column", "a": {"b": "path"}}
    assert text_at(row, "[a.b]", where="row 0") == "column"
    assert text_at(row, "a.b", where="row 0") == "path"
    with pytest.raises(SparsortError, match=r"For the column 'a\.b' write \{\[a\.b\]\}"):
        text_at({"a.b": "column"}, "a.b", where="row 0")


def test_the_message_shows_a_path_that_works() -> None:
    rows: list[tuple[Any, str]] = [
        ({"a b": 1}, "{x.a b}"),
        ({"a.b": 1}, "{x[a.b]}"),
        ([{"role": "user", "content": "hi"}], "{x[0].content}"),
        ([["deep"]], "{x[0][0]}"),
    ]
    for value, part in rows:
        with pytest.raises(SparsortError) as error:
            text_at({"x": value}, "x", where="row 0")
        assert part in str(error.value)
        assert has_text(value_at({"x": value}, part[1:-1], where="row 0"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON, st.lists(st.sampled_from(["a", "0", "1", "-1", "."]), max_size=3))
def test_a_value_that_was_put_is_found_and_the_row_is_not_changed(value: Any, steps: list[str]) -> None:
    from sparsort.paths import spell

    row = {"x": {"a": [1, {"a": 2}]}, "y": 3}
    before = repr(row)
    field = spell(["x", *steps])
    made = put(row, field, "new")
    assert repr(row) == before
    assert made["y"] == 3
    assert value_at(made, field, where="row") == "new"
    assert value_at(put({"x": value}, field, "new"), field, where="row") == "new"


def test_a_row_of_texts_and_fields_that_overlap() -> None:
    assert row_of({"a": "1", "meta.lang": "de", "turns[1].content": "hi"}) == {
        "a": "1",
        "meta": {"lang": "de"},
        "turns": [None, {"content": "hi"}],
    }
    with pytest.raises(SparsortError, match="overlap"):
        row_of({"turns[0]": "first", "turns[-1]": "last"})


def test_numbers_keep_a_gap_for_every_form_of_nothing() -> None:
    found = number_array([1, *MISSING[:2], pd.NA, np.float32("nan"), 2.5])
    assert np.array_equal(found, [1, np.nan, np.nan, np.nan, np.nan, 2.5], equal_nan=True)
    assert np.array_equal(number_array(np.array([1, pd.NA], dtype=object)), [1, np.nan], equal_nan=True)
    with pytest.raises(ValueError, match="could not convert"):
        number_array(["five"])


def test_a_number_beyond_the_digits_that_python_writes_is_refused() -> None:
    with pytest.raises(SparsortError, match="has a value in the field 'n' that has no text"):
        as_text(10**5000, field="n", where="row 0")
    assert as_text(10**400, field="n", where="row 0") == "1" + "0" * 400


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("text", {"meta": {"label": "a", "tags": ["x", "y"]}}),
        ("[text]", {"meta": {"label": "a", "tags": ["x", "y"]}}),
        ("meta.label", {"text": "t", "meta": {"tags": ["x", "y"]}}),
        ("meta.tags[-1]", {"text": "t", "meta": {"label": "a", "tags": ["x", None]}}),
        ("meta", {"text": "t"}),
        ("meta.tags[5]", {"text": "t", "meta": {"label": "a", "tags": ["x", "y"]}}),
        ("other.part", {"text": "t", "meta": {"label": "a", "tags": ["x", "y"]}}),
    ],
)
def test_a_row_without_a_field(field: str, expected: dict[str, Any]) -> None:
    row = {"text": "t", "meta": {"label": "a", "tags": ["x", "y"]}}
    assert without(row, field) == expected
    assert row == {"text": "t", "meta": {"label": "a", "tags": ["x", "y"]}}
    assert without({"text": "t", "meta": {"label": "a"}}, "meta.label") == {"text": "t"}
