"""How fields are written: every column and every path has one canonical spelling, which reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort.errors import SparsortError
from sparsort.paths import canonical, column_of, parse_field, spell
from sparsort.templates import fields_of

_NAMES = st.text(alphabet=st.sampled_from(list("ab0- .[]{}:!,\\\"'é\n")), max_size=6)


@given(st.lists(_NAMES, min_size=1, max_size=4))
def test_any_names_read_back_from_their_spelling_alone_and_in_a_template(names: list[str]) -> None:
    field = spell(names)
    assert parse_field(field) == tuple(names)
    assert column_of(field) == names[0]
    assert canonical(field) == field
    assert fields_of(f"before {{{field}}} between {{{field}!r:>5}} {{{{after}}}}") == [field]


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("question", ("question",)),
        ("a b", ("a b",)),
        ("meta.lang", ("meta", "lang")),
        ("messages[0].content", ("messages", "0", "content")),
        ("messages[-1].content", ("messages", "-1", "content")),
        ("[a.b]", ("a.b",)),
        ("[a.b].c[d.e]", ("a.b", "c", "d.e")),
        ("[a]]b]", ("a]b",)),
        ("[0]", ("0",)),
        ("m[0][1]", ("m", "0", "1")),
    ],
)
def test_spellings(field: str, parts: tuple[str, ...]) -> None:
    assert parse_field(field) == parts
    assert canonical(field) == field


def test_two_spellings_of_one_field_have_one_canonical() -> None:
    assert canonical("[question]") == "question"
    assert canonical("meta[lang]") == "meta.lang"
    assert fields_of("{question} {[question]}") == ["question"]


@pytest.mark.parametrize("field", ["", ".", "a.", ".a", "a..b", "a[", "a[0", "a]", "[a", "[a]b", "a[0]b", "a{b}"])
def test_a_spelling_that_cannot_be_read_is_refused(field: str) -> None:
    with pytest.raises(SparsortError, match="cannot be read"):
        parse_field(field)
