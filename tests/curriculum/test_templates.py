"""Rendering of format strings: values go in once, and nothing but field names is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.templates import fields_of, render


def test_fields_come_once_in_order_of_use() -> None:
    assert fields_of("{b} {a!r:>5} {b} {{c}}") == ["b", "a"]
    assert fields_of("no field") == []


@given(st.text(), st.text())
def test_values_are_never_read_as_templates(first: str, second: str) -> None:
    row = {"a": first, "b": second}
    assert render("{{{a}}}|{b}|{a}", row, where="row 0") == "{" + first + "}|" + second + "|" + first


def test_conversions_and_formats() -> None:
    assert render("{x:.2f} {y!r} {n:03d}", {"x": 1.234, "y": "q", "n": 7}, where="row 0") == "1.23 'q' 007"


@pytest.mark.parametrize(
    "template", ["{x.__class__}", "{x[0]}", "{}", "{0}", "{x:{y}}", "{x", "x}", "{x!q}", "\\boxed{}", "{x.y}"]
)
def test_what_is_not_a_field_name_is_refused(template: str) -> None:
    with pytest.raises(SparsortError, match=r"template|nests|conversion"):
        render(template, {"x": "v", "y": "3"}, where="row 0")


def test_missing_field_names_the_row_the_fields_and_the_nearest() -> None:
    with pytest.raises(SparsortError) as error:
        render("{question}", {"id": "q7", "qestion": "?"}, where="row 'q7'")
    assert "row 'q7'" in str(error.value)
    assert "Did you mean 'qestion'" in str(error.value)
    assert "id, qestion" in str(error.value)


def test_null_and_unformattable_values_are_refused() -> None:
    with pytest.raises(SparsortError, match="null in the field 'a'"):
        render("{a}", {"a": None}, where="row 1")
    with pytest.raises(SparsortError, match="does not take the format"):
        render("{a:d}", {"a": "text"}, where="row 1")
