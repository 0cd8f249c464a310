"""Rendering of format strings: values are inserted once, and only fields, which may be paths, are read."""

from __future__ import annotations

import math
import string
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.paths import spell
from sparsort.templates import columns_of, fields_of, pieces, render


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
    "template", ["{}", "{0}", "{x:{y}}", "{x", "x}", "{x!q}", "\\boxed{}", "{x.}", "{.x}", "{x[}", "{x[0}", "{x]}"]
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
    with pytest.raises(SparsortError, match="does not accept the format"):
        render("{a:d}", {"a": "text"}, where="row 1")


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
_KEYS = st.sampled_from(["a", "b", "a.b", "a b", "0", "x]:}y", "", "{a}"])
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=8
)
_ROWS = st.dictionaries(_KEYS, _JSON, min_size=1, max_size=4)
_STEPS = st.lists(_KEYS | st.sampled_from([0, 1, -1, -2]), max_size=3)
_NOTHING = object()


def _looked_up(value: Any, steps: list[str | int]) -> Any:
    """The oracle: what Python's own indexing gives, and `_NOTHING` where it gives an error or nothing."""
    for step in steps:
        try:
            value = (
                value[int(step) if isinstance(value, list) else str(step)]
                if isinstance(value, dict | list)
                else _NOTHING
            )
        except (KeyError, IndexError, ValueError):
            return _NOTHING
    return value


def _text(value: Any) -> str | None:
    """The oracle: None for what may not be rendered."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        return str(value)
    return None


@given(_ROWS, st.data())
def test_any_json_renders_as_its_own_text_or_is_refused(row: dict[str, Any], data: st.DataObject) -> None:
    column = data.draw(st.sampled_from(sorted(row)))
    steps = data.draw(_STEPS)
    wanted = _text(_looked_up(row[column], steps))
    template = f"<{{{spell([column, *steps])}}}>"
    if wanted is None:
        with pytest.raises(SparsortError):
            render(template, row, where="row 0")
    else:
        assert render(template, row, where="row 0") == f"<{wanted}>"


@settings(max_examples=40)
@given(st.lists(st.fixed_dictionaries({"a": _LEAVES, "b": _LEAVES, "c": _JSON}), min_size=1, max_size=4))
def test_rows_of_pandas_render_as_their_values_or_are_refused(rows: list[dict[str, Any]]) -> None:
    for row in pd.DataFrame(rows, dtype=object).convert_dtypes().to_dict("records"):
        for column, value in row.items():
            known = isinstance(value, str | int | float) and value == value
            if known:
                assert render(f"{{{column}}}", row, where="row 0") == str(value)
            else:
                with pytest.raises(SparsortError):
                    render(f"{{{column}}}", row, where="row 0")


@given(
    st.lists(
        st.sampled_from(["{{", "}}", "{a}", "{b!r}", "{a b:>5}", "{é!s:x}", "text", " ", "\n", "{d:%H:%M}"]), max_size=8
    )
)
def test_templates_without_paths_are_read_as_python_reads_them(parts: list[str]) -> None:
    template = "".join(parts)
    wanted, literal = [], ""
    for text, field, spec, conversion in string.Formatter().parse(template):
        literal += text
        if field is not None:
            wanted.append((literal, field, spec or "", conversion))
            literal = ""
    assert [tuple(piece) for piece in pieces(template) if piece.field is not None] == wanted
    literals = [piece.literal for piece in pieces(template) if piece.field is None]
    assert "".join(literals) == literal


def test_columns_are_what_the_fields_look_into() -> None:
    assert columns_of("{meta.lang} {[a.b]} {meta.id} {question}") == ["meta", "a.b", "question"]


def test_a_list_is_refused_unless_its_notation_is_asked_for() -> None:
    row = {"tags": ["a", None, {"b": 1}], "odd": [object()], "text": "x"}
    for template in ("{tags}", "{tags!s}", "{tags:>5}", "{odd!r}"):
        with pytest.raises(SparsortError, match=r"row 3 has a list in the field '(tags|odd)'"):
            render(template, row, where="row 3")
    assert render("{tags!r}", row, where="row 3") == "['a', None, {'b': 1}]"
    assert render("{text!r}", row, where="row 3") == "'x'"


@pytest.mark.parametrize("template", ["{x.__class__}", "{x[0]}", "{x.y}"])
def test_a_text_has_no_parts(template: str) -> None:
    with pytest.raises(SparsortError, match="Only dictionaries and lists have parts"):
        render(template, {"x": "v"}, where="row 0")
